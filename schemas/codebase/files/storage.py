"""storage.py: saved games as JSON files."""

import json
from pathlib import Path
from typing import Any

from caravan import WAGON_CAPACITY
from game import Game
from goods import Hold


def to_dict(game: Game) -> dict[str, Any]:
    """Everything that changes during play. The map itself is fixed and is not saved."""
    caravan = game.caravan
    return {
        "seed": game.seed,
        "day": game.day,
        "place": game.place,
        "leader": caravan.leader,
        "coins": caravan.coins,
        "crew": caravan.crew,
        "food": caravan.food,
        "crates": caravan.hold.crates,
        "stock": {name: town.stock for name, town in game.world.towns.items()},
    }


def from_dict(data: dict[str, Any]) -> Game:
    """Rebuild a game. The dice start afresh from the seed and the day."""
    game = Game(data["leader"], data["seed"])
    game.day = data["day"]
    game.place = data["place"]
    game.rng.seed(game.seed * 1000 + game.day)
    caravan = game.caravan
    caravan.coins = data["coins"]
    caravan.crew = data["crew"]
    caravan.food = data["food"]
    caravan.hold = Hold(WAGON_CAPACITY, data["crates"])
    for name, stock in data["stock"].items():
        game.world.towns[name].stock = dict(stock)
    return game


def save(game: Game, path: Path) -> None:
    """Write beside the old file and swap, so that a crash never leaves half a save."""
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(to_dict(game), indent=2), encoding="utf-8")
    draft.replace(path)


def load(path: Path) -> Game:
    return from_dict(json.loads(path.read_text(encoding="utf-8")))
