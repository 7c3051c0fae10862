"""town.py: a town and its market, where prices follow supply."""

from dataclasses import dataclass, field

from goods import GOODS

USUAL_STOCK = 20
FEE = 0.1  # the share of each trade that the market keeps


@dataclass
class Town:
    """A place to trade. Wares it makes are cheap there; wares it needs are dear."""

    name: str
    makes: set[str] = field(default_factory=set)
    needs: set[str] = field(default_factory=set)
    stock: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in GOODS:
            self.stock.setdefault(name, USUAL_STOCK)

    def price(self, name: str) -> float:
        """The fair price of one crate today: an empty store doubles it, an overfull one halves it."""
        factor = 1.0
        if name in self.makes:
            factor = 0.6
        elif name in self.needs:
            factor = 1.5
        scarcity = 2 ** (1 - min(self.stock[name], 2 * USUAL_STOCK) / USUAL_STOCK)
        return GOODS[name].price * factor * scarcity

    def asking_price(self, name: str) -> int:
        """What a buyer pays for one crate."""
        return max(1, round(self.price(name) * (1 + FEE)))

    def offered_price(self, name: str) -> int:
        """What a seller gets for one crate."""
        return max(1, round(self.price(name) * (1 - FEE)))

    def next_day(self) -> None:
        """Stocks drift back to normal; what the town makes piles up, what it needs runs low."""
        for name, count in self.stock.items():
            goal = USUAL_STOCK
            if name in self.makes:
                goal = USUAL_STOCK * 3 // 2
            elif name in self.needs:
                goal = USUAL_STOCK // 2
            self.stock[name] += (goal > count) - (goal < count)
