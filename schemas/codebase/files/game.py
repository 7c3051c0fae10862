"""game.py: the rules that tie map, caravan and events together."""

import random

from caravan import Caravan
from events import daily_event
from roads import RoadMap, default_map
from town import Town

GOAL = 2000
LAST_DAY = 60


class Game:
    """One play-through: reach GOAL coins before LAST_DAY without losing the whole crew."""

    def __init__(self, leader: str, seed: int = 0, world: RoadMap | None = None) -> None:
        self.world = world or default_map()
        self.caravan = Caravan(leader)
        self.place = next(iter(self.world.towns))
        self.day = 1
        self.seed = seed
        self.rng = random.Random(seed)

    @property
    def town(self) -> Town:
        return self.world.towns[self.place]

    def status(self) -> str:
        """One line for the top of the screen."""
        c = self.caravan
        return f"Day {self.day}, {self.place}: {c.coins} coins, {c.food} rations, {c.crew} crew"

    def outcome(self) -> str | None:
        """'won' or 'lost' when the game is over, else None."""
        if self.caravan.coins >= GOAL:
            return "won"
        if self.caravan.crew == 0 or self.day > LAST_DAY:
            return "lost"
        return None

    def travel(self, goal: str) -> list[str]:
        """Go to a neighbouring town, day by day. Returns the story of the journey."""
        days = self.world.neighbours(self.place).get(goal)
        if days is None:
            raise ValueError(f"no road leads from {self.place} to {goal}")
        story: list[str] = []
        for _ in range(days):
            self.pass_day(story)
            if self.outcome() == "lost":
                return story
            story.append(daily_event(self.caravan, self.rng))
        self.place = goal
        story.append(f"The caravan reaches {goal}.")
        return story

    def pass_day(self, story: list[str]) -> None:
        """Markets move on, and the crew eats."""
        self.day += 1
        for town in self.world.towns.values():
            town.next_day()
        if not self.caravan.eat():
            self.caravan.crew -= 1
            story.append("There is nothing left to eat, and one of the crew walks away.")
