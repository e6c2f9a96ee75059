"""The fleet: which runners there are, and what this one is to notice of their jobs.

A runner acts at once on what it holds, looks after what it watches, and leaves the rest to others for a moment. It
goes on listening to a slot that it has lost until everybody must know, so that no slot is nobody's meanwhile.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pymongo
from bson.errors import BSONError
from pymongo.errors import PyMongoError

from streamjobs import events
from streamjobs.clients import COMMAND_TIMEOUT
from streamjobs.clock import ServerClock, boot
from streamjobs.job import RUNNABLE, date_ms, id_key
from streamjobs.runner.backlog import LIMIT, Backlog, Candidate
from streamjobs.runner.lease import Trust, listens, member_of, record_id, whole
from streamjobs.runner.neighbours import Listening, Reading, Taking
from streamjobs.runner.outage import Outage
from streamjobs.runner.passing import Passing
from streamjobs.runner.slots import ALL, Member, Share, groups, shares, slot_of
from streamjobs.runner.store import Store, candidate_of
from streamjobs.runner.tasks import going
from streamjobs.settings import Settings

#: Seconds after a job was due until its slot's watcher looks whether the holder has claimed it.
WATCH = 0.05
#: The same for a runner that read of it, or put it back, and whose slot it is not.
ASIDE = 0.25
_TOGETHER = 0.025  # looks that are due within this of each other are one read
_AHEAD = 5.0  # seconds beyond the period for which looks are planned
_ASK, _ASK_MOST = 0.05, 5.0  # seconds between due queries for want of work: while they find some, and none
_AGAIN = 1.0  # seconds after an error
_EACH = 0.005  # seconds for each runner over which a fleet spreads its reads of the records
_OPEN, _OPEN_MOST = 0.02, 0.5  # the same for the streams it opens again, and at most
_FRESH = 2.0  # seconds in which those who gain a slot read the records and open their streams
_MANY = 1_000


class Fleet:
    """Knows the live runners by their records, and so this runner's slots.

    Args:
        me: this runner as a member.
        free: how many more jobs it could run now.
        who: its name and owner, for events.

    """

    def __init__(
        self, store: Store, backlog: Backlog, clock: ServerClock, trust: Trust, settings: Settings,
        outage: Outage, me: Callable[[], Member], free: Callable[[], int], who: Callable[[], dict[str, str]],
    ) -> None:  # fmt: skip
        self._store = store
        self._backlog = backlog
        self._clock = clock
        self._trust = trust
        self._horizon = settings.period + _AHEAD
        self._grace = settings.beat + settings.margin
        self._renewed_ms = (settings.lease - 2 * settings.beat) * 1000  # what a lease has left, if it is
        self._listens = settings.poll is None
        self._outage = outage
        self._me = me
        self._free = free
        self._who = who
        self._kinds = sorted(me().kinds)
        self._shares: dict[str, Share] = dict.fromkeys(self._kinds, ALL)
        self._left: dict[str, dict[int, float]] = {kind: {} for kind in self._kinds}
        self._live: frozenset[str] = frozenset()
        self._gone: deque[str] = deque(maxlen=_MANY)
        self._known = False
        self._coming: asyncio.TimerHandle | None = None
        self._filter: Any = None  # what the stream has been opened with
        self._gained: set[str] = set()  # kinds with slots that no filter has yet
        self._opening: set[str] = set()  # those whose slots are in the filter that is opened
        self._shift = asyncio.Event()
        self._looks: list[tuple[float, int, Any]] = []
        self._planned: dict[Any, float] = {}
        self._skipped = False
        self._late: deque[Any] = deque(maxlen=_MANY)  # what a look was due at while this runner was full
        self._sequence = itertools.count()
        self._asked: dict[str, tuple[float, float]] = {}
        self._work = asyncio.Event()
        self._passing = Passing(store, backlog, clock, free, who, self._work.set)

    def join(self, stream: Listening, waker: Taking, sweeper: Reading) -> None:
        """Come to know the other roles."""
        self._stream, self._waker, self._sweeper = stream, waker, sweeper
        self._passing.join(sweeper)

    @property
    def deaf(self) -> bool:
        """Whether there is no live stream."""
        return not self._listens or self._stream.state != "live"

    def condition(self, stopping: bool) -> tuple[int, str | None]:
        """What the record says of this runner: free slots, and why it does not listen. In the beat's thread too."""
        deaf = self._stream.state if self._stream.state in ("degraded", "refused") else None
        away = "stopping" if stopping else deaf if self._listens else "polling"
        return 0 if stopping else self._free(), away

    # ---- who there is, and what this runner hears

    def seen(self, records: Sequence[Mapping[str, Any]]) -> None:
        """The records were read: share the slots out again if the fleet has changed."""
        if not self._listens:
            return
        now, judge = self._clock.now_ms(), self._trust.may_fence()
        gone = {record_id(owner) for owner in self._gone}  # no owner comes back
        live = [one for one in records if listens(one, now, judge) and str(one["_id"]) not in gone]
        members = [member_of(record) for record in live]
        self._live = frozenset(one.owner for one in members)
        self._take(shares(self._me(), members))
        # to one that has died since, a job would be passed in vain: its record is no longer renewed
        since = now + self._renewed_ms
        free = [
            one
            for one, record in zip(members, live, strict=True)
            if whole(record.get("free")) > 0 and (date_ms(record.get("ends")) or 0) >= since
        ]
        self._passing.seen({one.owner: one.kinds for one in free if one.owner != self._trust.owner})
        if self._passing.room:
            while self._late:
                self.watch(self._late.popleft(), 0.0)

    def heard(self) -> dict[str, frozenset[int] | None]:
        """The slots that the stream is to tell of, by kind; None for all. What it says is then the filter."""
        self._opening, self._gained = self._opening | self._gained, set()
        out = self._hears()
        self._filter = groups(out)
        return out

    def _hears(self) -> dict[str, frozenset[int] | None]:
        now = boot()
        out: dict[str, frozenset[int] | None] = {}
        for kind, share in self._shares.items():
            left = self._left[kind] = {slot: until for slot, until in self._left[kind].items() if until > now}
            out[kind] = None if share.heard is None else share.heard | frozenset(left)
        return out

    def changed(self, gone: str | None = None) -> None:
        """A runner came, or said that it goes: have the records read, though not by the whole fleet at once.

        ``gone`` is one whose record was deleted, which mostly had said that it goes; a quick stop leaves no time for it.
        """
        if gone is not None:
            self._gone.append(gone)  # a read of the records may be under way that has it still
        if self._coming is None and (gone is None or gone in self._live):
            wait = 0.01 + random.uniform(0, min(_EACH * max(1, len(self._live)), self._horizon))  # noqa: S311 - only to spread
            self._coming = asyncio.get_running_loop().call_later(wait, self._come)

    def _come(self) -> None:
        self._coming = None
        self._sweeper.wake()

    def lag(self, kind: str, id_: Any) -> float:
        """Seconds after it is due that this runner should take a job of a kind: 0 is at once."""
        share, slot = self._shares.get(kind, ALL), slot_of(id_)
        if share.holds is None or slot in share.holds:
            return 0.0
        if slot in share.watches:
            return WATCH
        lost = self._left[kind].get(slot)  # until others hear it, as soon as its watcher would
        return ASIDE if lost is None or lost - boot() < self._grace - _FRESH else WATCH

    def shared(self, kind: str) -> bool:
        """Whether the slots of a kind are shared out, rather than all listening to all."""
        return self._shares.get(kind, ALL).holds is not None

    def _take(self, new: dict[str, Share]) -> None:
        """Take a change in: what is lost is heard for a while yet, what is gained is read once it is heard."""
        old, self._shares = self._shares, new
        if old == new and self._known:
            return
        until = boot() + self._grace
        for kind, share in new.items():
            before = old[kind].heard
            if self._known and share.heard is not None:
                every = frozenset(range(256)) if before is None else before
                self._left[kind].update(dict.fromkeys(every - share.heard, until))
            if before is not None and (share.heard is None or share.heard - before):
                self._gained.add(kind)
        if events.wanted("debug"):
            told = [share for share in new.values() if share.holds is not None]
            events.emit_wanted(
                "slots.changed", **self._who(), runners=max(1, len(self._live)), kinds=[k for k in new if self.shared(k)],
                holds=len(set[int]().union(*(share.holds or () for share in told))),
                watches=len(set[int]().union(*(share.watches for share in told))),
            )  # fmt: skip
        self._known = True
        self._shift.set()

    async def follow(self) -> None:
        """Keep the stream's filter true; runs until cancelled.

        Not at the same moment as the others: meanwhile a slot's other runner serves it, and what changes is one opening.
        """
        while True:
            ends = [until for left in self._left.values() for until in left.values()]
            timer = None
            if ends:
                wait = max(0.0, max(ends) - boot()) + 0.01
                timer = asyncio.get_running_loop().call_later(wait, self._shift.set)
            try:
                await self._shift.wait()
            finally:
                if timer is not None:
                    timer.cancel()
            spread = min(_OPEN * len(self._live), _OPEN_MOST, self._grace / 4)
            await asyncio.sleep(random.uniform(0, spread))  # noqa: S311 - only to spread
            self._shift.clear()
            if groups(self._hears()) != self._filter:
                await self._stream.reopen(quietly=True)

    def refiltered(self) -> None:
        """The stream is open with its new filter: read what came to slots while nobody may have heard them."""
        gained, self._opening = self._opening, set()
        for kind in gained:
            self._waker.restart(kind)

    # ---- what others should have taken by now

    def watch(self, id_: Any, lag: float, runat: int | None = None) -> None:
        """Look in a while whether somebody has taken a job; ``runat`` in ms since 1970 UTC, None for now."""
        early = 0.0 if runat is None else max(0.0, (runat - self._clock.now_ms()) / 1000)
        at, name = boot() + early + lag, id_key(id_)
        if early > self._horizon or len(self._looks) >= LIMIT or self._planned.get(name, at + 1) <= at:
            return
        self._planned[name] = at
        heapq.heappush(self._looks, (at, next(self._sequence), id_))
        if self._looks[0][2] is id_:
            self._work.set()

    def sift(self, found: Sequence[Candidate]) -> list[Candidate]:
        """Of what was read, what this runner should know; what has just fallen due is left to its holder."""
        now = self._clock.now_ms()
        out: list[Candidate] = []
        for one in found:
            lag = self.lag(one.kind, one.id)
            if not lag or one.due + lag * 1000 <= now:
                out.append(one)
                if lag and one.due + ASIDE * 1000 <= now:
                    self._asked.pop(
                        one.kind, None
                    )  # others leave work: ask for more as soon as there is a slot
            elif lag < ASIDE or one.runat <= now:
                self.watch(one.id, lag, min(one.due, round(now)) if one.asap else one.runat)
        return out

    async def run(self) -> None:
        """Look and pass on; runs until cancelled."""
        try:
            await self._run()
        finally:
            self._passing.over()

    async def _run(self) -> None:
        while going():
            self._work.clear()
            try:
                with pymongo.timeout(COMMAND_TIMEOUT):
                    for one in await self._passing.write():
                        self.watch(one.id, ASIDE)  # it may have been passed to one that has died
                    await self._look()
            except (PyMongoError, BSONError) as error:
                self._outage.failed("fleet", error)
                await asyncio.sleep(_AGAIN)  # the fallback bounds it
                continue
            self._outage.over("fleet")
            wait = max(self._looks[0][0] - boot(), _TOGETHER) if self._looks else 86_400.0  # woken for any
            if self._late:
                wait = min(wait, max(self._passing.pause, _TOGETHER))
            timer = asyncio.get_running_loop().call_later(wait, self._work.set)
            try:
                await self._work.wait()
            finally:
                timer.cancel()

    async def _look(self) -> None:
        now = boot()
        ids: list[Any] = []
        while self._looks and self._looks[0][0] <= now and len(ids) < _MANY:
            _, _, id_ = heapq.heappop(self._looks)
            self._planned.pop(id_key(id_), None)
            ids.append(id_)
        full = self._free() <= 0
        if full and not self._passing.room:
            self._late.extend(ids)
            if self._late:
                self._skipped = True  # whoever gets a free slot asks what is due
                self._passing.ask()
            return
        if not full:
            self._late.clear()
        if not ids:
            return
        try:
            rows = await self._store.rows(ids)
        except PyMongoError:
            for id_ in ids:
                self.watch(id_, _AGAIN)
            raise
        for row in rows:
            candidate = candidate_of(row, "look")
            if candidate is not None and candidate.status in RUNNABLE:
                self._waker.offer(candidate)
                if full:  # its holder is dead, or full as well
                    self.holding(candidate)

    # ---- what this runner can't take, and what it could take more

    def holding(self, candidate: Candidate) -> None:
        """It is for this runner to see to it that a job that is due is claimed: pass it on unless it is taken soon."""
        if self.shared(candidate.kind):
            self._passing.add(candidate)

    def due(self, found: Sequence[Candidate]) -> None:
        """These have fallen due, or were read by themselves: those of this runner's slots it may have to pass on."""
        for one in found:
            if not self.lag(one.kind, one.id):
                self.holding(one)

    def passed(self, kind: str) -> None:
        """A job was passed to this runner: more may wait where it came from."""
        self._asked.pop(kind, None)
        self._want(kind)

    def freed(self, kind: str) -> None:
        """A job of a kind has ended: look for more if this runner was full and knows of none."""
        if self._skipped and self._free() > 0:  # a look, at a job of whatever kind, was left out
            self._skipped = False
            for one in filter(self.shared, self._shares):
                self._waker.restart(one)
        elif self.shared(kind) and self._free() <= 1 and not self._backlog.knows(kind):
            self._want(kind)

    def _want(self, kind: str) -> None:
        before, pause = self._asked.get(kind, (float("-inf"), _ASK))
        now = boot()
        if now - before >= pause:
            self._asked[kind] = (now, min(2 * pause, _ASK_MOST))
            self._waker.restart(kind)
