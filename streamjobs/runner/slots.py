"""Which runner notices which job: plain computation, no input or output, no clock.

A job's slot is the last byte of its ObjectId, the two hex digits at its end. Runners that serve a kind share its
256 slots out by rendezvous hashing, each slot to a holder and to a watcher, so that all that know the same fleet
come to the same shares without a word. See ``docs/design.md`` 11.
"""

from __future__ import annotations

import hashlib
import heapq
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import log
from operator import neg
from typing import Any

from bson.objectid import ObjectId

#: Slots there are: one for each value of an ObjectId's last byte.
COUNT = 256
#: Runners of a kind up to which each of them listens to all of its jobs.
HANDFUL = 3
#: The slot of an ``_id`` that is no ObjectId.
FOREIGN = 0

_UNPACK = struct.Struct(f"<{COUNT + 1}I").unpack
_UNIT = 2.0**32


@dataclass(frozen=True, slots=True)
class Member:
    """A live runner that listens: its owner id, the kinds it serves, and how many jobs it holds at most."""

    owner: str
    kinds: frozenset[str]
    weight: int = 1


@dataclass(frozen=True, slots=True)
class Share:
    """A runner's slots of a kind: those it holds and those it watches. Neither means it listens to all."""

    holds: frozenset[int] | None = None
    watches: frozenset[int] = frozenset()

    @property
    def heard(self) -> frozenset[int] | None:
        """The slots whose events it wants; None for all."""
        return None if self.holds is None else self.holds | self.watches


#: The share of a runner that listens to everything.
ALL = Share()


def slot_of(id_: Any) -> int:
    """The slot of a job by its ``_id``, from 0 to 255."""
    return id_.binary[-1] if isinstance(id_, ObjectId) else FOREIGN


def expression(field: str) -> dict[str, Any]:
    """The same on the server, as an aggregation expression whose value is two hex digits.

    ``$convert`` with both of its ways out: plain ``$toString`` raises on a sub-document or a UUID, and a stream that
    raises at an event raises there again for ever.
    """
    text = {"$convert": {"input": field, "to": "string", "onError": "", "onNull": ""}}
    mine = {"$eq": [{"$type": field}, "objectId"]}
    return {"$cond": [mine, {"$substrBytes": [text, 22, 2]}, f"{FOREIGN:02x}"]}


def assign(weights: Mapping[str, int]) -> dict[int, tuple[str, str | None]]:
    """Share the slots out: slot → (holder, watcher), the watcher None where there is only one runner.

    Every runner gets its weight's part of the slots, give or take one, as a holder and again as a watcher. When one
    comes or goes little more than its own part moves.

    Args:
        weights: owners and how many jobs each holds at most.

    """
    holders = _deal(weights, "holds", {})
    if len(weights) < 2:
        return {slot: (owner, None) for slot, owner in holders.items()}
    watchers = _deal(weights, "watches", holders)
    return {slot: (holder, watchers[slot]) for slot, holder in holders.items()}


def shares(me: Member, fleet: Iterable[Member]) -> dict[str, Share]:
    """What a runner is to listen to, by kind; kinds that the same runners serve are shared out alike.

    Args:
        me: the runner; it counts whether or not it is in the fleet yet.
        fleet: the live runners that listen.

    """
    weights: dict[str, dict[str, int]] = {kind: {me.owner: max(1, me.weight)} for kind in me.kinds}
    for member in fleet:
        for kind in member.kinds & weights.keys():
            weights[kind][member.owner] = max(1, member.weight)
    return {kind: _share(me.owner, tuple(sorted(found.items()))) for kind, found in weights.items()}


def groups(heard: Mapping[str, frozenset[int] | None]) -> list[tuple[list[str], list[str] | None]]:
    """Kinds by what is heard of them, for a filter: (kinds, slots as hex digits or None for all).

    Runners mostly serve the same kinds, so there are few groups whatever the number of kinds.
    """
    found: dict[frozenset[int] | None, list[str]] = {}
    for kind, slots in heard.items():
        every = slots is None or len(slots) == COUNT
        found.setdefault(None if every else slots, []).append(kind)
    return [(kinds, None if slots is None else digits(slots)) for slots, kinds in found.items()]


def digits(slots: Iterable[int]) -> list[str]:
    """Slots as :func:`expression` gives them, in order."""
    return [f"{slot:02x}" for slot in sorted(slots)]


def _share(owner: str, weights: tuple[tuple[str, int], ...]) -> Share:
    if len(weights) <= HANDFUL:
        return ALL
    dealt = _dealt(weights)
    holds = frozenset(slot for slot, (holder, _) in dealt.items() if holder == owner)
    return Share(holds, frozenset(slot for slot, (_, watcher) in dealt.items() if watcher == owner))


@lru_cache(maxsize=16)  # for kinds with the same runners, and for the runners of one process
def _dealt(weights: tuple[tuple[str, int], ...]) -> dict[int, tuple[str, str | None]]:
    return assign(dict(weights))


def _deal(weights: Mapping[str, int], role: str, taken: Mapping[int, str]) -> dict[int, str]:
    """Give each slot to an owner other than the one that has taken it already.

    The pair with the best score first, as long as its slot is free and its owner has room: with the same scores on
    both sides that is the one stable matching, so it depends on nothing but the owners.
    """
    room = _quotas(weights, role)
    even = len(set(weights.values())) == 1
    owners = sorted(room)
    scores: list[float] = []  # of the first owner for each slot, then of the second
    for owner in owners:
        numbers = _numbers(role, owner)[:COUNT]
        scores += map(neg, numbers) if even else [_score(one, weights[owner]) for one in numbers]
    dealt: dict[int, str] = {}
    for place in sorted(range(len(scores)), key=scores.__getitem__):
        row, slot = divmod(place, COUNT)
        owner = owners[row]
        if slot not in dealt and room[owner] > 0 and owner != taken.get(slot):
            room[owner] -= 1
            dealt[slot] = owner
            if len(dealt) == COUNT:
                break
    for slot in range(COUNT):  # the last ones may find room only where they must not go
        if slot not in dealt:
            others = sorted(one for one in weights if one != taken.get(slot))
            dealt[slot] = min(others, key=lambda one: _score(_numbers(role, one)[slot], weights[one]))
    return dealt


def _quotas(weights: Mapping[str, int], role: str) -> dict[str, int]:
    """How many slots each owner gets, in proportion to its weight; only those that get any.

    A method of divisors: when one joins, nobody else's number grows, so that nothing moves for rounding's sake. Each
    owner rounds at a place of its own, which spreads the few slots of a large fleet.
    """
    queue = [
        ((1.0 - _numbers(role, owner)[COUNT] / _UNIT) / weight, owner) for owner, weight in weights.items()
    ]
    heapq.heapify(queue)
    quotas: dict[str, int] = {}
    for _ in range(COUNT):
        at, owner = queue[0]
        quotas[owner] = quotas.get(owner, 0) + 1
        heapq.heapreplace(queue, (at + 1.0 / weights[owner], owner))
    return quotas


@lru_cache(maxsize=4_096)
def _numbers(role: str, owner: str) -> tuple[int, ...]:
    """An owner's number for each slot and one more, 32 bits each, the same in every process."""
    return _UNPACK(hashlib.shake_128(f"{role}:{owner}".encode()).digest(4 * (COUNT + 1)))


def _score(number: int, weight: int) -> float:
    """How well an owner and a slot go together, less is better; twice the weight wins twice as often."""
    return -log((number + 0.5) / _UNIT) / weight
