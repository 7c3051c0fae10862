"""goods.py: the wares of the game, and the hold that carries them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Good:
    """A kind of ware: base price in coins and weight in stones, both for one crate."""

    name: str
    price: int
    weight: int
    perishable: bool = False


GOODS = {
    good.name: good
    for good in (
        Good("salt", price=6, weight=4),
        Good("fish", price=9, weight=3, perishable=True),
        Good("cloth", price=18, weight=2),
        Good("iron", price=24, weight=8),
        Good("amber", price=70, weight=1),
    )
}


class Hold:
    """The crates on the wagons, limited by their total weight."""

    def __init__(self, capacity: int, crates: dict[str, int] | None = None) -> None:
        self.capacity = capacity
        self.crates = dict(crates or {})

    @property
    def load(self) -> int:
        return sum(GOODS[name].weight * count for name, count in self.crates.items())

    def room_for(self, name: str) -> int:
        """How many more crates of a ware fit."""
        return max(0, (self.capacity - self.load) // GOODS[name].weight)

    def add(self, name: str, count: int) -> None:
        if count > self.room_for(name):
            raise ValueError(f"no room for {count} crates of {name}")
        self.crates[name] = self.crates.get(name, 0) + count

    def remove(self, name: str, count: int) -> None:
        if count > self.crates.get(name, 0):
            raise ValueError(f"fewer than {count} crates of {name} on board")
        self.crates[name] -= count
        if self.crates[name] == 0:
            del self.crates[name]
