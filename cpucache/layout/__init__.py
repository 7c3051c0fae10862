"""From trees and a tokenizer to tokens at positions: the layout of a schema, and the plan of one prompt."""

from cpucache.layout.bind import bind
from cpucache.layout.plan import Plan
from cpucache.layout.schema import Extent, Positions, SchemaLayout
from cpucache.layout.segment import Segment, Span
from cpucache.layout.template import ChatTemplate
from cpucache.layout.vocabulary import Vocabulary

__all__ = [
    "ChatTemplate",
    "Extent",
    "Plan",
    "Positions",
    "SchemaLayout",
    "Segment",
    "Span",
    "Vocabulary",
    "bind",
]
