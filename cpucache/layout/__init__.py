"""From trees and a tokenizer to tokens at positions: the layout of a schema, and the plan of one prompt."""

from cpucache.layout.bind import bind, bind_opening
from cpucache.layout.chain import BLOCK, Chains
from cpucache.layout.history import History
from cpucache.layout.plan import Plan
from cpucache.layout.refresh import Refresh
from cpucache.layout.scaffold import ScaffoldLayout
from cpucache.layout.schema import Extent, Positions, SchemaLayout
from cpucache.layout.segment import Segment, Span
from cpucache.layout.template import ChatTemplate
from cpucache.layout.turns import Turns
from cpucache.layout.vocabulary import Vocabulary

__all__ = [
    "BLOCK",
    "Chains",
    "ChatTemplate",
    "Extent",
    "History",
    "Plan",
    "Positions",
    "Refresh",
    "ScaffoldLayout",
    "SchemaLayout",
    "Segment",
    "Span",
    "Turns",
    "Vocabulary",
    "bind",
    "bind_opening",
]
