"""The examples of ``schemas/``: every one reads without fault, and its prompts fit its schema."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cpucache.pml import load_prompt, load_schema, resolve
from cpucache.pml.tree import Included, Module, Parameter, Schema, SchemaNode, Text, Union, modules_of, parts

SCHEMAS = Path(__file__).resolve().parents[3] / "schemas"
EXAMPLES = sorted(path.parent for path in SCHEMAS.glob("*/schema.xml"))
CODE = SCHEMAS / "codebase" / "files"


def prompts_of(example: Path) -> list[Path]:
    return sorted(path for path in example.glob("*.xml") if path.name != "schema.xml")


PROMPTS = [prompt for example in EXAMPLES for prompt in prompts_of(example)]


def nodes(scope: Schema | Module) -> Iterator[SchemaNode]:
    """Every node of a schema, at any depth."""
    for node in parts(scope):
        yield node
        if isinstance(node, Module):
            yield from nodes(node)
        elif isinstance(node, Union):
            for member in node.members:
                yield member
                yield from nodes(member)


def schema(name: str) -> Schema:
    return load_schema(SCHEMAS / name / "schema.xml")


def test_the_examples_are_all_there() -> None:
    assert {"persona", "codebase", "trip", "lesson", "robot", "contract"} <= {path.name for path in EXAMPLES}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_schema_loads_under_the_name_of_its_folder_and_has_two_prompts(example: Path) -> None:
    assert load_schema(example / "schema.xml").name == example.name
    assert len(prompts_of(example)) >= 2


@pytest.mark.parametrize("path", PROMPTS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_prompt_resolves_and_ends_in_a_question(path: Path) -> None:
    prompt = load_prompt(path)
    resolved = resolve(prompt, load_schema(path.parent / "schema.xml"))
    assert prompt.schema == path.parent.name
    assert any(isinstance(item, Included) for item in resolved.items)
    assert getattr(resolved.items[-1], "role", None) == "user"


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_files_read_well(example: Path) -> None:
    """Narrow lines, and no indentation left inside what the model reads."""
    for path in (example / "schema.xml", *prompts_of(example)):
        assert max(map(len, path.read_text(encoding="utf-8").splitlines())) <= 120, path
    if example.name != "codebase":
        loaded = load_schema(example / "schema.xml")
        assert not [node.text for node in nodes(loaded) if isinstance(node, Text) and "\n " in node.text]


def test_persona_has_seven_traits_each_a_union() -> None:
    traits = modules_of(schema("persona"))
    assert len(traits) == 7
    for trait in traits.values():
        (union,) = (node for node in parts(trait) if isinstance(node, Union))
        assert len(union.members) >= 4


def test_what_each_example_is_there_to_show() -> None:
    trip = list(nodes(schema("trip")))
    assert any(
        isinstance(inner, Union)
        for node in trip
        if isinstance(node, Union)
        for member in node.members
        for inner in nodes(member)
    )
    assert any(isinstance(node, Parameter) and node.scaffold for node in trip)
    assert any(isinstance(node, Union) and node.scaffold for node in nodes(schema("lesson")))
    assert any(isinstance(node, Module) and not node.cache for node in nodes(schema("robot")))


def test_code_base_is_read_from_its_files_and_compiles() -> None:
    files = {path.name: path.read_text(encoding="utf-8") for path in CODE.glob("*.py")}
    assert len(files) >= 6
    for name, code in files.items():
        compile(code, name, "exec")
    modules = modules_of(schema("codebase"))
    read = {name: "".join(c.text for c in module.children if isinstance(c, Text)) for name, module in modules.items()}
    assert read == files


def test_code_base_plays(tmp_path: Path) -> None:
    """The code that the model is asked about works: buy, travel, sell, save, and load again."""
    play = """
import sys
from pathlib import Path
from game import Game
from storage import load, save, to_dict

game = Game("Ada", seed=1)
assert game.caravan.buy(game.town, "salt", 5) == 5
story = game.travel("Weaverly")
assert game.day == 3 and story[-1] == "The caravan reaches Weaverly."
assert game.caravan.sell(game.town, "salt", 5) > 0
assert game.world.shortest_path("Ambershore", "Weaverly") == (5, ["Ambershore", "Kingsbridge", "Weaverly"])
save(game, Path(sys.argv[1]))
assert to_dict(load(Path(sys.argv[1]))) == to_dict(game)
"""
    done = subprocess.run(
        [sys.executable, "-B", "-c", play, str(tmp_path / "saved.json")],
        cwd=CODE,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
