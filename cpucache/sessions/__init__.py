"""Conversations on disk: their messages, and how the tokens of each were evaluated. The store has their KV state."""

from cpucache.sessions.entries import Entry
from cpucache.sessions.records import Damaged, Summary, Transcript, Transcripts, default_sessions

__all__ = ["Damaged", "Entry", "Summary", "Transcript", "Transcripts", "default_sessions"]
