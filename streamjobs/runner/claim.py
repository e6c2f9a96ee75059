"""Claiming: candidates and free slots → jobs in hand.

One loop with at most one round trip under way; what is offered meanwhile goes with the next. Beyond the free slots
only jobs that may start more than once are claimed, and only as many as begin in a moment.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pymongo
from bson.dbref import DBRef
from bson.errors import BSONError
from bson.raw_bson import RawBSONDocument
from pymongo.errors import OperationFailure, PyMongoError

from streamjobs import events
from streamjobs.clients import COMMAND_TIMEOUT
from streamjobs.clock import ServerClock, boot
from streamjobs.handler import Handler
from streamjobs.job import RUNNABLE, id_key, problem_of
from streamjobs.runner.backlog import Backlog, Candidate, Range
from streamjobs.runner.held import Ended, Held, hold
from streamjobs.runner.lease import Trust
from streamjobs.runner.outage import Outage, Pause
from streamjobs.runner.store import Store, candidate_of, last_of

_TURN = 0.005  # seconds, at most, that others wait for a round trip
_AHEAD_MS = 0.5  # a timer fires this late, so that the server's clock agrees more often than not
_EARLY_MS = 2
_SPREAD = 64  # at most: how far apart competing runners choose
_AGAIN = 1_000  # documents left out that are looked at in a period
_AHEAD = 200  # candidates that are looked at with those that were missed
_BATCH = 200  # jobs in one claim, at most
_UNRECORDED = 2 * _BATCH  # jobs in hand beyond the slots, at most: their outcomes are still to be written
_SURE = 8  # certain reads at once: mongod confirms each with a majority
_NEVER = frozenset({2, 66, 121, 10334, 17419, 17420})


@dataclass(slots=True)
class _Unsettled:
    """A claim that got no answer: what is still to be looked up, and what was found."""

    owner: str
    token: str
    left: list[Candidate]
    asked: int
    count: int = 0


class Claimer:
    """The claim loop.

    Args:
        slots: how many handlers run at once.
        room: how many jobs would begin at once, and how many more soon.
        start: called with each job in hand.
        unusable: called with one that was claimed and can't be decoded, and how it ended.

    """

    def __init__(
        self, store: Store, backlog: Backlog, clock: ServerClock, trust: Trust, handlers: Mapping[str, Handler],
        slots: int, runner: str, outage: Outage, room: Callable[[], tuple[int, int]],
        start: Callable[[Held], None], unusable: Callable[[Held, Ended], None],
    ) -> None:  # fmt: skip
        self._store = store
        self._backlog = backlog
        self._clock = clock
        self._trust = trust
        self._handlers = handlers
        self._most = slots + _UNRECORDED
        self._runner = runner
        self._outage = outage
        self._pause = Pause()
        self._room = room
        self._start = start
        self._unusable = unusable
        self._wake = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._turn: asyncio.Future[None] | None = None
        self._under_way = False
        self._unsettled: list[_Unsettled] = []
        self._strays: list[Any] = []
        self._refused: set[str] = set()  # tokens whose outcome the server did not take
        self._cautious = 0  # claims to make one by one, after one that the server refused
        self._spread = 1
        self._stopping = False
        self.sift: Callable[[Sequence[Candidate]], Sequence[Candidate]] = lambda found: found
        self.due: Callable[[Sequence[Candidate]], None] = lambda _found: None
        self.ended = asyncio.Event()  # not running
        self.ended.set()
        self.held: dict[tuple[str, Any], Held] = {}
        self.in_flight: set[str] = set()

    def wake(self, *, answered: bool = False) -> None:
        """Something may have become claimable: a candidate, a slot, trust (of which the server has just ``answered``)."""
        self._wake.set()
        if answered:
            self._pause.cut()

    def look_up(self, id_: Any) -> None:
        """Someone made this job claimable without saying what it is: read it before claiming."""
        if not isinstance(id_, DBRef):  # which store.candidate_of would refuse
            self._strays.append(id_)
            self.wake()

    async def turn(self) -> None:
        """Wait, for a moment at most, until the round trip is over that is under way or was just asked for.

        For the stream: a read that begins beside a claim takes a third of its time again from it, on the same loop.
        """
        if not self._wake.is_set() and not self._under_way:
            return
        loop = asyncio.get_running_loop()
        self._turn = loop.create_future()
        timer = loop.call_later(_TURN, self._turned)
        try:
            await self._turn
        finally:
            timer.cancel()

    def _turned(self) -> None:
        if self._turn is not None and not self._turn.done():
            self._turn.set_result(None)

    def look_again(self) -> None:
        """Read some of what is left out: it may have been mended in a way that no stream tells of."""
        for id_ in self._backlog.left_out(_AGAIN):
            self.look_up(id_)

    def stop(self) -> None:
        """Claim no more; :meth:`run` returns when the round trip under way is over."""
        self._stopping = True
        self.wake()

    def settled(self, held: Held) -> None:
        """The outcome of a job in hand is settled: its slot is free."""
        self.held.pop((held.token, id_key(held.job.id)), None)
        if held.refused:
            self._refused.add(held.token)
        self.wake()

    @property
    def tokens(self) -> set[str]:
        """The tokens that this runner knows it holds, or may."""
        # after the end nobody settles any more: what landed is released as an orphan
        unsettled = (
            set[str]() if self._stopping and self.ended.is_set() else {one.token for one in self._unsettled}
        )
        return {held.token for held in self.held.values()} | self.in_flight | unsettled | self._refused

    async def run(self) -> None:
        """The loop; returns after :meth:`stop`."""
        self.ended.clear()
        try:
            while not self._stopping:
                self._wake.clear()
                self._under_way = True
                try:
                    with pymongo.timeout(COMMAND_TIMEOUT):
                        busy = await self._step()
                except (PyMongoError, BSONError) as error:
                    self._outage.failed("claim", error)
                    await self._pause.wait(error)
                    continue
                finally:
                    self.in_flight.clear()  # not sooner: an orphan is what nobody is still looking at
                    self._under_way = False
                    self._turned()
                if busy:
                    self._pause.succeeded()
                    self._outage.over("claim")
                if not busy and not self._stopping:
                    self._arm()
                    await self._wake.wait()
        finally:
            if self._timer is not None:
                self._timer.cancel()
            self.ended.set()

    async def _step(self) -> bool:
        """One round trip, if there is a reason for one."""
        if not self._trust.holds():
            return False
        if self._unsettled:
            await self._settle()
            return True
        if self._strays:
            await self._read_strays()
            return True
        self.due(self._backlog.fire(self._clock.now_ms() - _AHEAD_MS))
        if self._backlog.dropped:
            kinds = sorted(self._backlog.dropped)
            events.emit("wake.dropped", kinds=kinds, runner=self._runner, owner=self._trust.owner)
            self._backlog.dropped.clear()
        free, soon = (0, 0) if len(self.held) >= self._most else self._room()
        if self._cautious:
            free, soon = min(free, 1), 0
        free = min(free, _BATCH)
        soon = min(soon, _BATCH - free)
        found = self._backlog.next(free, self._spread, soon) if free + soon > 0 else None
        if found is None:
            return False
        if isinstance(found, Range):
            await self._read(found)
        else:
            await self._claim(found, ahead=len(found) > free)
        return True

    async def _read(self, home: Range) -> None:
        home.reading = True
        try:
            rows, full = await self._store.page(home, round(self._clock.now_ms()) + self._backlog.horizon_ms)
        finally:
            home.reading = False
        good = self.sift(self._candidates(rows, "read"))
        last = last_of(rows, home)
        self._backlog.page(home, good, full and last is not None, self._clock.now_ms(), last)

    async def _read_strays(self) -> None:
        ids, self._strays = self._strays[:1000], self._strays[1000:]
        try:
            rows = await self._store.rows(ids)
        except PyMongoError:
            self._strays += ids
            raise
        good: list[Mapping[str, Any]] = []
        for row in rows:
            if problem := problem_of(row):
                self.unreadable(row["_id"], problem)
            else:
                good.append(row)
        found = self._candidates(good, "stream")
        for candidate in found:
            self._backlog.offer(candidate, self._clock.now_ms())
        self.due(found)

    def _candidates(self, rows: Sequence[Mapping[str, Any]], source: str) -> list[Candidate]:
        """Those rows that can be jobs; the others are reported."""
        good: list[Candidate] = []
        for row in rows:
            candidate = candidate_of(row, source)
            if candidate is None:
                self.unreadable(
                    row.get("_id"), problem_of({"data": {}, **row}) or "its fields have the wrong types"
                )
            else:
                good.append(candidate)
        return good

    async def _claim(self, wanted: Sequence[Candidate], *, ahead: bool) -> None:
        token, owner, sent = os.urandom(12).hex(), self._trust.owner, boot()
        ids = [one.id for one in wanted]
        self.in_flight.add(token)
        try:
            documents = await self._store.claim(ids, self._handlers.keys(), owner, token, ahead=ahead)
        except PyMongoError as error:
            if _is_refusal(error) and len(ids) == 1:
                self.unreadable(ids[0], f"the server refuses to claim it: {error}"[:500])
                return
            self._cautious = len(ids) if _is_refusal(error) else 0
            self._unsettled.append(_Unsettled(owner, token, list(wanted), len(ids)))
            about = events.about(error)
            events.emit("claim.unknown", asked=len(ids), runner=self._runner, owner=owner, **about)
            raise
        self._cautious = max(0, self._cautious - 1)
        taken = self._take(documents, wanted, owner, token)
        if len(ids) == 1:
            await asyncio.sleep(0)  # its handler begins before all that follows here
        if events.wanted("debug"):
            took = (boot() - sent) * 1000
            events.emit_wanted(
                "claim", count=taken, asked=len(ids), took_ms=took, runner=self._runner, owner=owner
            )
        if taken == len(ids):
            self._spread = max(1, self._spread // 2)
        else:
            if 2 * taken <= len(ids):
                self._spread = min(_SPREAD, 2 * self._spread)
            missed = [one for one in wanted if (token, one.name) not in self.held]
            try:
                ours = await self._judge(missed, token)
            except PyMongoError:
                self._unsettled.append(_Unsettled(owner, token, missed, len(missed)))
                raise
            if ours:  # claimed by a call whose reply was lost, and whose repetition found nothing to claim
                known = [one for one in missed if one.name in ours]
                self._unsettled.append(_Unsettled(owner, token, known, len(known)))

    async def _settle(self) -> None:
        """Look up a claim that got no answer; what lands later still is released as an orphan."""
        claim = self._unsettled[0]
        some, claim.left = claim.left[:_SURE], claim.left[_SURE:]
        failed: Exception | None = None
        taken: list[RawBSONDocument] = []
        for one, found in zip(
            some, await self._store.surely_claimed([one.id for one in some], claim.token), strict=True
        ):
            if isinstance(found, Exception):
                failed = found
                claim.left.append(one)
            elif found is None:
                self._backlog.again(one, max(one.runat, round(self._clock.now_ms())))
            else:
                taken.append(found)
        claim.count += self._take(taken, some, claim.owner, claim.token)
        if failed is not None:
            raise failed
        if not claim.left:
            self._unsettled.pop(0)
            about = {"runner": self._runner, "owner": claim.owner}
            events.emit("claim.settled", count=claim.count, asked=claim.asked, **about)

    def _take(
        self, documents: Sequence[Mapping[str, Any]], wanted: Sequence[Candidate], owner: str, token: str
    ) -> int:
        """Begin what was claimed; how many."""
        known = {one.name: one for one in wanted}
        order = {one.name: place for place, one in enumerate(wanted)}
        taken: list[tuple[int, Held, Ended | None]] = []
        for document in documents:
            held, problem = hold(
                document, known, self._handlers, self._runner, owner, token, self._trust, self._clock.now_ms()
            )
            if held is not None:
                taken.append((order.get(id_key(held.job.id), 0), held, problem))
        for _, held, problem in sorted(taken, key=lambda one: one[0]):
            self.held[token, id_key(held.job.id)] = held
            if problem is not None:
                self._unusable(held, problem)
            else:
                self._start(held)
        return len(taken)

    async def _judge(self, missed: Sequence[Candidate], token: str) -> set[Any]:
        """Look at what was not claimed: taken by another runner, not due yet, or no job; those claimed all the same."""
        ahead, began = self._backlog.ahead(_AHEAD), boot()
        to_be_had: set[Any] = set()
        ours: set[Any] = set()
        looked_at = {one.name for one in missed}
        for row in await self._store.rows([one.id for one in [*missed, *ahead]]):
            name = id_key(row["_id"])
            if row.get("token") == token and name in looked_at:
                ours.add(name)
            if row.get("status") not in RUNNABLE and isinstance(row.get("status"), int):
                continue
            to_be_had.add(name)
            if name not in looked_at:
                continue
            problem = problem_of(row)
            candidate = candidate_of(row, "timer")
            if problem is not None or candidate is None:
                self.unreadable(row["_id"], problem or "its fields have the wrong types")
            else:  # the estimate of the server's clock is early: a little later, again
                now = round(self._clock.now_ms())
                self._backlog.again(candidate, max(candidate.runat, now + _EARLY_MS))
        self._backlog.drop({one.name for one in ahead} - to_be_had, began)
        return ours

    def unreadable(self, id_: Any, problem: str) -> None:
        """Leave out a document that can't be a job, and report it, once."""
        self._backlog.leave_out(id_)
        self.report(id_, problem)

    def report(self, id_: Any, problem: str) -> None:
        """Report a document that can't be a job, or can't be freed, once."""
        if self._backlog.news(id_):
            events.emit(
                "job.unreadable", job=id_, reason=problem, runner=self._runner, owner=self._trust.owner
            )

    def _arm(self) -> None:
        """Wake when the next timer is due."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        due = self._backlog.next_timer
        if due is not None and self._trust.holds():  # which wakes it when it comes back
            wait = max(0.0, (due + _AHEAD_MS - self._clock.now_ms()) / 1000)
            self._timer = asyncio.get_running_loop().call_later(wait, self.wake)


def _is_refusal(error: PyMongoError) -> bool:
    """Whether the server will never claim this: a validator, an odd ``_id``, a document without room for a lease."""
    return isinstance(error, OperationFailure) and error.code in _NEVER
