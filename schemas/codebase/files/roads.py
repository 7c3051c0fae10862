"""roads.py: the map of towns and the roads between them."""

import heapq

from town import Town


class RoadMap:
    """Towns joined by roads, each a whole number of days long."""

    def __init__(self) -> None:
        self.towns: dict[str, Town] = {}
        self.roads: dict[str, dict[str, int]] = {}

    def add_town(self, town: Town) -> None:
        self.towns[town.name] = town
        self.roads[town.name] = {}

    def add_road(self, a: str, b: str, days: int) -> None:
        self.roads[a][b] = days
        self.roads[b][a] = days

    def neighbours(self, name: str) -> dict[str, int]:
        """The towns next to this one, with the days it takes to reach them."""
        return dict(self.roads[name])

    def shortest_path(self, start: str, goal: str) -> tuple[int, list[str]]:
        """The days needed and the towns on the way, both ends included."""
        queue = [(0, start, [start])]
        seen = set()
        while queue:
            days, here, path = heapq.heappop(queue)
            if here == goal:
                return days, path
            if here in seen:
                continue
            seen.add(here)
            for there, length in self.roads[here].items():
                heapq.heappush(queue, (days + length, there, [*path, there]))
        raise ValueError(f"there is no way from {start} to {goal}")


def default_map() -> RoadMap:
    """The five towns of the standard game."""
    world = RoadMap()
    world.add_town(Town("Saltmouth", makes={"salt", "fish"}, needs={"iron"}))
    world.add_town(Town("Weaverly", makes={"cloth"}, needs={"salt"}))
    world.add_town(Town("Highforge", makes={"iron"}, needs={"fish", "cloth"}))
    world.add_town(Town("Ambershore", makes={"amber"}, needs={"cloth", "iron"}))
    world.add_town(Town("Kingsbridge", needs={"amber", "fish"}))
    world.add_road("Saltmouth", "Weaverly", 2)
    world.add_road("Weaverly", "Kingsbridge", 2)
    world.add_road("Kingsbridge", "Highforge", 3)
    world.add_road("Saltmouth", "Ambershore", 4)
    world.add_road("Ambershore", "Kingsbridge", 3)
    return world
