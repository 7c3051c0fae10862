"""Conversations on disk: what was said, and how its tokens were evaluated. Their KV state lies in the store."""

from cpucache.sessions.entries import Entry
from cpucache.sessions.records import Damaged, Summary, Transcript, Transcripts, default_sessions

__all__ = ["Damaged", "Entry", "Summary", "Transcript", "Transcripts", "default_sessions"]
