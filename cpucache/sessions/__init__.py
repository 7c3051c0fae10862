"""Conversations on disk: what was said, and how its tokens were evaluated. Their KV state lies in the store."""

from cpucache.sessions.records import Entry, Summary, Transcript, Transcripts, default_sessions

__all__ = ["Entry", "Summary", "Transcript", "Transcripts", "default_sessions"]
