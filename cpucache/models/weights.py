"""The weights on this machine: their folder, and the file of a model's name."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

import platformdirs

from cpucache.errors import ModelError
from cpucache.models.catalogue import known_models
from cpucache.models.gguf_file import check_gguf
from cpucache.models.sources import HubPart
from cpucache.resources import checkout


def models_dir() -> Path:
    """Folder of the weights: ``$CPUCACHE_MODELS``, else ``gguf_models/`` of the checkout, else in the user's data."""
    if chosen := os.environ.get("CPUCACHE_MODELS"):
        return Path(chosen).expanduser().absolute()
    root = checkout()
    return root / "gguf_models" if root else platformdirs.user_data_path("cpucache") / "models"


def weights_file(name: str) -> Path | None:
    """Path of weights in the folder, fetched or not; ``None`` for an unknown name.

    A name is one of the catalogue, ``hf:org/repo/file.gguf``, or the name of a file in the folder. Raises
    ``ModelError`` for a malformed ``hf:`` name.
    """
    if name in known_models():
        return models_dir() / known_models()[name].filename
    if name.startswith("hf:"):
        return models_dir() / Path(HubPart.parse(name).file).name
    return next((path for path in unlisted_files() if path.name == name), None)


def unlisted_files() -> list[Path]:
    """GGUF files in the folder that are not in the catalogue: fetched from the hub, or copied there by a user."""
    known = {model.filename for model in known_models().values()}
    return sorted(path for path in models_dir().glob("*.gguf") if path.name not in known)


def resolve_model(name_or_path: str) -> Path:
    """GGUF file of a name (see ``weights_file``) or a path, checked with ``check_gguf``. Never uses the network.

    A name takes precedence over a path. Raises ``ModelError`` for an unknown name (with the nearest known one), for
    weights that have not been fetched, and for a file that is not a sound GGUF.
    """
    path = weights_file(name_or_path)
    if path is None:
        path = Path(name_or_path).expanduser()
        if not path.exists():
            if os.sep in name_or_path or path.suffix == ".gguf":
                raise ModelError(f"no such model file: {name_or_path}")
            raise unknown_model(name_or_path)
    elif not path.exists():
        raise ModelError(f"{name_or_path} has not been fetched yet: run `cpucache models pull {name_or_path}`")
    check_gguf(path)
    return path


def unknown_model(name: str) -> ModelError:
    """Returns the error for an unknown name, with the nearest known name."""
    near = difflib.get_close_matches(name.lower(), list(known_models()), n=1)
    hint = f"did you mean '{near[0]}'? " if near else ""
    return ModelError(
        f"unknown model '{name}': {hint}`cpucache models list` shows the names; the path of a GGUF works too, "
        "and `cpucache models pull` takes hf:org/repo/file.gguf"
    )
