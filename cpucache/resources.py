"""Data files of the project, in a checkout and in an installed wheel."""

from __future__ import annotations

from pathlib import Path

from cpucache.errors import CpucacheError

_PACKAGE = Path(__file__).resolve().parent


def checkout() -> Path | None:
    """Root of the source tree that this package runs from; ``None`` for an installed wheel."""
    root = _PACKAGE.parent
    return root if (root / "pyproject.toml").is_file() and (root / "gguf_models").is_dir() else None


def resource(name: str) -> Path:
    """Path of a file or folder that ships with the project, such as ``gguf_models/catalogue.toml`` or ``schemas``.

    Raises ``CpucacheError`` when the installation lacks it.
    """
    path = (checkout() or _PACKAGE / "data") / name
    if not path.exists():
        raise CpucacheError(f"this installation of cpucache lacks {path}: install it again")
    return path
