"""cpucache: long, repetitive prompts answered at once on an ordinary CPU, from reusable KV state slices of llama.cpp."""

__version__ = "0.1.0"
