"""events.py: what can happen to a caravan on the road."""

import random
from collections.abc import Callable

from caravan import Caravan
from goods import GOODS

Event = Callable[[Caravan, random.Random], str]


def quiet_day(caravan: Caravan, rng: random.Random) -> str:
    return rng.choice(["The road is dry and empty.", "Larks sing over the fields.", "A light rain falls."])


def bandits(caravan: Caravan, rng: random.Random) -> str:
    """A large crew scares bandits off; a small one pays a toll."""
    if rng.randint(1, 6) <= caravan.crew:
        return "Bandits watch from the trees but think better of it."
    toll = min(caravan.coins, rng.randint(10, 25))
    caravan.coins -= toll
    return f"Bandits block the road and take {toll} coins."


def spoilage(caravan: Caravan, rng: random.Random) -> str:
    """Heat ruins up to two crates of one perishable ware."""
    fresh = sorted(name for name in caravan.hold.crates if GOODS[name].perishable)
    if not fresh:
        return "The sun burns, but nothing on the wagons can spoil."
    name = rng.choice(fresh)
    lost = min(caravan.hold.crates[name], rng.randint(1, 2))
    caravan.hold.remove(name, lost)
    return f"The heat spoils {name}; crates lost: {lost}."


EVENTS: list[tuple[Event, int]] = [(quiet_day, 6), (bandits, 2), (spoilage, 2)]


def daily_event(caravan: Caravan, rng: random.Random) -> str:
    """Pick one event by weight, apply it, and return what to tell the player."""
    events = [event for event, _ in EVENTS]
    weights = [weight for _, weight in EVENTS]
    return rng.choices(events, weights)[0](caravan, rng)
