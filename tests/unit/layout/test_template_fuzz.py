"""Hostile, broken and changed chat templates: they are split into pieces, or text stays plain."""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpucache.layout import ChatTemplate
from cpucache.layout.sandbox import LONGEST
from tests.support.templates import TEMPLATES, assembled
from tests.support.tiny import CHATML
from tests.support.tries import tries

HOSTILE = (Path(__file__).parents[2] / "corpus" / "template" / "hostile.txt").read_text().splitlines()
SEEDS = [*TEMPLATES.values(), *HOSTILE]
PATIENCE = 60
"""Seconds of CPU time for one template, on however slow a machine: the worst take two on an idle one."""
ROOM = 256 << 20
"""Bytes of memory that one template may take."""
LARGE = {
    "parentheses": "{{ " + "(" * 100_000 + "1" + ")" * 100_000 + " }}",
    "conditions": "{% if 1 %}" * 10_000 + "{% endif %}" * 10_000,
    "signs": "{{ " + "-" * 100_000 + "1 }}",
    "sums": "{{ " + "1+" * 50_000 + "1 }}",
    "texts": "{{ " + "'x'~" * 50_000 + "1 }}",
    "digits": "{{ " + "9" * 200_000 + " }}",
    "text": "x" * (LONGEST - len(CHATML)),
    "much text": "x" * 10_000_000,
}
PIECES = st.sampled_from(
    [
        *(
            "{%",
            "%}",
            "{{",
            "}}",
            "(",
            ")",
            "[",
            "]",
            "'",
            "|",
            "~",
            "+",
            "*",
            "**",
            "%",
            "-",
            ".",
            ",",
            "==",
            " in ",
            "0",
        ),
        *("{% for m in messages %}", "{% for i in range(9999) %}", "{% endfor %}", "{% set ns = namespace(x='x') %}"),
        *(
            "{% set ns.x = ns.x ~ ns.x %}",
            "{% set ns.x = [ns.x, ns.x] %}",
            "{{ ns.x }}",
            "{% if messages %}",
            "{% endif %}",
        ),
        *("{% macro f(n) %}", "{% endmacro %}", "{{ f(9) }}", "{% set x %}", "{% endset %}", "{{ x }}", "{% raw %}"),
        *(
            "|join(messages)",
            "|replace('x', x)",
            "|list",
            "|tojson",
            "|string",
            "|center(9999)",
            "|map('string')",
            "[::-1]",
        ),
        *(
            "m.content",
            "messages",
            "loop",
            "ns.x",
            "x",
            "999999999",
            "'x'",
            "{% generation %}",
            "{% break %}",
            "\0",
            "\n",
        ),
    ]
)


def checked(source: str) -> tuple[ChatTemplate, list[str]]:
    """A template whose writer can't be trusted, when everything is done with it, and which bounds that exceeded."""
    begun, peak = time.process_time(), memory()
    template = ChatTemplate(source, bos="<s>", eos="</s>")
    text = assembled(template, [("system", "be"), ("user", "a"), ("assistant", "b"), ("user", "c")])
    bounds = {
        "text": len(text) < LONGEST * 4,
        "seconds": time.process_time() - begun < PATIENCE,
        "bytes": memory() - peak < ROOM,
    }
    return template, [name for name, kept in bounds.items() if not kept]


def memory() -> int:
    """The most bytes that this process ever had in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@pytest.mark.parametrize("source", HOSTILE)
def test_the_corpus_is_refused(source: str) -> None:
    template, exceeded = checked(source + CHATML)
    assert template.plain and not exceeded


@pytest.mark.parametrize("name", LARGE)
def test_large_ones_are_refused_but_for_a_sum_of_texts(name: str) -> None:
    template, exceeded = checked(LARGE[name] + CHATML)
    assert template.plain is (name != "texts")
    assert not exceeded


@pytest.mark.parametrize("name", TEMPLATES)
def test_those_of_models_are_far_from_the_limits(name: str) -> None:
    # Twenty more that do the same, and whose text is discarded.
    work = "".join("{% set unused %}" + TEMPLATES[name] + "{% endset %}" for _ in range(20))
    template, exceeded = checked(work + CHATML)
    assert not template.plain and not exceeded


def changed(draw: st.DrawFn) -> str:
    """A template with parts cut, put in and repeated, or pieces in any order."""
    source: str = draw(st.sampled_from(SEEDS) | st.lists(PIECES, max_size=30).map("".join))
    for _ in range(draw(st.integers(0, 5))):
        start = draw(st.integers(0, len(source)))
        end = min(len(source), start + draw(st.integers(0, 60)))
        put = draw(st.just("") | PIECES | st.text(max_size=4))
        times = draw(st.sampled_from((0, 1, 1, 2, 50)))
        source = source[:start] + put + source[start:end] * times + source[end:]
    return source + draw(st.sampled_from(("", CHATML)))


@tries(100)
@given(st.composite(changed)())
def test_a_changed_template_exceeds_no_bound(source: str) -> None:
    assert checked(source)[1] == []
