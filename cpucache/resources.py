"""Data folders of the project, found the same way from a checkout and from an installed wheel."""

from __future__ import annotations

from pathlib import Path

from cpucache.errors import CpucacheError

_PACKAGE = Path(__file__).resolve().parent


def checkout() -> Path | None:
    """The root of the source tree that this package runs from, or None when it runs from an installed wheel."""
    root = _PACKAGE.parent
    return root if (root / "pyproject.toml").is_file() and (root / "gguf_models").is_dir() else None


def resource(name: str) -> Path:
    """The file or folder ``name`` (``gguf_models/catalogue.toml``, ``schemas``) that ships with the project.

    Raises CpucacheError when the installation lacks it.
    """
    path = (checkout() or _PACKAGE / "data") / name
    if not path.exists():
        raise CpucacheError(f"this installation of cpucache lacks {path}: install it again")
    return path
