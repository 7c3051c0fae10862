"""The store: RAM over disk, by key."""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Protocol, TypeAlias

import platformdirs

from cpucache.store.account import Account
from cpucache.store.asked import Asked, Part
from cpucache.store.claims import Claims
from cpucache.store.index import Index, Kept
from cpucache.store.opening import default_budget, open_index
from cpucache.store.ram import RAM, Bytes
from cpucache.store.recent import Recent
from cpucache.store.slicefile import Damaged, Identity, Ids, SliceFiles, SliceInfo
from cpucache.store.writer import Writer

_log = logging.getLogger("cpucache.store")
# States that may wait for the disk. More would only grow while the disk is slower than evaluation.
WAITING = 256 << 20
_PAGE = 4096  # bytes
_CHECKED = 20_000  # files whose hashes are known to be right
_NOTE_EVERY = 5.0  # seconds between entries of what was used
_Job: TypeAlias = "tuple[Bytes, Ids, SliceInfo]"


class Packing(Protocol):
    """What makes states smaller, such as ``cpucache.runtime.packing.Packing``."""

    def pack(self, state: Bytes) -> Bytes:
        """A state in fewer bytes."""

    def unpack(self, packed: Bytes) -> Bytes:
        """The state again, or nearly. Raises ``ValueError`` for bytes that are no state."""


def default_home() -> Path:
    """``$CPUCACHE_HOME``, else the platform's user cache folder."""
    named = os.environ.get("CPUCACHE_HOME")
    return Path(named).expanduser() if named else platformdirs.user_cache_path("cpucache")


class Store:
    """Slices by key: in RAM up to ``ram_budget`` bytes, and in files below ``home`` up to ``disk_budget``.

    ``home=None`` keeps to RAM. Slices are written by a thread in the background; ``flush`` waits for it, ``close``
    (also at the end of a ``with``) does so and ends it. Several processes may share a folder.

    The disk budget is one of all slices in the folder. When it is reached, what is worth least leaves. Without a
    ``disk_budget`` it is a quarter of what is free or taken by slices, or the largest that another process was given
    for this folder, if that is more. A process whose ``disk_budget`` is smaller than what others kept to adds nothing
    beyond it and evicts nothing: what others keep stays. ``kept`` tells what of some slices is on disk.

    Trouble with the disk never stops inference: it is reported once, as a warning of the logger ``cpucache.store``, and
    what can't be written is kept in RAM alone; from a folder that can't be written, slices are read. A damaged file is
    set aside and counts as missing. ``paranoid`` checks the hash of a file each time that it is mapped, not only the
    first. ``patience`` is how many seconds to wait for a slice that another process is making, before making it too.
    ``packing`` makes what lies on disk smaller.

    ``writable`` tells whether slices still go to the disk. May be used from several threads.
    """

    def __init__(
        self,
        home: Path | None,
        *,
        ram_budget: int,
        disk_budget: int | None = None,
        paranoid: bool = False,
        patience: float = 300.0,
        packing: Packing | None = None,
    ) -> None:
        self.home = home
        self.paranoid = paranoid
        self.patience = patience
        self.files = SliceFiles(home / "slices") if home else None
        self.index: Index | None = None
        self.disk_budget = 0
        self._packing = packing
        self._given = disk_budget is not None
        self._why: Exception | None = None  # why the folder can only be read
        self._claims = Claims(home / "claims" if home else None)
        self._lock = threading.Lock()
        self._using: Counter[str] = Counter()
        self.ram = RAM(ram_budget, needed=self._using)
        self._reader: ThreadPoolExecutor | None = None
        self._uses: Counter[str] = Counter()
        self._misses = 0
        self._noted = time.monotonic()
        self._checked: dict[str, Identity] = {}
        self._useless: set[str] = set()  # slices whose files can neither be used nor be taken away
        self._writer: Writer[_Job] = Writer(self._write, self._note, limit=WAITING)
        # What is in neither memory nor on its way to the disk the index knows, or nobody.
        self._recent = Recent(lambda key: key in self.ram or key in self._writer)
        self.writable = home is not None
        self._warned = False
        self._closing = False
        asked: Path | None = None
        if home is not None:
            try:
                self.index, self._why = open_index(home)
                self.writable = self._why is None
                asked = home / "asked.sqlite" if self.writable else None
                self.disk_budget = default_budget(home, self.index) if disk_budget is None else disk_budget
            except (OSError, sqlite3.Error) as error:
                self.writable = False
                self._trouble(error)
        try:
            self.asked = Asked(asked)
        except sqlite3.Error as error:
            self._trouble(error)
            self.asked = Asked(None)
        """What was asked and is not exact yet."""

    # -- lifetime ----------------------------------------------------------------------------------------------------
    def flush(self) -> None:
        """Wait until everything that was put is on disk (or can't be)."""
        self._writer.flush()
        self._note()

    def close(self) -> None:
        """Write what is waiting and let go of the folder, and of every state in RAM."""
        self._closing = True
        if self._reader is not None:
            self._reader.shutdown(cancel_futures=True)
            self._reader = None
        self._writer.close()
        self._closing = False
        self._note()
        self.asked.close()
        # Mapped states hold descriptors, and the store itself lies in a cycle with its writer.
        self.ram.clear()
        if self.index is not None:
            self.index.close()
            self.index = None

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- slices ------------------------------------------------------------------------------------------------------
    def __contains__(self, key: str) -> bool:
        if key in self.ram or key in self._writer:
            return True
        try:
            return self.files is not None and key not in self._useless and key in self.files
        except OSError as error:
            self._trouble(error)
            return False

    def get(self, key: str) -> Bytes | None:
        """The state of a slice: from RAM, from what waits to be written, else mapped from its file. ``None``: none."""
        state = self.ram.get(key)
        if state is None:
            state = self._fetch(key)
        if state is not None:
            with self._lock:
                self._uses[key] += 1
                due = time.monotonic() - self._noted > _NOTE_EVERY
            if due:
                self._writer.poke()
        return state

    def variants(self, contents: Iterable[str]) -> dict[str, list[tuple[str, SliceInfo]]]:
        """Key and account of the slices there are of some tokens, by their content keys."""
        wanted = set(contents)
        found: dict[str, dict[str, SliceInfo]] = {content: {} for content in wanted}
        if self.index is not None:
            try:
                for key, info in self.index.variants(wanted):
                    # The file may be unusable, or deleted by hand.
                    if key in self:
                        found[info.content][key] = info
            except sqlite3.Error as error:
                self._trouble(error)
        for content in wanted:
            found[content].update(self._recent.of(content, self.__contains__))
        return {content: list(slices.items()) for content, slices in found.items()}

    def sizes_behind(self, context: str) -> set[int]:
        """How many tokens the slices have, or had, that were evaluated in a context, given by its key."""
        sizes: set[int] = set()
        if self.index is not None:
            try:
                sizes = self.index.sizes_behind(context)
            except sqlite3.Error as error:
                self._trouble(error)
        return sizes | self._recent.sizes_behind(context)

    def speed(self, fingerprint: str) -> float | None:
        """Tokens a second at which the slices of a model were evaluated; ``None`` when that is not known."""
        return self.index.speed(fingerprint) if self.index is not None else None

    def _fetch(self, key: str) -> Bytes | None:
        """Bring a slice into RAM."""
        waiting = self._writer.get(key)
        state = waiting[0] if waiting else self._mapped(key)
        if state is not None:
            self.ram.put(key, state)
        return state

    def _mapped(self, key: str) -> Bytes | None:
        if self.files is None or key in self._useless:
            return None
        try:
            found = self.files.get(key, unless=None if self.paranoid else self._checked.get(key))
        except Damaged as damaged:
            _log.warning("%s; it is set aside and made again", damaged)
            self.discard(key, aside=True)
            if key in self:
                self._useless.add(key)
            return None
        except OSError as error:
            _log.warning("can't read a slice (%s); it is made again", error)
            self._useless.add(key)
            return None
        if found is None:
            return None
        if len(self._checked) >= _CHECKED:
            self._checked.clear()
        state, self._checked[key] = found
        try:
            return state if self._packing is None else self._packing.unpack(state)
        except ValueError as error:
            _log.warning("%s: %s; it is set aside and made again", self.files.path(key), error)
            self.discard(key, aside=True)
            return None

    def put(self, key: str, state: Bytes, tokens: Ids, info: SliceInfo) -> None:
        """Keep a slice: at once in RAM, soon in a file. Waits only when the disk is far behind."""
        self.ram.put(key, state)
        self._recent.add(key, info)
        if self.writable:
            self._writer.put(key, (state, tokens, info), state.nbytes)
        elif self._why is not None:
            self._trouble(self._why)

    def note_asked(self, fingerprint: str, state_format: str, schema: str, parts: list[Part]) -> None:
        """Note what was asked and is not exact yet; trouble with the disk is reported once."""
        try:
            self.asked.note(fingerprint, state_format, schema, parts)
        except sqlite3.Error as error:
            self._trouble(error)

    def know(self, key: str, info: SliceInfo) -> None:
        """Let a slice that is there be found by the content key in ``info`` as well, as long as this process runs."""
        self._recent.know(key, info)

    def size(self, key: str) -> int:
        """Bytes of a slice; 0 for one that is not there."""
        state = self.ram.get(key)
        if state is None and (waiting := self._writer.get(key)):
            state = waiting[0]
        try:
            found = None if state is not None or self.files is None else self.files.info(key)
        except (OSError, Damaged):
            found = None
        return found[1] if found else 0 if state is None else state.nbytes

    def discard(self, key: str, *, aside: bool = False) -> None:
        """Forget a slice; ``aside`` keeps its file under another name for inspection."""
        self.ram.drop(key)
        self._writer.drop(key)
        self._claims.release([key])
        self._checked.pop(key, None)
        try:
            if self.files is not None:
                if aside:
                    self.files.set_aside(key)
                else:
                    self.files.drop(key)
            if self.index is not None:
                self.index.remove([key])
        except (OSError, sqlite3.Error) as error:
            self._trouble(error)

    def adopt(self, key: str, staged: SliceFiles) -> bool:
        """Take a slice's file over from another folder of the same disk. False: it is here already, or has no room."""
        found = staged.info(key)
        if self.files is None or self.index is None or found is None or key in self.files:
            return False
        files = self.files
        return self._enter(key, *found, lambda: staged.path(key).replace(files.prepared(key)))

    def kept(self, keys: Iterable[str]) -> Kept:
        """How many of some slices are on disk, once all that was put is (``flush``)."""
        self.flush()
        keys = list(keys)
        return Kept(0, 0, len(keys), 0) if self.index is None else self.index.kept(keys)

    def account(self) -> Account:
        """What the store holds at the moment, and what that has been good for."""
        with self._lock:
            hits, misses = sum(self._uses.values()), self._misses  # what is not in the index yet
        account = Account(len(self.ram), self.ram.used, self.ram.budget, hits=hits, misses=misses)
        if self.index is not None:
            try:
                return account.with_disk(self.index.count(), self.disk_budget, self.index.totals())
            except sqlite3.Error as error:
                self._trouble(error)
        return account

    def missed(self, count: int) -> None:
        """Note that so many slices were asked for that were not there."""
        with self._lock:
            self._misses += count

    def hold(self, keys: Iterable[str]) -> None:
        """Evict none of these slices, here or on disk by this process, until they are let go as often as held."""
        with self._lock:
            self._using.update(keys)

    def let_go(self, keys: Iterable[str]) -> None:
        """They may be evicted again, as far as nobody else holds them."""
        with self._lock:
            self._using -= Counter(keys)

    @contextmanager
    def using(self, keys: Iterable[str]) -> Iterator[None]:
        """Hold slices meanwhile."""
        held = list(keys)
        self.hold(held)
        try:
            yield
        finally:
            self.let_go(held)

    def prefetch(self, keys: Iterable[str]) -> Future[None]:
        """Read slices from disk into RAM, checked, in the background. Stops when ``close`` is called."""
        wanted = [key for key in keys if key not in self.ram]

        def read() -> None:
            for key in wanted:
                if self._closing:
                    break
                state = self._fetch(key) if key not in self.ram else None
                if state is not None:
                    # A file that was checked before is only mapped: reading a byte of each page brings it in.
                    state[::_PAGE].max(initial=0)

        with self._lock:
            if self._reader is None:
                self._reader = ThreadPoolExecutor(1, thread_name_prefix="cpucache-reader")
            return self._reader.submit(read)

    def quiet(self) -> AbstractContextManager[None]:
        """While an answer is on its way, nothing is written, so that saving never delays it."""
        return self._writer.quiet()

    # -- one process makes it, the others wait -----------------------------------------------------------------------
    def claim(self, key: str) -> bool:
        """Say that this process is going to make a slice. False: it is there already, or somebody else is at it."""
        if key in self:
            return False
        if not self._claims.take(key):
            _log.debug("%.8s is being made by another process", key)
            return False
        if key in self:
            self._claims.release([key])
            return False
        return True

    def release(self, keys: Iterable[str]) -> None:
        """Claimed slices will not be made after all. Those that were put are given back when they are on disk."""
        self._claims.release(key for key in keys if key not in self._writer)

    # -- in the background -------------------------------------------------------------------------------------------
    def _write(self, key: str, job: _Job) -> None:
        state, tokens, info = job
        try:
            self._write_file(key, state, tokens, info)
        except (OSError, sqlite3.Error) as error:
            self.writable = False
            self._trouble(error)
        finally:
            self._claims.release([key])

    def _write_file(self, key: str, state: Bytes, tokens: Ids, info: SliceInfo) -> None:
        if self.files is None or self.index is None or not self.writable or key in self.files:
            return
        packed = state if self._packing is None else self._packing.pack(state)
        put = partial(self.files.put, key, packed, tokens, info, self._writer.give_way)
        self._enter(key, info, packed.nbytes, put)

    def _enter(self, key: str, info: SliceInfo, size: int, bring: Callable[[], object]) -> bool:
        """Have the file of a slice brought to its place, and enter it into the index. False: there is no room."""
        assert self.files is not None and self.index is not None
        with self._lock:
            keep = set(self._using)
        if not self.index.reserve(key, info, size, self.disk_budget, keep, self.files.drop, given=self._given):
            return False
        try:
            bring()
        except BaseException:
            self.index.remove([key])
            raise
        self.index.commit(key)
        return True

    def _note(self) -> None:
        """Enter into the index what was used since the last time."""
        with self._lock:
            uses, self._uses = self._uses, Counter()
            misses, self._misses = self._misses, 0
            self._noted = time.monotonic()
        if self.index is None or self.index.read_only or self.files is None or not (uses or misses):
            return
        try:
            for key in self.index.touch(uses, misses=misses):
                # A file that is not in the account: written by a process that was killed before it could say so.
                known = self.files.info(key)
                if known is not None:
                    self.index.add_all([(key, *known)])
        except (OSError, sqlite3.Error, Damaged) as error:
            self._trouble(error)

    def _trouble(self, error: Exception) -> None:
        if not self._warned:
            _log.warning("can't keep slices in %s (%s); going on from memory", self.home, error)
            self._warned = True
