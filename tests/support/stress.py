"""Rough treatment of a store: processes killed, bits flipped, and many processes at once on too little room.

Each kind gives a report of what happened, for a test to judge or a script to print. Children are real processes that
run the engine on a tiny model; they are forked from a clean one that has imported everything, which takes milliseconds.
"""

from __future__ import annotations

import itertools
import json
import logging
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from cpucache.engine import Engine
from cpucache.pml import parse_schema
from cpucache.reuse import Level, reading
from cpucache.store import Store
from cpucache.store.slicefile import Damaged, SliceFiles
from cpucache.store.upkeep import verify

_MOST = 20  # times as many kills as asked for, until enough is saved
_KILLS_PER_STORE = 20  # kills until a crash test starts a new store, so that checking all of it stays quick
_N_CTX = 2048
PLENTY = 1 << 40
"""A budget that nothing here exceeds."""
_TOKENS = 6  # of an answer
_PATIENCE = 300.0  # seconds until a child counts as hanging

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload([__name__])


def schema(name: str, modules: int, topic: int = 0) -> str:
    """PML of a schema. Those of one topic begin with the same modules, whose slices they share."""
    parts = "".join(
        f'<module name="m{i}">Part {i} of {topic}: {"and the rain fell on the fields " * (1 + i % 3)}</module>'
        for i in range(modules)
    )
    return f'<schema name="{name}"><system>You answer about {topic}.{parts}</system></schema>'


def prompt(name: str, *modules: int) -> str:
    """A prompt that imports modules by number."""
    imports = "".join(f"<m{i}/>" for i in modules)
    return f'<prompt schema="{name}">{imports}<user>What is there to know?</user></prompt>'


def engine(model: Path, folder: Path, **settings: Any) -> Engine:
    """An engine as these tests want it: one thread, a small context."""
    return Engine(
        model,
        store=folder,
        **{"threads": 1, "n_ctx": _N_CTX, "ram_budget": 1 << 28, **settings},
    )


def answer(engine: Engine, text: str, fidelity: Level | None = None) -> str:
    """What an engine says to a prompt, greedily. Unless it is exact, that depends on which slices there are."""
    return engine.generate(text, max_tokens=_TOKENS, fidelity=fidelity).text


def room(folder: Path) -> int:
    """Bytes of all files below a folder, those being written included, each once however it is called meanwhile."""
    sizes: dict[int, int] = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                stat = Path(parent, name).stat()
            except FileNotFoundError:
                continue
            sizes[stat.st_ino] = stat.st_size
    return sum(sizes.values())


@contextmanager
def warnings() -> Iterator[list[str]]:
    """What the store warns about meanwhile."""
    heard: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    ear = Ear(logging.WARNING)
    log = logging.getLogger("cpucache.store")
    propagate, log.propagate = log.propagate, False
    log.addHandler(ear)
    try:
        yield heard
    finally:
        log.removeHandler(ear)
        log.propagate = propagate


def _silent() -> None:
    """Keep a child's standard error for tracebacks: llama.cpp and warnings have nothing to say here."""
    logging.getLogger("cpucache").addHandler(logging.NullHandler())


# ---- killed ----------------------------------------------------------------------------------------------------------


@dataclass
class Crashes:
    """What was left by processes that were killed. All but ``lost`` and ``bad`` may have any value."""

    kills: int = 0
    saved: int = 0
    """Slices reported as saved."""
    leftovers: int = 0
    unlisted: int = 0
    unanswered: int = 0
    """Processes killed before they had saved anything."""
    lost: list[str] = field(default_factory=list)
    """Slices reported as saved that are not there."""
    bad: list[str] = field(default_factory=list)
    """What ``verify`` found that is not harmless, and saved slices that fail their check."""


def crash(
    model: Path, folder: Path, kills: int, *, saved: int = 0, budget: int = PLENTY, longest: float = 1.0, seed: int = 0
) -> Crashes:
    """Let processes encode and save, kill each at a random moment of up to ``longest`` seconds, and look at the store.

    Every process goes on in the store that the one before has left. With a small ``budget`` they are killed while they
    evict, too; slices that are not there do not count as lost then. On a slow machine more than ``kills`` are needed
    for at least ``saved`` slices to be saved in all.
    """
    report = Crashes()
    rng = random.Random(seed)
    known: set[str] = set()
    for turn in itertools.count():
        if turn >= kills and report.saved >= saved:
            break
        assert turn < _MOST * kills, "hardly a slice is saved between two kills"
        subfolder = folder / str(turn // _KILLS_PER_STORE)
        if turn % _KILLS_PER_STORE == 0:
            known.clear()
        here, there = _processes.Pipe(duplex=False)
        child = _processes.Process(target=_encode_for_ever, args=(model, subfolder, budget, turn, there))
        child.start()
        there.close()
        here.recv_bytes()  # it lives
        time.sleep(rng.uniform(0, longest))
        child.kill()
        reported = set(_received(here))
        child.join()
        here.close()
        assert child.exitcode == -signal.SIGKILL, f"the process ended by itself: {child.exitcode}"
        known |= reported
        report.kills += 1
        report.saved += len(reported)
        report.unanswered += not reported
        _inspect(subfolder, known, budget, report)
    return report


def _encode_for_ever(model: Path, folder: Path, budget: int, seed: int, reports: Connection) -> None:
    _silent()
    reports.send_bytes(b"ready")
    with engine(model, folder, disk_budget=budget) as running:
        topic = seed * 1001
        while True:
            topic += 1
            layout = running.add_schema(parse_schema(schema("s", 30, topic)))
            # In turn all at once, so that many wait for the disk, and one by one.
            if topic % 2:
                running.encode("s")
                running.store.flush()
                for slice_ in reading(layout, running.slices, _N_CTX - 1):
                    reports.send_bytes(slice_.key.encode())
                continue
            for i in range(30):
                running.encode_for(prompt("s", i))
                running.store.flush()
                for slice_ in running.plan(prompt("s", i)).slices:
                    reports.send_bytes(slice_.key.encode())


def _received(reports: Connection) -> Iterator[str]:
    while True:
        try:
            yield reports.recv_bytes().decode()
        except EOFError:
            return


def _inspect(folder: Path, saved: set[str], budget: int, report: Crashes) -> None:
    files = SliceFiles(folder / "slices")
    for key in saved:
        try:
            if not files.check(key) and budget == PLENTY:
                report.lost.append(key)
        except Damaged as damaged:
            report.bad.append(str(damaged))
    if not folder.exists():
        return
    with warnings() as heard, closing(Store(folder, ram_budget=0, disk_budget=budget)) as store:
        findings = verify(store)
    report.bad += heard
    report.bad += [f"{finding.kind}: {finding.name} {finding.detail}" for finding in findings if not finding.harmless]
    report.leftovers += sum(finding.kind == "leftover" for finding in findings)
    report.unlisted += sum(finding.kind == "unlisted" for finding in findings)


# ---- flipped ---------------------------------------------------------------------------------------------------------


@dataclass
class Flips:
    """What became of flipped bits."""

    tried: int = 0
    caught: int = 0
    """The slice was refused."""
    harmless: int = 0
    """The slice was given out, unchanged: the bit is in what is only told to people."""
    parts: Counter[str] = field(default_factory=Counter)
    """Flips by part of the file."""
    wrong: list[str] = field(default_factory=list)
    """States given out that had changed, answers that differ, and warnings said twice."""


def flip(model: Path, folder: Path, flips: int, *, seed: int = 0) -> Flips:
    """Flip one bit of one slice file at a time, and ask for the slice, then for an answer that needs it."""
    report = Flips()
    rng = random.Random(seed)
    parsed = parse_schema(schema("s", 6))
    question = prompt("s", *range(6))
    with engine(model, folder) as running:
        running.add_schema(parsed)
        expected = answer(running, question)
        plan = running.plan(question)
        keys = sorted({slice_.key for slice_ in plan.slices})
    files = SliceFiles(folder / "slices")
    for _ in range(flips):
        key = rng.choice(keys)
        path = files.path(key)
        original = path.read_bytes()
        state = _state(files, key)
        part, offset = _offset(original, state.nbytes, rng)
        changed = bytearray(original)
        changed[offset] ^= 1 << rng.randrange(8)
        name = f"bit of byte {offset} ({part}) of {key}"
        report.tried += 1
        report.parts[part] += 1

        path.write_bytes(changed)
        with warnings() as heard, closing(Store(folder, ram_budget=0)) as store:
            found = [store.get(key), store.get(key)]
        if any(given is not None and not np.array_equal(given, state) for given in found):
            report.wrong.append(f"{name}: given out")
        elif found[0] is None:
            report.caught += 1
        else:
            report.harmless += 1
        if len(heard) > 1 or (found[0] is None and not heard):
            report.wrong.append(f"{name}: {len(heard)} warnings")

        path.write_bytes(changed)
        with warnings() as heard, engine(model, folder) as running:
            running.add_schema(parsed)
            if answer(running, question) != expected:
                report.wrong.append(f"{name}: another answer")
        if len(heard) > 1:
            report.wrong.append(f"{name}: {len(heard)} warnings of an engine")
        path.write_bytes(original)
    return report


def _state(files: SliceFiles, key: str) -> np.ndarray:
    found = files.get(key)
    assert found is not None
    # A mapping would change with the file.
    state: np.ndarray = found[0].copy()
    return state


def _offset(content: bytes, state: int, rng: random.Random) -> tuple[str, int]:
    """A random byte of a random part: the payload is most of a file, but not where most can go wrong."""
    header = 8 + int.from_bytes(content[:8], "little")
    parts = {"header": (0, header), "tokens": (header, len(content) - state), "payload": (len(content) - state, None)}
    part = rng.choice(list(parts))
    begin, end = parts[part]
    return part, rng.randrange(begin, len(content) if end is None else end)


# ---- hammered --------------------------------------------------------------------------------------------------------


@dataclass
class Hammered:
    """What many processes did to one store."""

    processes: int = 0
    answers: int = 0
    keys: int = 0
    """Different slices."""
    encoded: int = 0
    """Slices encoded, in all."""
    unsaved: int = 0
    """Of these, those for which there was no room."""
    evicted: int = 0
    budget: int = 0
    peak: int = 0
    """Most bytes of files that were seen."""
    largest: int = 0
    """Bytes of the largest file."""
    samples: int = 0
    warnings: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    """Processes that did not end well."""
    wrong: list[str] = field(default_factory=list)
    """Answers that differ from those of a single process."""
    twice: list[str] = field(default_factory=list)
    """Slices encoded again although they had not been evicted."""


def hammer(model: Path, folder: Path, processes: int, *, rounds: int, seed: int = 0) -> Hammered:
    """Let processes ask prompts of overlapping schemas of one store that has room for about a third of their slices."""
    questions = _questions()
    folder.mkdir(parents=True, exist_ok=True)
    with engine(model, folder / "undisturbed") as running:
        _add_schemas(running)
        undisturbed = [answer(running, question, "high") for question in questions]
        running.store.flush()
        assert running.store.files is not None
        sizes = [running.store.files.path(key).stat().st_size for key in running.store.files]
    report = Hammered(processes, budget=sum(sizes) // 3, largest=max(sizes))
    shared, log = folder / "shared", folder / "log"
    children = [
        _processes.Process(target=_ask, args=(model, shared, log, report.budget, rounds, seed + i))
        for i in range(processes)
    ]
    deadline = time.monotonic() + _PATIENCE
    for child in children:
        child.start()
    while any(child.is_alive() for child in children) and time.monotonic() < deadline:
        # Files come and go while they are counted: what is too much must be so twice in a row.
        seen = room(shared / "slices")
        if seen > report.peak:
            seen = min(seen, room(shared / "slices"))
        report.peak = max(report.peak, seen)
        report.samples += 1
        time.sleep(0.002)
    for child in children:
        if child.is_alive():
            child.kill()
        child.join()
        if child.exitcode:
            report.failed.append(f"exit status {child.exitcode}")

    events: dict[str, Counter[str]] = {name: Counter() for name in ("encode", "unsaved", "drop", "warning", "answer")}
    for line in log.read_text(encoding="utf-8").splitlines():
        event, what = json.loads(line)
        events[event][what if isinstance(what, str) else json.dumps(what)] += 1
    for what, count in events["answer"].items():
        number, text = json.loads(what)
        report.answers += count
        if text != undisturbed[number]:
            report.wrong.append(f"{questions[number]}: {text!r} instead of {undisturbed[number]!r}")
    report.warnings = list(events["warning"])
    report.keys = len(events["encode"])
    report.encoded, report.unsaved = events["encode"].total(), events["unsaved"].total()
    report.evicted = events["drop"].total()
    for key, count in events["encode"].items():
        allowed = 1 + events["drop"][key] + events["unsaved"][key]
        if count > allowed:
            report.twice.append(f"{key}: encoded {count} times, could be missed {allowed} times")
    return report


_SHARED = (8, 12, 16)  # modules of schemas of one topic


def _add_schemas(running: Engine) -> None:
    for topic in range(2):
        for size in _SHARED:
            running.add_schema(parse_schema(schema(f"t{topic}-{size}", size, topic)))


def _questions() -> list[str]:
    rng = random.Random(1)
    return [
        prompt(f"t{topic}-{size}", *sorted(rng.sample(range(size), 3)))
        for topic in range(2)
        for size in _SHARED
        for _ in range(8)
    ]


def _ask(model: Path, folder: Path, log: Path, budget: int, rounds: int, seed: int) -> None:
    """A process that asks prompts, and writes down what it says, what it encodes and what it evicts."""
    questions = _questions()
    rng = random.Random(seed)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(event: str, what: object) -> None:
        os.write(out, json.dumps([event, what]).encode() + b"\n")  # lines of several processes do not mix

    with warnings() as heard:
        # Hardly any RAM: what is needed again comes from the disk, unless somebody has evicted it.
        with engine(model, folder, disk_budget=budget, ram_budget=1) as running:
            _add_schemas(running)
            _listen(running.store, note)
            for _ in range(rounds):
                number = rng.randrange(len(questions))
                note("answer", [number, answer(running, questions[number], "high")])
        for warning in heard:
            note("warning", warning)


def _listen(store: Store, note: Any) -> None:
    """Have everything noted that changes which slices there are."""
    assert store.files is not None
    assert store.index is not None
    files = store.files
    put, drop, reserve = store.put, files.drop, store.index.reserve

    def noted_put(key: str, *rest: Any) -> None:
        note("encode", key)
        put(key, *rest)

    def noted_drop(key: str) -> None:
        if key in files:
            note("drop", key)
        drop(key)

    def noted_reserve(key: str, *rest: Any, **named: Any) -> bool:
        done: bool = reserve(key, *rest, **named)
        if not done:
            note("unsaved", key)
        return done

    for part, name, noted in (
        (store, "put", noted_put),
        (files, "drop", noted_drop),
        (store.index, "reserve", noted_reserve),
    ):
        setattr(part, name, noted)
