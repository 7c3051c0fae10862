"""The store: slices by key, in RAM and on disk."""

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
from cpucache.store.ram import RAM, Bytes
from cpucache.store.recent import Recent
from cpucache.store.slicefile import Damaged, Identity, Ids, SliceFiles, SliceInfo, file_size
from cpucache.store.startup import default_budget, open_index
from cpucache.store.writer import Writer

_log = logging.getLogger("cpucache.store")
# Bytes of states that may wait for the disk: without a limit they would grow while the disk is slower than evaluation.
WAITING = 256 << 20
_PAGE = 4096  # bytes
_CHECKED = 20_000  # files remembered as checked against their hashes
_NOTE_EVERY = 5.0  # seconds between updates of the index with what was used
_Job: TypeAlias = "tuple[Bytes, Ids, SliceInfo]"


class Packing(Protocol):
    """Packs states into fewer bytes, as ``cpucache.runtime.packing.Packing`` does."""

    def pack(self, state: Bytes) -> Bytes:
        """Returns a state packed."""

    def unpack(self, packed: Bytes) -> Bytes:
        """Returns the state, or an approximation of it. Raises ``ValueError`` for bytes that are no state."""


def default_home() -> Path:
    """``$CPUCACHE_HOME``, else the platform's user cache folder."""
    named = os.environ.get("CPUCACHE_HOME")
    return Path(named).expanduser() if named else platformdirs.user_cache_path("cpucache")


class Store:
    """Slices by key, in RAM and in files. May be used from several threads; several processes may share a folder.

    A background thread writes slices. ``flush`` waits for it; ``close``, also called at the end of a ``with``, ends it.

    The disk budget covers all slices in the folder; beyond it the least valuable are evicted (``Index.reserve``). A
    process whose budget is smaller than that of others adds nothing beyond its budget and evicts nothing. ``kept``
    tells how many of some slices are on disk.

    Disk errors never stop inference. The first is logged as a warning (logger ``cpucache.store``); slices that can't be
    written stay in RAM only, and slices are still read from a folder that can't be written. A damaged file is set aside
    and its slice counts as missing. ``writable`` tells whether slices are written to disk.

    Args:
        home: Folder of the store; ``None`` keeps slices in RAM only.
        ram_budget: Bytes of states in RAM.
        disk_budget: Bytes of slice files in the folder; ``None`` for ``default_budget``.
        paranoid: Checks a file's hash each time the file is mapped, not only the first time.
        patience: Seconds to wait for a slice that another process evaluates before evaluating it here too.
        packing: Packs the states on disk.
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
        self._why: Exception | None = None  # set: the folder can only be read, and this is why
        self._claims = Claims(home / "claims" if home else None)
        self._lock = threading.Lock()
        self._using: Counter[str] = Counter()
        self.ram = RAM(ram_budget, needed=self._using)
        self._reader: ThreadPoolExecutor | None = None
        self._uses: Counter[str] = Counter()
        self._misses = 0
        self._noted = time.monotonic()
        self._checked: dict[str, Identity] = {}
        self._useless: set[str] = set()  # slices whose files can neither be used nor be set aside
        self._writer: Writer[_Job] = Writer(self._write, self._note, limit=WAITING)
        # A slice that is neither in RAM nor waiting for the disk is in the index, or lost.
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
        """Combinations that were asked and lack exact slices."""

    # -- lifetime ----------------------------------------------------------------------------------------------------
    def flush(self) -> None:
        """Waits until every slice that was put is on disk or has failed to be written."""
        self._writer.flush()
        self._note()

    def close(self) -> None:
        """Writes what is waiting, closes the folder's files, and drops every state in RAM."""
        self._closing = True
        if self._reader is not None:
            self._reader.shutdown(cancel_futures=True)
            self._reader = None
        self._writer.close()
        self._closing = False
        self._note()
        self.asked.close()
        # Mapped states hold file descriptors, and a reference cycle with the writer delays freeing the store itself.
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
        """Returns the state of a slice, or ``None`` where there is none; counts as a use.

        The state comes from RAM, from the states that wait to be written, or from a file, which is then mapped.
        """
        state = self.ram.get(key)
        if state is None:
            state = self._fetch(key)
        if state is not None:
            with self._lock:
                self._uses[key] += 1
                due = time.monotonic() - self._noted > _NOTE_EVERY
            if due:
                self._writer.wake()
        return state

    def variants(self, contents: Iterable[str]) -> dict[str, list[tuple[str, SliceInfo]]]:
        """Key and description of the slices with each of these content keys."""
        wanted = set(contents)
        found: dict[str, dict[str, SliceInfo]] = {content: {} for content in wanted}
        if self.index is not None:
            try:
                for key, info in self.index.variants(wanted):
                    # The file may be unusable, or a user may have deleted it.
                    if key in self:
                        found[info.content][key] = info
            except sqlite3.Error as error:
                self._trouble(error)
        for content in wanted:
            found[content].update(self._recent.of(content, self.__contains__))
        return {content: list(slices.items()) for content, slices in found.items()}

    def sizes_after(self, context: str) -> set[int]:
        """Lengths, in tokens, of the slices evaluated in a context, given by its key; some may have been evicted."""
        sizes: set[int] = set()
        if self.index is not None:
            try:
                sizes = self.index.sizes_after(context)
            except sqlite3.Error as error:
                self._trouble(error)
        return sizes | self._recent.sizes_after(context)

    def speed(self, fingerprint: str) -> float | None:
        """Tokens per second at which the slices of a model were evaluated; ``None`` when that is not known."""
        if self.index is not None:
            try:
                return self.index.speed(fingerprint)
            except sqlite3.Error as error:
                self._trouble(error)
        return None

    def _fetch(self, key: str) -> Bytes | None:
        """Loads a slice into RAM and returns its state; ``None`` where there is none."""
        waiting = self._writer.get(key)
        state = waiting[0] if waiting else self._mapped(key)
        if state is not None:
            self.ram.put(key, state)
        return state

    def _mapped(self, key: str) -> Bytes | None:
        """State from a slice's file; a file that can't be used is set aside or never read again."""
        if self.files is None or key in self._useless:
            return None
        try:
            found = self.files.get(key, unless=None if self.paranoid else self._checked.get(key))
        except Damaged as damaged:
            _log.warning("%s; it is set aside and encoded again", damaged)
            self.discard(key, aside=True)
            if key in self:
                self._useless.add(key)
            return None
        except OSError as error:
            _log.warning("can't read a slice (%s); it is encoded again", error)
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
            _log.warning("%s: %s; it is set aside and encoded again", self.files.path(key), error)
            self.discard(key, aside=True)
            return None

    def put(self, key: str, state: Bytes, tokens: Ids, info: SliceInfo) -> None:
        """Keeps a slice: in RAM at once, in a file later. Blocks while too many bytes wait for the disk.

        Args:
            key: Key of the slice.
            state: Bytes of the state; must not change afterwards.
            tokens: Token ids, ``[n_tokens]``.
            info: Description of the slice.
        """
        self.ram.put(key, state)
        self._recent.add(key, info)
        if self.writable:
            self._writer.put(key, (state, tokens, info), state.nbytes)
        elif self._why is not None:
            self._trouble(self._why)

    def note_asked(self, fingerprint: str, state_format: str, schema: str, parts: list[Part]) -> None:
        """Calls ``Asked.note``; a disk error is logged and not raised."""
        try:
            self.asked.note(fingerprint, state_format, schema, parts)
        except sqlite3.Error as error:
            self._trouble(error)

    def know(self, key: str, info: SliceInfo) -> None:
        """Lets an existing slice also be found by the content key in ``info``, in this process only."""
        self._recent.know(key, info)

    def size(self, key: str) -> int:
        """Bytes of a slice as it is held: of its state in RAM, else of its file; 0 where there is none."""
        state = self.ram.get(key)
        if state is None and (waiting := self._writer.get(key)):
            state = waiting[0]
        try:
            found = None if state is not None or self.files is None else self.files.info(key)
        except (OSError, Damaged):
            found = None
        return found[1] if found else 0 if state is None else state.nbytes

    def discard(self, key: str, *, aside: bool = False) -> None:
        """Removes a slice; ``aside`` renames its file for inspection instead of deleting it."""
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
        """Moves a slice's file in from another folder of the same disk. False: it is here already, or has no room."""
        found = staged.info(key)
        if self.files is None or self.index is None or found is None or key in self.files:
            return False
        files = self.files
        return self._enter(key, *found, lambda: staged.path(key).replace(files.prepared(key)))

    def kept(self, keys: Iterable[str]) -> Kept:
        """Counts how many of some slices are on disk, after ``flush``."""
        self.flush()
        keys = list(keys)
        if self.index is not None:
            try:
                return self.index.kept(keys)
            except sqlite3.Error as error:
                self._trouble(error)
        return Kept(0, 0, len(keys), 0)

    def account(self) -> Account:
        """The account of the store at the moment."""
        with self._lock:
            hits, misses = sum(self._uses.values()), self._misses  # not in the index yet
        account = Account(len(self.ram), self.ram.used, self.ram.budget, hits=hits, misses=misses)
        if self.index is not None:
            try:
                return account.with_disk(self.index.count(), self.disk_budget, self.index.totals())
            except sqlite3.Error as error:
                self._trouble(error)
        return account

    def missed(self, count: int) -> None:
        """Counts ``count`` requested slices that the store lacked, and that are evaluated here."""
        with self._lock:
            self._misses += count

    def hold(self, keys: Iterable[str]) -> None:
        """Keeps this process from evicting these slices, until ``let_go`` was called as often as ``hold``."""
        with self._lock:
            self._using.update(keys)

    def let_go(self, keys: Iterable[str]) -> None:
        """Ends one ``hold`` of these slices."""
        with self._lock:
            self._using -= Counter(keys)

    @contextmanager
    def using(self, keys: Iterable[str]) -> Iterator[None]:
        """Holds slices during a block."""
        held = list(keys)
        self.hold(held)
        try:
            yield
        finally:
            self.let_go(held)

    def prefetch(self, keys: Iterable[str]) -> Future[None]:
        """Reads slices from disk into RAM in the background, hashes checked. Stops when ``close`` is called."""
        wanted = [key for key in keys if key not in self.ram]

        def read() -> None:
            for key in wanted:
                if self._closing:
                    break
                state = self._fetch(key) if key not in self.ram else None
                if state is not None:
                    # A file that was checked before is only mapped: reading a byte of each page loads the pages.
                    state[::_PAGE].max(initial=0)

        with self._lock:
            if self._reader is None:
                self._reader = ThreadPoolExecutor(1, thread_name_prefix="cpucache-reader")
            return self._reader.submit(read)

    def paused(self) -> AbstractContextManager[None]:
        """Pauses writing during a block, so that saving never delays an answer."""
        return self._writer.paused()

    # -- one process evaluates a slice, the others wait --------------------------------------------------------------
    def claim(self, key: str) -> bool:
        """Claims a slice for evaluation here. False: it exists already, or another process has claimed it."""
        if key in self:
            return False
        if not self._claims.take(key):
            _log.debug("%.8s is being encoded by another process", key)
            return False
        if key in self:
            self._claims.release([key])
            return False
        return True

    def release(self, keys: Iterable[str]) -> None:
        """Releases claims. Those of slices that wait to be written are released once these are on disk."""
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
        self._enter(key, info, file_size(key, info, packed.nbytes), put)

    def _enter(self, key: str, info: SliceInfo, size: int, bring: Callable[[], object]) -> bool:
        """Enters a slice into the index; ``bring`` writes or moves its file. False: there is no room."""
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
        """Records uses and misses since the last call in the index."""
        with self._lock:
            uses, self._uses = self._uses, Counter()
            misses, self._misses = self._misses, 0
            self._noted = time.monotonic()
        if self.index is None or self.index.read_only or self.files is None or not (uses or misses):
            return
        try:
            for key in self.index.touch(uses, misses=misses):
                # A file without a row: its writer was killed, or a power cut lost the row.
                known = self.files.info(key)
                if known is not None:
                    self.index.add_all([(key, *known)])
        except (OSError, sqlite3.Error, Damaged) as error:
            self._trouble(error)

    def _trouble(self, error: Exception) -> None:
        """Logs the first disk error as a warning."""
        if not self._warned:
            _log.warning("can't save slices in %s (%s); they are kept in memory only", self.home, error)
            self._warned = True
