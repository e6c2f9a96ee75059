"""What breaks, when and for how long: a pure function of the seed."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass

#: Sorts of faults that need nothing but the runners' processes and the collection.
RUNNER = ("kill", "freeze-short", "freeze-long", "term")
ANYWHERE = (*RUNNER, "garbage")
#: Those of a server of our own: its process, its failpoints, and the wire to it.
SERVER = ("server-kill", "server-freeze", "step-down", "election")
FAILPOINT = ("close", "history-lost", "conflict", "shutdown", "concern")
WIRE = ("lost-reply", "silence", "delayed-claim", "duplicate", "delay", "hole", "cut", "drop", "stream-error")
ALL = (*ANYWHERE, *SERVER, *FAILPOINT, *WIRE)

_FIRST = 3.0  # seconds without a fault at the beginning
_GAP = 1.5  # mean seconds between two faults
#: Sorts that may strike the producers too, and all runners at once.
_PRODUCERS = ("close", "shutdown", "concern", "lost-reply", "duplicate", "drop")
_FLEET = ("lost-reply", "delayed-claim", "duplicate", "delay", "cut", "drop")


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

    A runner's process suffers one fault at a time, and so do the server, its failpoint and the wire.
    """
    dice = random.Random(seed)
    known = [sort for sort in ALL if sort in sorts]
    first = dice.sample(known, len(known))
    free: dict[str, float] = {}
    out: list[Fault] = []
    at = _FIRST
    while at < seconds:
        sort = first.pop() if first else dice.choice(known)
        on = _victim(sort, dice, runners)
        group = on if sort in RUNNER else _group(sort)
        lasts, chance = _lasts(sort, dice, lease), dice.random()
        if free.get(group, 0.0) <= at:
            free[group] = at + lasts + 1.0
            out.append(Fault(round(at, 3), sort, on, lasts, chance))
        elif len(out) < len(known):
            first.insert(0, sort)  # later
        at += dice.expovariate(1 / _GAP)
    return out


def _group(sort: str) -> str:
    """What takes one fault at a time."""
    groups = {"server": SERVER, "failpoint": FAILPOINT, "wire": WIRE}
    return next((name for name, sorts in groups.items() if sort in sorts), sort)


def _victim(sort: str, dice: random.Random, runners: Sequence[str]) -> str:
    """Whom it strikes: a runner, the fleet, the producers, or the server."""
    if sort in SERVER or sort == "garbage":
        return "server"
    victims = list(runners)
    if sort in _PRODUCERS:
        victims += ["producers"] * 2
    if sort in _FLEET:
        victims += ["fleet"] * 2
    return dice.choice(victims)


def _lasts(sort: str, dice: random.Random, lease: float) -> float:
    match sort:
        case "freeze-short":
            span = (0.1, 0.8 * lease)
        case "freeze-long":
            span = (1.2 * lease, 2.5 * lease)
        case "server-kill" | "server-freeze" | "election":
            span = (0.2, 2 * lease)
        case "hole":
            span = (0.2, 2.5 * lease)
        case "garbage" | "step-down":
            span = (0.0, 0.0)
        case _:
            span = (0.2, 1.5 * lease)
    return round(dice.uniform(*span), 3)
