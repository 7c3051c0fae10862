"""Storage of slices: keys, a RAM tier, files and their index. Handles bytes and hashes; does not use llama.cpp."""

from cpucache.store.asked import Asked, Combination, Part
from cpucache.store.fingerprint import Fingerprints
from cpucache.store.index import Kept, Row
from cpucache.store.keys import content_key, slice_key, text_id
from cpucache.store.slicefile import SliceInfo
from cpucache.store.store import Store, default_home

__all__ = [
    "Asked",
    "Combination",
    "Fingerprints",
    "Kept",
    "Part",
    "Row",
    "SliceInfo",
    "Store",
    "content_key",
    "default_home",
    "slice_key",
    "text_id",
]
