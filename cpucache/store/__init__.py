"""Where slices live: keys, a RAM tier, a disk tier. Knows bytes and hashes, nothing of models or llama.cpp."""

from cpucache.store.disk import SliceInfo
from cpucache.store.fingerprint import Fingerprints
from cpucache.store.keys import context_key, slice_key
from cpucache.store.store import Store, default_home

__all__ = ["Fingerprints", "SliceInfo", "Store", "context_key", "default_home", "slice_key"]
