"""caravan.py: the player's wagons, purse and food, and how they trade."""

from dataclasses import dataclass, field

from goods import Hold
from town import Town

WAGON_CAPACITY = 60
RATION_PRICE = 2


class TradeError(Exception):
    """A deal that cannot be made; the message tells the player why."""


@dataclass
class Caravan:
    """Everything that the player owns."""

    leader: str
    coins: int = 120
    crew: int = 3
    food: int = 30
    hold: Hold = field(default_factory=lambda: Hold(WAGON_CAPACITY))

    def buy(self, town: Town, name: str, count: int) -> int:
        """Buy crates one by one; the price rises as the store empties. Returns how many the purse allowed."""
        if count < 1 or count > town.stock.get(name, 0):
            raise TradeError(f"{town.name} does not have {count} crates of {name}")
        if count > self.hold.room_for(name):
            raise TradeError(f"the wagons have room for {self.hold.room_for(name)} crates of {name}")
        bought = 0
        while bought < count and town.asking_price(name) <= self.coins:
            self.coins -= town.asking_price(name)
            town.stock[name] -= 1
            self.hold.add(name, 1)
            bought += 1
        return bought

    def sell(self, town: Town, name: str, count: int) -> int:
        """Sell crates one by one; the price falls as the store fills. Returns the income."""
        if count < 1 or count > self.hold.crates.get(name, 0):
            raise TradeError(f"there are not {count} crates of {name} on the wagons")
        income = 0
        for _ in range(count):
            income += town.offered_price(name)
            town.stock[name] += 1
            self.hold.remove(name, 1)
        self.coins += income
        return income

    def buy_food(self, rations: int) -> None:
        if rations < 1 or rations * RATION_PRICE > self.coins:
            raise TradeError("not enough coins for that much food")
        self.coins -= rations * RATION_PRICE
        self.food += rations

    def eat(self) -> bool:
        """One day's meals. False when somebody goes hungry."""
        fed = self.food >= self.crew
        self.food = max(0, self.food - self.crew)
        return fed
