"""Where slices live: keys, a RAM tier, files, and an index of them. Knows bytes and hashes, nothing of llama.cpp."""

from cpucache.store.fingerprint import Fingerprints
from cpucache.store.index import Kept, Row
from cpucache.store.keys import context_key, slice_key
from cpucache.store.slicefile import SliceInfo
from cpucache.store.store import Store, default_home

__all__ = ["Fingerprints", "Kept", "Row", "SliceInfo", "Store", "context_key", "default_home", "slice_key"]
