"""Turns PML trees or chat messages into segments at positions: the layout of a schema, and prompts bound to it."""

from cpucache.layout.bind import Bound, bind
from cpucache.layout.schema import Extent, Positions, SchemaLayout
from cpucache.layout.segment import NewText, Piece, Placeholder, RoleRun, Segment, Text
from cpucache.layout.template import ChatTemplate
from cpucache.layout.turns import Turns
from cpucache.layout.vocabulary import Tokens, Vocabulary

__all__ = [
    "Bound",
    "ChatTemplate",
    "Extent",
    "NewText",
    "Piece",
    "Placeholder",
    "Positions",
    "RoleRun",
    "SchemaLayout",
    "Segment",
    "Text",
    "Tokens",
    "Turns",
    "Vocabulary",
    "bind",
]
