"""Passing on: a job that this full runner should take → one whose record shows a free slot, at most once.

A full fleet writes nothing: nobody's record shows a free slot then, and the records are read ever less often.
"""

from __future__ import annotations

import asyncio
import random
import secrets
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from pymongo import UpdateOne
from pymongo.errors import PyMongoError

from streamjobs import events, transitions
from streamjobs.clock import ServerClock, boot
from streamjobs.runner.backlog import Backlog, Candidate
from streamjobs.runner.neighbours import Reading
from streamjobs.runner.store import Store

#: Seconds that a full runner waits for a slot before it passes a job on.
PASS = 0.01
_STILL = 0.05  # seconds until it looks again whether a claim under way has filled it
_READ, _READ_MOST = 1.0, 10.0  # seconds between reads of the records while full: somebody is free, and nobody
_MANY = 1_000


class Passing:
    """What this runner should take and cannot, and who could.

    Args:
        free: how many more jobs this runner could run now.
        who: its name and owner, for events.
        work: called when there is something to :meth:`write`.

    """

    def __init__(
        self, store: Store, backlog: Backlog, clock: ServerClock, free: Callable[[], int],
        who: Callable[[], dict[str, str]], work: Callable[[], None],
    ) -> None:  # fmt: skip
        self._store = store
        self._backlog = backlog
        self._clock = clock
        self._free = free
        self._who = who
        self._work = work
        self._waiting: deque[tuple[float, Candidate]] = deque()
        self._room: dict[str, frozenset[str]] = {}  # runners with a free slot, as their records lately said
        self._stale = 0.0
        self._reading = (0.0, _READ)  # not before, and the pause after
        self._chosen: list[tuple[Candidate, str]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._over = False

    def join(self, sweeper: Reading) -> None:
        """Come to know who reads the records."""
        self._sweeper = sweeper

    @property
    def room(self) -> Mapping[str, frozenset[str]]:
        """The other runners that have a free slot, and their kinds, as far as is known now."""
        return self._room if boot() < self._stale else {}

    def seen(self, room: dict[str, frozenset[str]]) -> None:
        """The records were read: who has a free slot."""
        self._room, self._stale = room, boot() + _READ
        if room:
            self._reading = (self._reading[0], _READ)
        self._check()

    @property
    def pause(self) -> float:
        """Seconds until the records may be asked for again."""
        return self._reading[0] - boot()

    def ask(self) -> None:
        """Have the records read, unless they were a moment ago: the more often nobody was free, the longer it is."""
        after, pause = self._reading
        now = boot()
        if now >= after:
            self._reading = (now + pause, min(2 * pause, _READ_MOST))
            self._sweeper.wake()

    def add(self, candidate: Candidate) -> None:
        """Pass a job on unless it is taken soon."""
        if len(self._waiting) < _MANY and not self._over and candidate.runat <= self._clock.now_ms():
            self._waiting.append((boot() + PASS, candidate))
            if self._timer is None:
                self._check_in(PASS)

    def over(self) -> None:
        """Pass nothing on any more."""
        self._over = True
        self._waiting.clear()

    def _check(self) -> None:
        """Choose runners for what waits, one job each; have the records read if none is known to be free."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._free() > 0:  # a claim under way may fill it yet
            self._waiting = deque(entry for entry in self._waiting if self._backlog.holds(entry[1]))
            self._check_in(_STILL)
            return
        now, left = boot(), list[tuple[float, Candidate]]()
        room = self._room if now < self._stale else {}
        while self._waiting and self._waiting[0][0] <= now:
            at, candidate = self._waiting.popleft()
            if not self._backlog.holds(candidate):
                continue
            to = [owner for owner, kinds in room.items() if candidate.kind in kinds]
            if to:
                chosen = random.choice(to)  # noqa: S311 - only to spread
                del room[chosen]
                self._chosen.append((candidate, chosen))
                self._work()
            else:
                left.append((at, candidate))
                if not room:
                    break
        self._waiting.extendleft(reversed(left))
        if left:
            self._read_again()
        else:
            self._check_in(PASS)

    def _check_in(self, seconds: float) -> None:
        if self._waiting:
            self._timer = asyncio.get_running_loop().call_later(seconds, self._check)

    def _read_again(self) -> None:
        self.ask()
        self._check_in(max(PASS, self.pause))

    async def write(self) -> list[Candidate]:
        """Pass on what was chosen, and give it back; PyMongoError if that fails, and it is chosen again later."""
        passing, self._chosen, began = self._chosen, [], boot()
        if not passing:
            return []
        by = self._who()["owner"]
        writes: list[Any] = []
        for one, to in passing:
            writes.append(UpdateOne(*transitions.pass_on(one.id, by, to, secrets.randbits(31))))
        try:
            told = (await self._store.jobs.bulk_write(writes, ordered=False)).matched_count
        except PyMongoError:
            self._waiting.extendleft((began, one) for one, _ in reversed(passing))
            self._read_again()
            raise
        if told == len(
            passing
        ):  # else somebody has one, or was told of it before and may be gone: it stays ours too
            self._backlog.drop({one.name for one, _ in passing}, began)
        if events.wanted("debug"):
            for one, to in passing:
                events.emit_wanted("job.passed", **self._who(), job=one.id, kind=one.kind, to=to)
        return [one for one, _ in passing]
