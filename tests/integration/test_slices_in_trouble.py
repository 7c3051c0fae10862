"""Slices through restarts, damage, lack of memory, Ctrl-C and limits: the answer is right, or refused in one line."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cpucache.errors import ContextFull, CpucacheError, InputError, ModelError
from cpucache.reuse import Plan, Slice, Slices
from cpucache.runtime import Context, KVType, Model
from cpucache.store import SliceInfo, Store
from tests.support.cutting import every
from tests.support.tiny import ATTENTION_ARCHS
from tests.support.workbench import (
    PLENTY,
    SLICES,
    TOLERANCE,
    Bench,
    Desk,
    Logits,
    bench,
    chain,
    cut,
    distance,
    opened,
    plan_of,
    slice_of,
    some_tokens,
)

TinyModel = Callable[..., Path]

archs = pytest.mark.parametrize("arch", ATTENTION_ARCHS)


def files_of(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


# ---- the store ------------------------------------------------------------------------------------------------------
@archs
@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
def test_slices_outlive_a_restart(arch: str, kv_type: KVType, tiny: TinyModel, tmp_path: Path) -> None:
    tokens = some_tokens(70)
    first, far = slice_of(tokens[:30]), slice_of(tokens[30:60], start=45)
    with bench(tiny(arch), kv_type, folder=tmp_path) as b:
        before = b.logits(plan_of(first, far, tokens[60:]))
        states = [b.kv_cache.store.get(each.key) for each in (first, far)]
    # Equal slices, not the same ones: nothing but the store connects the two.
    first, far = slice_of(tokens[:30]), slice_of(tokens[30:60], start=45)
    with bench(tiny(arch), kv_type, folder=tmp_path) as b:
        spent = b.prefill(plan_of(first, far, tokens[60:]))
        assert (spent.cached_tokens, spent.encoded_tokens) == (60, 0)
        assert distance(b.kv_cache.context.logits(), before) < 1e-4
        for each, state in zip((first, far), states, strict=True):
            again = b.kv_cache.store.get(each.key)
            assert state is not None and again is not None
            assert np.array_equal(state, again)


def test_what_decides_a_slice_decides_its_key(tiny: TinyModel) -> None:
    tokens = some_tokens(40)
    anchor, other = slice_of(tokens[:20]), slice_of(tokens[1:21])
    assert slice_of(tokens[20:], [slice_of(tokens[:20])]).key == slice_of(tokens[20:], [anchor]).key
    variants = [
        slice_of(tokens[20:]),
        slice_of(tokens[20:], start=1),
        slice_of(tokens[21:]),
        slice_of(tokens[20:], [anchor]),
        slice_of(tokens[20:], [anchor], start=30),
        slice_of(tokens[20:], [other]),
    ]
    keys = []
    settings: tuple[tuple[str, KVType], ...] = (("llama", "f16"), ("llama", "q8_0"), ("qwen2", "f16"))
    for arch, kv_type in settings:
        with opened(tiny(arch), kv_type) as context:
            slices = Slices(arch, context.state_format, every())
            for each in variants:
                again = slices.create(each.context or (), each.tokens, start=each.start)
                # The context is named by its tokens: the model goes into the key once.
                assert again.context_key == each.context_key
                keys.append(again.key)
    assert len(set(keys)) == 3 * len(variants)
    # Numbers of NumPy name what Python's own do.
    whole = variants[4]
    assert SLICES.key(whole.context_key, whole.tokens.astype(np.int64), np.int64(whole.start)) == whole.key


def damaged_plan(b: Bench) -> tuple[Plan, list[Slice]]:
    tokens = some_tokens(80)
    slices = chain(cut(tokens[:70], 20, 45))
    return plan_of(*slices, tokens[70:]), slices


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("which", [(0,), (2,), (1, 2), (0, 1, 2)], ids=str)
def test_damaged_files_are_set_aside_and_encoded_again(
    which: tuple[int, ...], tiny: TinyModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with bench(tiny("llama"), folder=tmp_path) as b:
        plan, slices = damaged_plan(b)
        right = b.logits(plan)
        names = [f"{each.key}.safetensors" for each in slices]
    for i in which:
        flip_a_byte(next(tmp_path.rglob(names[i])))
    with bench(tiny("llama"), folder=tmp_path) as b, caplog.at_level(logging.WARNING, "cpucache.store"):
        plan, _ = damaged_plan(b)
        assert distance(b.logits(plan), right) < 1e-4
    assert {path.stem for path in tmp_path.rglob("*.damaged")} == {Path(names[i]).stem for i in which}
    assert sum("set aside" in message for message in caplog.messages) == len(which)
    # And now all is well again, for the next one.
    caplog.clear()
    with bench(tiny("llama"), folder=tmp_path) as b:
        plan, _ = damaged_plan(b)
        assert b.prefill(plan).encoded_tokens == 0
        assert distance(b.kv_cache.context.logits(), right) < 1e-4
    assert not caplog.messages


def test_a_damaged_context_is_encoded_again_before_what_needs_it(tiny: TinyModel, tmp_path: Path) -> None:
    with bench(tiny("llama"), folder=tmp_path) as b:
        plan, slices = damaged_plan(b)
        right = b.logits(plan)
        names = [f"{each.key}.safetensors" for each in slices]
    flip_a_byte(next(tmp_path.rglob(names[0])))
    next(tmp_path.rglob(names[2])).unlink()
    with bench(tiny("llama"), folder=tmp_path) as b:
        plan, slices = damaged_plan(b)
        assert b.kv_cache.encode(slices).slices >= 2
        assert b.prefill(plan).encoded_tokens == 0
        assert distance(b.kv_cache.context.logits(), right) < 1e-4


@pytest.mark.parametrize("change", ["shorter", "longer", "of another model", "empty"])
@pytest.mark.parametrize("which", [0, 2])
def test_a_state_that_llama_cpp_refuses_is_encoded_again(
    change: str, which: int, tiny: TinyModel, tmp_path: Path
) -> None:
    """The hash is right here: the file was written that way."""
    with bench(tiny("llama", n_layer=2)) as b:
        plan, slices = damaged_plan(b)
        b.logits(plan)
        foreign = b.kv_cache.store.get(slices[which].key)
    with bench(tiny("llama"), folder=tmp_path) as b:
        plan, slices = damaged_plan(b)
        right = b.logits(plan)
        key = slices[which].key
        state = b.kv_cache.store.get(key)
        assert state is not None and foreign is not None
        wrong = {
            "shorter": state[:-64],
            "longer": np.concatenate([state, state[-64:]]),
            "of another model": foreign,
            "empty": state[:0],
        }[change]
        b.kv_cache.reset()
        b.kv_cache.store.discard(key)
        b.kv_cache.store.put(key, wrong.copy(), slices[which].tokens, SliceInfo("", "", "", "", 0, 0, "", "", 0.0))
        assert distance(b.logits(plan), right) < 1e-4
        again = b.kv_cache.store.get(key)
        assert again is not None and np.array_equal(again, state)


def test_a_store_that_keeps_returning_nonsense_is_an_error(
    tiny: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with bench(tiny("llama"), folder=tmp_path) as b:
        plan, _ = damaged_plan(b)
        b.logits(plan)
        b.kv_cache.reset()
        nonsense = np.zeros(100, np.uint8)
        monkeypatch.setattr(Store, "get", lambda self, key: nonsense)
        monkeypatch.setattr(Store, "__contains__", lambda self, key: True)
        with pytest.raises(CpucacheError, match="check the store's disk"):
            b.prefill(plan)


@pytest.mark.parametrize("slices", [0, 1, 2])
def test_a_store_too_small_for_the_prompt_still_answers_right(slices: int, tiny: TinyModel) -> None:
    tokens = some_tokens(200)
    anchor = slice_of(tokens[:30])
    modules = [slice_of(tokens[30 * i : 30 * i + 30], [anchor], start=30 * i) for i in range(1, 6)]
    plans = [
        plan_of(anchor, modules[0], modules[3], tokens[180:190]),
        plan_of(anchor, modules[1], modules[2], modules[4], tokens[180:190]),
        plan_of(modules[4], tokens[190:]),
        plan_of(anchor, *modules, tokens[190:]),
    ]
    with bench(tiny("llama")) as b:
        b.kv_cache.encode([anchor])
        budget = b.kv_cache.store.ram.used * slices
    with bench(tiny("llama"), ram_budget=budget) as b:
        for plan in [*plans, *reversed(plans)]:
            assert distance(b.logits(plan), b.expected(plan)) < TOLERANCE["f32"]
            assert b.kv_cache.store.ram.used <= budget


# ---- Ctrl-C ---------------------------------------------------------------------------------------------------------
def interrupt_half_way(done: int, total: int) -> None:
    if done >= total // 2:
        raise KeyboardInterrupt


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_an_interruption_leaves_all_in_order(arch: str, tiny: TinyModel, tmp_path: Path) -> None:
    tokens = some_tokens(1400)
    anchor, module = chain([tokens[:600], tokens[600:700]])
    small = plan_of(anchor, tokens[1390:])
    large = plan_of(anchor, module, tokens[700:])
    with bench(tiny(arch), folder=tmp_path, n_ctx=1536) as b:
        with pytest.raises(KeyboardInterrupt):
            b.kv_cache.encode([anchor, module], progress=interrupt_half_way)
        b.kv_cache.store.flush()
        assert files_of(tmp_path) == []
        assert distance(b.logits(small), b.expected(small)) < TOLERANCE["f32"]
        with pytest.raises(KeyboardInterrupt):
            b.prefill(large, progress=interrupt_half_way)
        for plan in (small, large, small):
            assert distance(b.logits(plan), b.expected(plan)) < TOLERANCE["f32"]
        b.kv_cache.store.flush()
        assert len(files_of(tmp_path)) == 2


INTERRUPTED = """
import json, os, signal, sys, threading, time
from pathlib import Path
import numpy as np
from cpucache import Engine
from cpucache.reuse import Plan, Span
from cpucache.reuse.way import answer, nothing

tokens = np.array(json.loads(sys.stdin.read()), np.int32)
engine = Engine(sys.argv[1], store=sys.argv[2], n_ctx=len(tokens) + 256, threads=1, kv_type="f32")
kv_cache = engine.kv_cache
seen = []
# Where the tests run in the background of a script, Ctrl-C would be ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
evaluate = engine.context.evaluate

def slowly(*arguments):
    time.sleep(0.1)
    evaluate(*arguments)

# A machine that is busy elsewhere tells of progress late.
engine.context.evaluate = slowly

def progress(done, total):
    seen.append(done)
    if len(seen) == 2:
        threading.Timer(0.005, os.kill, (os.getpid(), signal.SIGINT)).start()

def interrupted(call):
    seen.clear()
    try:
        call()
    except KeyboardInterrupt:
        return True
    return False

def prefill(plan):
    def task(slot, told):
        yield from answer(kv_cache, lambda: plan, nothing, slot=slot, progress=told)
        return engine.context.logits(slot.index).tolist()

    return engine.host.do(task, progress=progress)

def encode(slice_):
    return engine.host.do(lambda slot, told: kv_cache.encode(slot, [slice_], progress=told), progress=progress)

report = {"prefill": interrupted(lambda: prefill(Plan((Span(0, tokens),))))}
report["prefilled"] = seen[-1]
report["encode"] = interrupted(lambda: encode(engine.slices.create((), tokens)))
report["encoded"] = seen[-1]
engine.store.flush()
report["files"] = len(list(Path(sys.argv[2]).rglob("*.safetensors")))
part = engine.slices.create((), tokens[:100])
progress = None
report["logits"] = prefill(Plan((part.span, Span(100, tokens[100:120]))))
print(json.dumps(report))
"""


def test_ctrl_c_stops_an_evaluation_in_the_middle(tiny: TinyModel, tmp_path: Path) -> None:
    tokens = some_tokens(6000)
    path = tiny("llama")
    process = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(path), str(tmp_path)],
        input=json.dumps(tokens.tolist()),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    report = json.loads(process.stdout)
    assert report["prefill"] and report["encode"]
    assert report["prefilled"] < len(tokens) and report["encoded"] < len(tokens)
    assert report["files"] == 0
    with bench(path) as b:
        assert distance(np.array(report["logits"], np.float32), b.full(tokens[:120])) < TOLERANCE["f32"]


# ---- limits ---------------------------------------------------------------------------------------------------------
def test_more_than_the_context_holds_is_refused_and_harms_nothing(tiny: TinyModel, tmp_path: Path) -> None:
    tokens = some_tokens(2000)
    long, short = slice_of(tokens[:600]), slice_of(tokens[600:620])
    following = slice_of(tokens[620:640], [long])
    with bench(tiny("llama"), folder=tmp_path) as b:
        b.kv_cache.encode([long])
    with bench(tiny("llama"), folder=tmp_path, n_ctx=256) as b:
        for plan in (
            plan_of(tokens[:600]),
            plan_of(long, tokens[:10]),
            plan_of(long, following, tokens[:10]),
            plan_of(slice_of(tokens[5:505]), tokens[:10]),
            plan_of(short, tokens[:600]),
        ):
            with pytest.raises(ContextFull, match="context of 256 tokens is full"):
                b.prefill(plan)
            fine = plan_of(short, tokens[:10])
            assert distance(b.logits(fine), b.expected(fine)) < TOLERANCE["f32"]
        # A slice that is only too long for this context is no bad slice.
        assert long.key in b.kv_cache.store
        assert not list(tmp_path.rglob("*.damaged"))


def test_quantized_keys_need_heads_of_a_multiple_of_64(tiny: TinyModel) -> None:
    with Model(tiny("llama", head_dim=32)) as model:
        with pytest.raises(InputError, match=r"heads of size 32 can't have q8_0 keys; use --kv-type f16"):
            Context(model, n_ctx=256, kv_type="q8_0")
        Context(model, n_ctx=256, kv_type="f16").close()


def test_a_recurrent_model_takes_no_slices_but_answers(tiny: TinyModel) -> None:
    tokens = some_tokens(90)
    with opened(tiny("mamba")) as context, opened(tiny("mamba")) as truth:
        kv_cache = Desk(context, Store(None, ram_budget=PLENTY), SLICES)
        b = Bench(kv_cache, truth)
        plan = plan_of(slice_of(tokens[:40]), slice_of(tokens[40:80], start=40), tokens[80:])
        with pytest.raises(ModelError, match="a mamba model keeps a recurrent state"):
            b.prefill(plan)
        with pytest.raises(ModelError, match="use_cache=False"):
            kv_cache.encode(plan.slices)

        def check(plan: Plan, expected: Logits) -> None:
            assert distance(b.logits(plan), expected) < TOLERANCE["f32"]

        fresh = plan.without_reuse()
        check(fresh, b.full(tokens))
        # Going on from what is there, repeating it, and beginning anew within it.
        kv_cache.append(tokens[:5])
        check(plan_of(np.concatenate([tokens, tokens[:9]])), b.full(np.concatenate([tokens, tokens[:9]])))
        check(fresh, b.full(tokens))
        check(fresh, b.full(tokens))
        check(plan_of(tokens[:50]), b.full(tokens[:50]))
