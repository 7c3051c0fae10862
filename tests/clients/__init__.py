"""What real clients do to a cache, one file a cause, and what it costs here on the second request."""
