"""What breaks, when and for how long: a pure function of the seed."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass

#: Sorts of faults that need nothing but the runners' processes and the collection.
ANYWHERE = ("kill", "freeze-short", "freeze-long", "term", "garbage")
#: Those of a server of our own.
SERVER = ("server-kill", "server-freeze")
#: Those that its failpoints make.
FAILPOINT = ("close", "history-lost", "conflict", "shutdown", "concern")
ALL = (*ANYWHERE, *SERVER, *FAILPOINT)

_FIRST = 3.0  # seconds without a fault at the beginning
_GAP = 2.5  # mean seconds between two faults
_RUNNERS = ("kill", "freeze-short", "freeze-long", "term")


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault: at a second of the run, of a sort, on a runner or on whatever its sort strikes, for so long.

    ``dice`` is a number of its own from 0 to 1 for what is left to choose.
    """

    at: float
    sort: str
    on: str
    lasts: float
    dice: float


def schedule(
    seed: int, seconds: float, runners: Sequence[str], sorts: Collection[str], lease: float
) -> list[Fault]:
    """The faults of a run in order: each sort once, as far as the time goes, then at random.

    A runner suffers one fault of its own at a time, and so does the server; there is one failpoint at a time.
    """
    dice = random.Random(seed)
    first = [sort for sort in ALL if sort in sorts]
    known = list(first)
    dice.shuffle(first)
    free: dict[str, float] = {}
    out: list[Fault] = []
    at = _FIRST
    while at < seconds:
        sort = first.pop() if first else dice.choice(known)
        group = dice.choice(runners) if sort in _RUNNERS else _group(sort)
        lasts = _lasts(sort, dice, lease)
        chance = dice.random()
        if free.get(group, 0.0) <= at:
            free[group] = at + lasts + 1.0
            out.append(Fault(round(at, 3), sort, group, lasts, chance))
        else:
            first.insert(0, sort)  # later
        at += dice.expovariate(1 / _GAP)
    return out


def _group(sort: str) -> str:
    """What a sort strikes, which takes one fault at a time."""
    return "server" if sort in SERVER else "failpoint" if sort in FAILPOINT else sort


def _lasts(sort: str, dice: random.Random, lease: float) -> float:
    match sort:
        case "freeze-short":
            span = (0.1, 0.8 * lease)
        case "freeze-long":
            span = (1.2 * lease, 2.5 * lease)
        case "server-kill" | "server-freeze":
            span = (0.2, 2 * lease)
        case "garbage":
            span = (0.0, 0.0)
        case _:
            span = (0.2, 1.5 * lease)
    return round(dice.uniform(*span), 3)
