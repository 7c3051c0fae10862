"""The rooms of the package import downward only, and llama.cpp is loaded only where it is needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import cpucache

PACKAGE = Path(cpucache.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
TESTS = Path(__file__).parents[1]
TOP = ""
"""The room of ``cpucache/__init__.py``."""

# What each room may import of the others. A room that is added is listed here.
MAY_IMPORT = {
    "errors": set(),
    "private": set(),
    "stages": set(),
    "database": {"private"},
    "resources": {"errors"},
    "pml": {"errors", "stages"},
    "authoring": {"errors", "pml"},
    "models": {"errors", "resources"},
    "store": {"errors", "private", "database"},
    "runtime": {"errors"},
    "layout": {"errors", "pml", "runtime", "store"},
    "reuse": {"errors", "stages", "pml", "runtime", "store", "layout"},
    "sessions": {"errors", "private", "database"},
    "engine": {"errors", "stages", "pml", "authoring", "runtime", "store", "layout", "reuse", "models", "sessions"},
    "bench": {"errors", "stages", "pml", "runtime", "store", "layout", "reuse", "models", "engine"},
    "server": {"errors", "pml", "runtime", "store", "layout", "reuse", "engine"},
    "cli": {
        TOP,
        "server",
        *("errors", "private", "stages", "resources", "pml", "authoring", "runtime", "store", "layout", "reuse"),
        *("models", "sessions", "engine", "bench"),
    },
    TOP: {"errors", "engine", "authoring"},
    "__main__": {"cli"},
}

# Packages that belong to certain rooms, which shield the others from them.
ROOMS_OF = {
    "llama_cpp": {"runtime"},
    "lxml": {"pml"},
    "jinja2": {"layout", "authoring"},
    "pathspec": {"authoring"},
    "cryptography": {"store"},
    "sqlite3": {"database", "store", "sessions"},
    "huggingface_hub": {"models"},
    "click": {"cli"},
    "fastapi": {"server"},
    "pydantic": {"server"},
    "starlette": {"server"},
    "prometheus_client": {"server"},
    "uvicorn": {"cli"},
    "prompt_toolkit": {"cli"},
}


def room(module: str) -> str:
    """``cpucache.pml.tree`` is in the room ``pml``."""
    return module.removeprefix("cpucache").removeprefix(".").partition(".")[0]


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """Lines and modules of every import in a file, also of those inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            assert node.module
            # "from cpucache import store" and "from cpucache.store import x" both import the room "store".
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            inside = [name for name in submodules if room(name) in MAY_IMPORT]
            yield from ((node.lineno, name) for name in (inside if node.module == "cpucache" else [node.module]))


def is_ours(module: str) -> bool:
    return module == "cpucache" or module.startswith("cpucache.")


def test_every_room_is_listed() -> None:
    assert {room(name_of(path)) for path in MODULES} == set(MAY_IMPORT)


def test_the_rooms_form_no_circle() -> None:
    # The package's own __init__ stands outside: it names the engine for users, and its version for the command line.
    below = {name: rooms - {TOP} for name, rooms in MAY_IMPORT.items() if name != TOP}
    while below:
        lowest = [name for name, rooms in below.items() if not rooms & below.keys()]
        assert lowest, f"a circle among {sorted(below)}"
        for name in lowest:
            del below[name]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_downward(path: Path) -> None:
    here = room(name_of(path))
    wrong = [
        f"{path}:{line}: {here or 'the package'} must not import {module}"
        for line, module in imports_of(path)
        if is_ours(module) and room(module) != here and room(module) not in MAY_IMPORT[here]
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_packages_stay_in_the_rooms_that_they_belong_to(path: Path) -> None:
    here = room(name_of(path))
    wrong = [
        f"{path}:{line}: {module} belongs to {', '.join(ROOMS_OF[package])}"
        for line, module in imports_of(path)
        if here not in ROOMS_OF.get(package := module.partition(".")[0], {here})
    ]
    assert not wrong, "\n".join(wrong)


def test_the_language_needs_nothing_but_lxml() -> None:
    packages = {
        module.partition(".")[0]
        for path in MODULES
        if room(name_of(path)) == "pml"
        for _, module in imports_of(path)
        if not is_ours(module)
    }
    assert packages - sys.stdlib_module_names == {"lxml"}


def test_no_test_imports_from_another() -> None:
    """What several tests need is in ``tests/support``."""
    wrong = [
        f"{path.relative_to(TESTS.parent)}:{line}: {module}"
        for path in sorted(TESTS.rglob("*.py"))
        for line, module in imports_of(path)
        if module.partition(".")[0] == "tests" and module.split(".")[1:2] != ["support"]
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("code", "loaded"),
    [
        ("import cpucache", False),
        ("import cpucache.cli.main", False),
        ("import cpucache.pml", False),
        ("import cpucache.store", False),
        ("import cpucache.layout", False),
        ("import cpucache.cli.models", False),
        ("from cpucache.cli.main import cli; cli.main(['--help'], standalone_mode=False)", False),
        # The measure works: the engine does load it.
        ("from cpucache import Engine", True),
    ],
)
def test_llama_cpp_is_loaded_late(code: str, loaded: bool) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print('llama_cpp' in sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split()[-1] == str(loaded)


@pytest.mark.parametrize(
    ("code", "unneeded"),
    [
        ("import cpucache", {"llama_cpp", "numpy", "jinja2"}),
        ("from cpucache.cli.main import cli; cli.main(['--help'], standalone_mode=False)", {"numpy", "jinja2", "rich"}),
        (
            "import cpucache.cli.run",
            {"fastapi", "prompt_toolkit", "cpucache.authoring", "cpucache.cli.compare", "cpucache.pml.mend"},
        ),
    ],
)
def test_nothing_unneeded_is_loaded(code: str, unneeded: set[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"], capture_output=True, text=True, check=True
    )
    assert not unneeded & set(done.stdout.splitlines()[-1].split())


def test_the_package_names_what_it_offers() -> None:
    assert all(getattr(cpucache, name) is not None for name in cpucache.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Engin'"):
        cpucache.Engin  # noqa: B018 - reading it is the test
