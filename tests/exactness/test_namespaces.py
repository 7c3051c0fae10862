"""Namespaces: several who share an engine find what is exact, or nothing, and never one another's text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpucache import Engine
from cpucache.errors import InputError
from cpucache.layout import Text
from cpucache.pml import parse_schema
from cpucache.store import Store
from tests.support.sessions import engine, logits, message, plain_spoken

Tiny = Callable[..., Path]

FIRST, SECOND = message(1, 40), message(2, 40)
SCHEMA = f"<schema name='shelf'>Books:<module name='one'>{FIRST}</module><module name='two'>{SECOND}</module></schema>"
PROMPT = "<prompt schema='shelf'><two/><one/><user>Which?</user></prompt>"
SIZES: dict[str, Any] = {"segment_tokens": (16, 64), "parallel": 2}


def marked(running: Engine, *texts: str) -> Text:
    """Texts that may be reused wherever they stand."""
    tokens = [running.model.tokenize(text) for text in texts]
    ends = np.cumsum([len(each) for each in tokens]).tolist()
    parts = tuple(zip([0, *ends[:-1]], ends, strict=True))
    return Text(np.concatenate([*tokens, running.model.tokenize("?")]).astype(np.int32), parts)


@pytest.mark.parametrize("isolate", [False, True])
def test_exact_slices_are_shared_unless_isolated(isolate: bool, tiny: Tiny, tmp_path: Path) -> None:
    with engine(tiny("llama"), tmp_path, **SIZES) as running:
        ann, bob = (running.within(name, isolate=isolate) for name in ("ann", "bob"))
        first = ann.generate(text=FIRST, max_tokens=4)
        size = first.metrics.prompt_tokens
        again = ann.generate(text=FIRST, max_tokens=4)
        other = bob.generate(text=FIRST, max_tokens=4)
        assert first.text == again.text == other.text
        assert first.metrics.cached_tokens == 0
        assert again.metrics.cached_tokens == size - 1
        assert other.metrics.cached_tokens == (0 if isolate else size - 1)
        mine = running.generate(text=FIRST, max_tokens=4).metrics.cached_tokens
        assert mine == (0 if isolate else size - 1)


@pytest.mark.parametrize("isolate", [False, True])
def test_what_lies_in_the_context_is_reused_likewise(isolate: bool, tiny: Tiny, tmp_path: Path) -> None:
    """Text that is too short to be saved."""
    with engine(tiny("llama"), tmp_path) as running:
        ann, bob = (running.within(name, isolate=isolate) for name in ("ann", "bob"))
        ann.generate(text="the sea and the", max_tokens=4)
        other = bob.generate(text="the sea and the rain", max_tokens=4).metrics
        assert (other.cached_tokens > 0) != isolate


@pytest.mark.parametrize("isolate", [False, True])
def test_foreign_slices_stay_where_they_are(isolate: bool, tiny: Tiny, tmp_path: Path) -> None:
    with engine(tiny("llama"), tmp_path, **SIZES) as running:
        ann, bob = (running.within(name, isolate=isolate) for name in ("ann", "bob"))
        ann.generate(marked(running, FIRST, SECOND), max_tokens=1)
        swapped = marked(running, SECOND, FIRST)
        bobs = bob.generate(swapped, max_tokens=1).metrics
        assert bobs.cached_tokens == bobs.foreign_tokens == bobs.clean_tokens == 0
        # Bob's are exact by now, and Ann may take them where all is shared.
        anns = ann.generate(swapped, max_tokens=1).metrics
        assert (anns.foreign_tokens + anns.clean_tokens > 0) == isolate
        assert anns.cached_tokens > 0
        # After other text, Bob's slices are taken by Bob only.
        third = marked(running, "So:", SECOND, FIRST)
        bobs = bob.generate(third, max_tokens=1).metrics
        assert bobs.foreign_tokens + bobs.clean_tokens > 100
        carls = running.within("carl", isolate=isolate).generate(third, max_tokens=1).metrics
        assert carls.foreign_tokens == carls.clean_tokens == 0
        assert carls.fresh_tokens > 100


@pytest.mark.parametrize("isolate", [False, True])
def test_a_schema_belongs_to_one_namespace(isolate: bool, tiny: Tiny, tmp_path: Path) -> None:
    with engine(tiny("llama"), tmp_path, **SIZES) as running:
        ann, bob = (running.within(name, isolate=isolate) for name in ("ann", "bob"))
        ann.add_schema(parse_schema(SCHEMA))
        encoded = ann.encode("shelf").tokens
        assert encoded > 0
        with pytest.raises(InputError, match="no schema 'shelf'"):
            bob.generate(PROMPT)
        # The same schema of another is not evaluated again, and serves in any order.
        bob.add_schema(parse_schema(SCHEMA))
        assert bob.encode("shelf").tokens == (encoded if isolate else 0)
        metrics = bob.generate(PROMPT, max_tokens=1).metrics
        assert metrics.clean_tokens + metrics.related_tokens >= len(running.model.tokenize(SECOND))
        assert metrics.encoded_tokens == 0


@pytest.mark.parametrize("arch", ["llama", "gemma3", "mamba"])
def test_an_isolated_answer_is_right(arch: str, tiny: Tiny, tmp_path: Path) -> None:
    with engine(tiny(arch), tmp_path, **SIZES) as running:
        isolated = running.within("ann", isolate=True)
        for text in (FIRST, FIRST + SECOND, FIRST):
            plan = isolated.plan(text=text)
            wanted = logits(running, running.plan(text=text).without_reuse(), fresh=True)
            assert np.abs(logits(isolated, plan) - wanted).max() < 1e-3
        # The key of each saved slice can be computed again from its file.
        running.store.flush()
        assert running.store.files is not None and running.store.index is not None
        rows = running.store.index.rows()
        assert rows and all(running.store.files.check(row.key) for row in rows)


def test_each_namespace_is_refined(tiny: Tiny, tmp_path: Path) -> None:
    with engine(tiny("llama"), tmp_path, **SIZES) as running:
        ann = running.within("ann")
        ann.add_schema(parse_schema(SCHEMA))
        ann.encode("shelf")
        ann.generate(PROMPT, max_tokens=1)
        assert running.refine().slices == 0
        assert ann.refine().slices > 0
        assert ann.plan(PROMPT).exact


def test_conversations_belong_to_one_namespace(tiny: Tiny, tmp_path: Path) -> None:
    with engine(plain_spoken(tiny("llama")), tmp_path) as running:
        ann, bob = running.within("ann"), running.within("bob")
        with ann.session("talk") as session:
            list(session.stream("Hello"))
        with bob.session("talk") as other:
            assert other.entries == []
        with ann.session("talk") as session:
            assert len(session.entries) == 2


@pytest.mark.parametrize("name", ["", "../x", "a/b", "ä", "a" * 65])
def test_a_name_is_no_path(name: str, tiny: Tiny, tmp_path: Path) -> None:
    with engine(tiny("llama"), tmp_path) as running, pytest.raises(InputError, match="namespace="):
        running.within(name)


def test_a_prompt_prepared_ahead_is_found(tiny: Tiny, tmp_path: Path) -> None:
    with engine(tiny("llama"), tmp_path, **SIZES) as running:
        prepared = running.prepare(text=FIRST).result()
        size = len(running.model.tokenize(FIRST))
        # All but the last, which every answer begins with.
        assert (prepared.prompt_tokens, prepared.cached_tokens, prepared.evaluated_tokens) == (size, 0, size - 1)
        again = running.prepare(text=FIRST).result()
        assert (again.cached_tokens, again.evaluated_tokens) == (size - 1, 0)
        running.forget()
        assert running.generate(text=FIRST, max_tokens=1).metrics.cached_tokens == size - 1
        running.forget()
        assert running.generate(text=FIRST + " And?", max_tokens=1).metrics.cached_tokens >= size - 1


def test_a_namespace_that_is_opened_twice_has_one_cache(tiny: Tiny, tmp_path: Path) -> None:
    with engine(tiny("llama"), tmp_path, **SIZES) as running:
        first, second = running.within("ann"), running.within("ann")
        other, isolated = running.within("bob"), running.within("ann", isolate=True)
        caches = [each.kv_cache for each in (running, first, other, isolated)]
        assert len(set(map(id, caches))) == 4
        assert second.kv_cache is first.kv_cache
        first.add_schema(parse_schema(SCHEMA))
        assert not second.planner.schemas
        elsewhere = Store(tmp_path / "other", ram_budget=1 << 20)
        running.use_store(elsewhere).close()
        assert all(cache.store is elsewhere for cache in caches)
