"""Sources of models: each source is a list of parts, and each part is one file that a client program fetches.

A part has the command that fetches its file into a folder, and reads the model's bytes from that file. A new kind of
source is a class here and its name in ``KINDS``.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
import tarfile
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, ClassVar

from cpucache.errors import CpucacheError, ModelError

_HUB_SCRIPT = (
    "import sys; from huggingface_hub import hf_hub_download as get; "
    "get(sys.argv[1], sys.argv[2], revision=sys.argv[3], local_dir=sys.argv[4])"
)


class Part(ABC):
    """One file to fetch. The file, or one member of it, is a contiguous range of the model's bytes."""

    is_archive: ClassVar[bool] = True
    """Whether the bytes are a member inside the fetched file, rather than the file itself."""
    resumes: ClassVar[bool] = False
    """Whether the client resumes an interrupted download from the files in its folder."""

    @property
    @abstractmethod
    def label(self) -> str:
        """Name for messages; together with the class, unique among parts."""

    @property
    def staged_name(self) -> str:
        """Name of the fetched file in the staging folder."""
        return re.sub(r"[^\w.@=-]+", "_", f"{type(self).__name__}-{self.label}")

    @abstractmethod
    def command(self, folder: Path) -> list[str]:
        """Command that fetches the file into ``folder``. Raises ``CpucacheError`` when its program is missing."""

    def environment(self, work: Path) -> dict[str, str]:
        """Environment variables to set for the command; ``work`` is its temporary folder."""
        return dict.fromkeys(("TMPDIR", "TEMP", "TMP"), os.fspath(work))

    @abstractmethod
    def open(self, path: Path) -> AbstractContextManager[IO[bytes]]:
        """Opens the model's bytes in the fetched file ``path`` as a stream."""

    def chunks(self, path: Path) -> Iterator[bytes]:
        """The model's bytes in the fetched file ``path``. Raises ``CpucacheError`` for a damaged or wrong archive."""
        try:
            with self.open(path) as stream:
                while chunk := stream.read(1 << 20):
                    yield chunk
        except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, KeyError) as error:
            raise CpucacheError(f"{self.label} is not what the catalogue describes: {error}") from error


@dataclass(frozen=True)
class PipPart(Part):
    """A file inside a wheel of the configured Python package index."""

    package: str
    version: str
    member: str

    @property
    def label(self) -> str:
        return f"{self.package}=={self.version}"

    def command(self, folder: Path) -> list[str]:
        if importlib.util.find_spec("pip") is None:
            raise CpucacheError("pip is not installed in this Python: run `python -m ensurepip`")
        # Wheels only: nothing from the index is built or run. No cache: it would double the disk space needed.
        options = (
            "--no-deps --only-binary=:all: --no-cache-dir --no-input --progress-bar=off --disable-pip-version-check"
        )
        return [sys.executable, "-m", "pip", "download", *options.split(), "-d", os.fspath(folder), self.label]

    @contextmanager
    def open(self, path: Path) -> Iterator[IO[bytes]]:
        with zipfile.ZipFile(path) as archive, archive.open(self.member) as stream:
            yield stream


@dataclass(frozen=True)
class NpmPart(Part):
    """A file inside a package of the configured npm registry. ``member`` starts with ``package/``."""

    package: str
    version: str
    member: str

    @property
    def label(self) -> str:
        return f"{self.package}@{self.version}"

    def command(self, folder: Path) -> list[str]:
        npm = shutil.which("npm")
        if npm is None:
            raise CpucacheError("npm is not installed: install Node.js")
        return [npm, "pack", "--ignore-scripts", "--pack-destination", os.fspath(folder), self.label]

    def environment(self, work: Path) -> dict[str, str]:
        # npm's own cache would keep a second copy; in `work`, the cache is deleted with the folder.
        cache = {"npm_config_cache": os.fspath(work / "npm"), "npm_config_logs_max": "0"}
        return {**super().environment(work), **cache, "npm_config_loglevel": "error", "npm_config_progress": "false"}

    @contextmanager
    def open(self, path: Path) -> Iterator[IO[bytes]]:
        with tarfile.open(path, "r|gz") as archive:
            for entry in archive:
                stream = archive.extractfile(entry) if entry.name == self.member else None
                if stream is not None:
                    with stream:
                        yield stream
                    return
        raise KeyError(f"there is no {self.member} in it")


@dataclass(frozen=True)
class HubPart(Part):
    """A file of a repository on the Hugging Face hub."""

    repo: str
    file: str
    revision: str = "main"

    is_archive: ClassVar[bool] = False
    resumes: ClassVar[bool] = True

    @classmethod
    def parse(cls, name: str) -> HubPart:
        """Parses ``hf:org/repo/path/to/file.gguf``. Raises ``ModelError`` for anything else."""
        match = re.fullmatch(r"hf:([\w.-]+/[\w.-]+)/((?:[\w.+-]+/)*[\w+-][\w.+-]*\.gguf)", name)
        if match is None or ".." in re.split("[:/]", name):
            raise ModelError(f"'{name}' does not name a model on the hub: write hf:org/repo/file.gguf")
        return cls(match[1], match[2])

    @property
    def label(self) -> str:
        return f"hf:{self.repo}/{self.file}@{self.revision}"

    def command(self, folder: Path) -> list[str]:
        require_hub()
        return [sys.executable, "-c", _HUB_SCRIPT, self.repo, self.file, self.revision, os.fspath(folder)]

    def environment(self, work: Path) -> dict[str, str]:
        return {**super().environment(work), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

    @contextmanager
    def open(self, path: Path) -> Iterator[IO[bytes]]:
        with path.open("rb") as stream:
            yield stream


KINDS: dict[str, type[Part]] = {"pip": PipPart, "npm": NpmPart, "hf": HubPart}
"""Kinds of source that a catalogue may name."""


@dataclass(frozen=True)
class Source:
    """A source of a model: parts that, concatenated, are the file. ``download``: bytes to fetch."""

    download: int
    parts: tuple[Part, ...]

    @property
    def is_ready_made(self) -> bool:
        """Whether the single fetched file is the model itself, so that nothing has to be assembled."""
        return len(self.parts) == 1 and not self.parts[0].is_archive


def require_hub() -> None:
    """Raises ``CpucacheError`` unless huggingface_hub is installed."""
    if importlib.util.find_spec("huggingface_hub") is None:
        raise CpucacheError("models of the hub need one more package: pip install 'cpucache[hub]'")


def hub_file(part: HubPart) -> tuple[int, str | None]:
    """Asks the hub for the size of a file in bytes, and its SHA-256 if the hub has it. Raises ``CpucacheError``."""
    require_hub()
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    try:
        found = get_hf_file_metadata(hf_hub_url(part.repo, part.file, revision=part.revision))
    except Exception as error:  # the exceptions depend on the versions of the library and of its HTTP client
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CpucacheError(f"the hub does not provide {part.label}: {reason}") from error
    if not found.size:
        raise CpucacheError(f"the hub does not say how large {part.label} is")
    is_hash = found.etag is not None and re.fullmatch(r"[0-9a-f]{64}", found.etag)
    return found.size, found.etag if is_hash else None
