"""The search while it runs: a table on a terminal, else a line for each round."""

from __future__ import annotations

from typing import Any

from rich.console import Console, Group
from rich.live import Live as Screen
from rich.table import Table
from rich.text import Text

from .candidates import Candidates
from .search import Search

SHOWN = 10


class Live:
    """Shows a search of `budget` seconds; `show` is its watcher."""

    def __init__(self, budget: float, console: Console | None = None) -> None:
        self.budget, self.console = budget, console or Console(stderr=True)
        self.screen = Screen(console=self.console, auto_refresh=False, transient=True)
        self.proving = 0

    def __enter__(self) -> Live:
        if self.console.is_terminal:
            self.screen.start()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.console.is_terminal:
            self.screen.stop()

    def show(self, search: Search, candidates: Candidates, what: str) -> None:
        if self.console.is_terminal:
            self.screen.update(self.picture(search, candidates, what), refresh=True)
        elif what == "round" or (what.startswith("proof") and not self.proving):
            self.proving += what.startswith("proof")
            self.console.print(self.line(search, what), highlight=False, soft_wrap=True)

    def line(self, search: Search, what: str) -> str:
        """Where the search is, and who leads."""
        left = max(0.0, self.budget - search.clock())
        head = what if what.startswith("proof") else "round {} of {}".format(*search.rounds)
        alive = search.alive
        lead = (
            f", best {alive[0].candidate.key} {alive[0].score:+.1f} points on {alive[0].images} images" if alive else ""
        )
        wait = f", {len(search.waiting)} to try" if search.waiting else ""
        return f"{head}: {len(alive)} of {len(search.standings)} candidates in{wait}{lead}; {_time(left)} left"

    def picture(self, search: Search, candidates: Candidates, what: str) -> Group:
        table = Table("candidate", "images", "gain, points", "misses", box=None, padding=(0, 2, 0, 0))
        for standing in search.alive[:SHOWN]:
            known = standing.images > 1
            told = f"{standing.gain:+.1f} ± {standing.error:.1f}" if known else ""
            name = standing.candidate.key + (" (control)" if standing.candidate.control else "")
            table.add_row(Text(name), str(standing.images), told, ", ".join(standing.missed))
        refused = f"{len(candidates.refused)} refused on this model" if candidates.refused else ""
        return Group(Text(self.line(search, what)), table, Text(refused, style="dim"))


def _time(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
