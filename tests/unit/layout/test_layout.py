"""A schema's layout: which segments there are, what they hold and where they stand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpucache.errors import PMLError
from cpucache.layout import ChatTemplate, Extent, Placeholder, Positions, SchemaLayout, Segment
from cpucache.layout.segment import LONGEST
from cpucache.pml import parse_schema
from cpucache.pml.tree import Module, Scope, Union
from cpucache.runtime import Model
from cpucache.store import text_id
from tests.support.letters import FILLER, Letters
from tests.support.templates import WITH_DEFAULT
from tests.support.tiny import BOS, CHATML, IM_END, IM_START, UNK


def lay(
    content: str, positions: Positions = "auto", *, template: str | None = None, attributes: str = "", **vocabulary: Any
) -> SchemaLayout:
    letters = Letters(**vocabulary)
    schema = parse_schema(f"<schema name='s' {attributes}>{content}</schema>", file="s.xml")
    return SchemaLayout(schema, letters, ChatTemplate(template, bos=letters.bos_text or "", eos="</s>"), positions)


def parts(layout: SchemaLayout) -> list[Segment | Placeholder]:
    """Every segment and placeholder, in document order."""

    def walk(scope: Scope) -> Iterator[Segment | Placeholder]:
        for part in layout.outline[scope]:
            if isinstance(part, Union | Module):
                for module in part.members if isinstance(part, Union) else (part,):
                    yield from walk(module)
            else:
                yield part

    return list(walk(layout.schema))


def text(layout: SchemaLayout, part: Segment | Placeholder) -> str:
    assert isinstance(layout.vocabulary, Letters)
    return layout.vocabulary.text(part.tokens)


def shown(layout: SchemaLayout) -> list[tuple[str, str, int | None]]:
    """Module (``?`` for a placeholder), text and reserved position of every part."""
    return [
        (part.module if isinstance(part, Segment) else "?", text(layout, part), part.reserved) for part in parts(layout)
    ]


def drawn(extent: Extent) -> Any:
    head = (extent.kind, extent.name, extent.start, extent.end, extent.own)
    return (*head, [drawn(child) for child in extent.children]) if extent.children else head


# ---- modules ---------------------------------------------------------------------------------------------------------

NESTED = "AB<module name='m'>cde<module name='n'>f</module>gh</module>IJ<module name='o'>k</module>"


def test_segments_stand_in_the_order_of_the_schema() -> None:
    assert shown(lay(NESTED, "reserved")) == [
        ("", "AB", 0),
        ("m", "cde", 2),
        ("m.n", "f", 5),
        ("m", "gh", 6),
        ("", "IJ", 8),
        ("o", "k", 10),
    ]


def test_packed_segments_have_no_position() -> None:
    layout = lay(NESTED, "packed")
    assert layout.positions == "packed"
    assert shown(layout) == [(module, text, None) for module, text, _ in shown(lay(NESTED, "reserved"))]


def test_modules_without_text_of_their_own_take_no_room() -> None:
    layout = lay("<module name='a'></module><module name='b'><module name='c'>xy</module></module>z")
    assert shown(layout) == [("b.c", "xy", 0), ("", "z", 2)]


def test_modules_that_are_not_cached_have_segments() -> None:
    layout = lay(
        "A<module name='m' cache='false'>b<module name='n'>c</module><parameter name='p' length='1'/></module>"
    )
    assert [(text(layout, segment), segment.cache) for segment in layout.segments] == [
        ("A", True),
        ("b", False),
        ("c", True),
    ]
    assert [extent.cache for extent in layout.extent.children] == [False]


def test_equal_modules_have_segments_of_their_own() -> None:
    layout = lay("<module name='a'>x</module><module name='b'>x</module>")
    assert layout.segments[0] != layout.segments[1]
    assert layout.segments[0].id == layout.segments[1].id


def test_long_text_is_cut() -> None:
    layout = lay(f"<module name='m'>{'x' * (2 * LONGEST)}y</module>z")
    assert [(segment.module, len(segment.tokens), segment.reserved) for segment in layout.segments] == [
        ("m", LONGEST, 0),
        ("m", LONGEST, LONGEST),
        ("m", 1, 2 * LONGEST),
        ("", 1, 2 * LONGEST + 1),
    ]
    assert layout.segments_at[layout.schema.children[0].children[0], ""] == list(layout.segments[:3])  # type: ignore[union-attr]


# ---- what may be attended to -----------------------------------------------------------------------------------------


def limits(layout: SchemaLayout) -> dict[str, set[str] | None]:
    """The texts that slices of each text may have attended to; ``None``: any."""
    texts = {part.id if isinstance(part, Segment) else text_id(part.tokens): part for part in parts(layout)}
    found: dict[str, set[str] | None] = {}
    for segment in layout.segments:
        limit = layout.may_attend_to(segment)
        found[text(layout, segment)] = None if limit is None else {text(layout, texts[each]) for each in limit}
    return found


def test_an_isolated_module_attends_to_itself_and_the_text_around_it() -> None:
    assert limits(
        lay("A<module name='m'>b<module name='n' isolate='true'>c<module name='o'>d</module></module>e</module>F")
    ) == {"A": None, "b": None, "c": set("AbecdF"), "d": set("AbecdF"), "e": None, "F": None}


def test_the_members_of_an_isolated_union_are_isolated() -> None:
    content = "A<union isolate='true'><module name='x'>1</module><module name='y'>2</module></union>"
    assert limits(lay(content)) == {"A": None, "1": set("A1"), "2": set("A2")}


def test_without_an_anchor_text_attends_to_its_own_module() -> None:
    content = "A<module name='m'>b<module name='n'>c</module>d</module>E"
    assert limits(lay(content, attributes="anchor='none'")) == {
        "A": set("AE"),
        "b": set("bd"),
        "c": set("c"),
        "d": set("bd"),
        "E": set("AE"),
    }


# ---- unions ----------------------------------------------------------------------------------------------------------


def test_union_members_start_together_and_the_longest_is_the_length() -> None:
    content = "A<union><module name='x'>1</module><module name='y'>234</module><module name='z'>56</module></union>B"
    layout = lay(content)
    assert shown(layout) == [("", "A", 0), ("x", "1", 1), ("y", "234", 1), ("z", "56", 1), ("", "B", 4)]


# ---- parameters ------------------------------------------------------------------------------------------------------


def test_a_parameter_is_filled_by_its_scaffold_and_then_the_filler() -> None:
    layout = lay(
        "<module name='m'>a<parameter name='p' length='4' scaffold='xy'/>b<parameter name='q' length='2'/></module>"
    )
    filled, empty = "xy" + 2 * FILLER, 2 * FILLER
    assert shown(layout) == [("m", "a", 0), ("?", filled, 1), ("m", "b", 5), ("?", empty, 6)]


def test_a_scaffold_as_long_as_its_parameter_fits_and_a_longer_one_does_not() -> None:
    assert shown(lay("<parameter name='p' length='3' scaffold='xyz'/>")) == [("?", "xyz", 0)]
    with pytest.raises(PMLError, match=r"^s\.xml:2: .*'p' is 5 tokens long, 2 more than its length 3: raise") as caught:
        lay("A\n<parameter name='p' length='3' scaffold='vwxyz'/>")
    assert caught.value.line == 2


# ---- roles -----------------------------------------------------------------------------------------------------------


def test_role_tags_become_template_text_inside_the_segments_next_to_them() -> None:
    layout = lay("<system>S<module name='m'>x</module>T</system><user>U</user>", template=CHATML)
    assert [row[:2] for row in shown(layout)] == [
        ("", "<|im_start|>system\nS"),
        ("m", "x"),
        ("", "T<|im_end|>\n<|im_start|>user\nU<|im_end|>\n"),
    ]
    # Control tokens of the template are tokens; in the schema's text they are letters.
    assert len(layout.segments[0].tokens) == 1 + len("system\nS")
    forged = lay("<system>&lt;|im_end|></system>", template=CHATML)
    assert len(forged.segments[0].tokens) == 1 + len("system\n<|im_end|>") + 1 + 1


def test_segments_are_found_by_their_node() -> None:
    layout = lay("<system>S<module name='m'>x</module></system>", template=CHATML, bos_text="<s>")
    system = layout.schema.children[0]
    first, last = [layout.segments[0]], [layout.segments[-1]]
    assert layout.segments_at[layout.schema, ""] == layout.segments_at[system, ""] == first
    assert layout.segments_at[system, "end"] == last


def test_without_a_template_roles_end_their_lines() -> None:
    assert shown(lay("<system>S</system><user>U</user>")) == [("", "S\nU\n", 0)]


def test_only_the_first_role_of_all_opens_the_template() -> None:
    first, second = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n", "<|im_start|>user\n"
    assert first + "a" in shown(lay("<user>a</user>", template=WITH_DEFAULT))[0][1]
    assert shown(lay("x<user>a</user>", template=WITH_DEFAULT))[0][1] == f"x{second}a<|im_end|>\n"
    modules = lay(
        "<module name='m'><user>a</user></module><module name='n'><user>b</user></module>", template=WITH_DEFAULT
    )
    assert [row[1] for row in shown(modules)] == [f"{first}a<|im_end|>\n", f"{second}b<|im_end|>\n"]


def test_union_members_are_alternatives_to_the_template_too() -> None:
    content = "<union><module name='a'><user>a</user></module><module name='b'><user>b</user></module></union>"
    rows = shown(lay(content, template=WITH_DEFAULT))
    assert rows[0][1].replace("user\na", "user\nb") == rows[1][1]
    assert "Be kind." in rows[1][1]


# ---- the beginning of the text ---------------------------------------------------------------------------------------


def test_the_beginning_of_text_opens_the_schema() -> None:
    assert shown(lay("<module name='m'>x</module>y", bos_text="<s>")) == [
        ("", "<s>", 0),
        ("m", "x", 1),
        ("", "y", 2),
    ]
    assert shown(lay("ab", bos_text="<s>")) == [("", "<s>ab", 0)]


def test_the_beginning_of_text_is_there_once_when_the_template_writes_it_too() -> None:
    layout = lay("<system>S</system>", template="{{ bos_token }}" + CHATML, bos_text="<s>")
    assert shown(layout)[0][1] == "<s><|im_start|>system\nS<|im_end|>\n"
    # And where the vocabulary adds none, the template's own stays.
    schema = parse_schema("<schema name='s'><system>S</system></schema>")
    letters = Letters()
    layout = SchemaLayout(schema, letters, ChatTemplate("{{ bos_token }}" + CHATML, bos="<s>"))
    assert shown(layout)[0][1] == "<s><|im_start|>system\nS<|im_end|>\n"


# ---- lengths ---------------------------------------------------------------------------------------------------------

MANY = "".join(f"<module name='m{index}'>{'x' * (10 + index)}</module>" for index in range(5))


def test_auto_reserves_while_the_schema_fits_the_trained_context() -> None:
    assert (lay(MANY, n_ctx_train=60).positions, lay(MANY, n_ctx_train=60).length) == ("reserved", 60)
    packed = lay(MANY, n_ctx_train=59)
    assert packed.positions == "packed"


def test_reserved_positions_beyond_the_trained_context_are_refused_with_the_largest_modules() -> None:
    with pytest.raises(PMLError) as caught:
        lay(MANY, "reserved", n_ctx_train=59)
    assert str(caught.value) == (
        "s.xml:1: schema 's' with reserved positions needs 60 tokens, the model has room for 59; "
        "its largest modules: m4 (14), m3 (13), m2 (12)"
    )


def test_what_is_too_long_even_when_packed_is_refused() -> None:
    content = f"aaaaaa<module name='m'>{'b' * 18}</module>cccccc<module name='o'>d</module>"
    # Before m stand, in any prompt, the six letters before it.
    assert lay(content, n_ctx_train=24).positions == "packed"
    message = r"'s' needs 24 tokens, the model has room for 23; its largest modules: m \(18\), \(text of the schema\)"
    with pytest.raises(PMLError, match=message):
        lay(content, n_ctx_train=23)


# ---- extents ---------------------------------------------------------------------------------------------------------


def test_extents_of_reserved_positions() -> None:
    layout = lay(
        "AB<module name='m'>cd<parameter name='p' length='3'/>e<module name='n'>fgh</module>i</module>"
        "<union scaffold='y'><module name='x'>1</module><module name='y'>23</module></union>J",
        bos_text="<s>",
    )
    assert drawn(layout.extent) == (
        *("schema", "s", 0, 16, 4),
        [
            ("module", "m", 3, 13, 4, [("parameter", "p", 5, 8, 3), ("module", "n", 9, 12, 3)]),
            ("union", "y", 13, 15, 0, [("module", "x", 13, 14, 1), ("module", "y", 13, 15, 2)]),
        ],
    )
    assert layout.length == 16


def test_extents_of_packed_positions() -> None:
    layout = lay("AB<module name='m'>cd<module name='n'>fgh</module>i</module><module name='o'>jk</module>L", "packed")
    assert drawn(layout.extent) == (
        *("schema", "s", 0, 7, 3),
        [("module", "m", 2, 7, 3, [("module", "n", 4, 7, 3)]), ("module", "o", 2, 4, 2)],
    )


# ---- real vocabularies -----------------------------------------------------------------------------------------------


# After a control token, llama.cpp puts the space that SentencePiece vocabularies like to begin with.
TOKENIZERS = [{"tokenizer": "bpe"}, {"tokenizer": "spm", "add_space_prefix": False}]


@pytest.mark.parametrize("settings", TOKENIZERS, ids=["bpe", "spm"])
@pytest.mark.parametrize("add_bos", [False, True])
def test_a_layout_under_a_vocabulary_of_llama_cpp(
    tiny: Callable[..., Path], settings: dict[str, Any], add_bos: bool
) -> None:
    schema = parse_schema(
        "<schema name='s'><system>in the end<module name='m'> of the one "
        "<parameter name='p' length='9' scaffold='the'/></module></system></schema>"
    )
    with Model(tiny("llama", add_bos=add_bos, **settings), vocab_only=True) as model:
        template = ChatTemplate(model.chat_template, bos=model.special_text("bos"), eos=model.special_text("eos"))
        layout = SchemaLayout(schema, model, template)
        all_parts = parts(layout)
        texts = [model.text(part.tokens, special=True) for part in all_parts]
        begin = "<s>" if add_bos else ""
        assert texts[:2] == [f"{begin}<|im_start|>system\nin the end", " of the one "]
        assert texts[3] == "<|im_end|>\n"
        first, filled = all_parts[0].tokens.tolist(), all_parts[2].tokens.tolist()
        assert first[: 1 + add_bos] == [BOS, IM_START][1 - add_bos :]
        assert all_parts[3].tokens[0] == IM_END
        assert model.text(filled[:-6]).startswith("the")
        assert (len(filled), set(filled[-6:])) == (9, {UNK})
        sizes = [len(part.tokens) for part in all_parts]
        assert [part.reserved for part in all_parts] == np.cumsum([0, *sizes[:-1]]).tolist()


def test_the_trained_context_of_a_model_decides(tiny: Callable[..., Path]) -> None:
    schema = parse_schema(f"<schema name='s'>{MANY}</schema>")
    with Model(tiny("llama", n_ctx=59), vocab_only=True) as model:
        assert SchemaLayout(schema, model, ChatTemplate(None)).positions == "packed"
    with Model(tiny("llama", n_ctx=60), vocab_only=True) as model:
        assert SchemaLayout(schema, model, ChatTemplate(None)).positions == "reserved"
