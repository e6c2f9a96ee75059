"""What may be claimed next: plain data, no input or output, no clock of its own.

Per kind there are four ranges under the one index: status new or waiting, each with ``runat`` zero in order
of (created, _id) and above zero in order of (runat, created, _id). A range is read in pages behind a cursor;
what the stream tells of is taken in directly unless the cursor will come to it. See ``docs/design.md`` 5.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from bson.datetime_ms import DatetimeMS
from bson.objectid import ObjectId

from streamjobs.job import ASAP_MS, RUNNABLE, date_ms, id_key

#: Rows in one read of a range; fewer in the first, for which the first job waits.
PAGE, FIRST = 5_000, 500
#: Timers kept, the earliest; candidates kept in a range from the stream.
LIMIT = 10_000
#: A range that holds due jobs gets at least one claim in this many.
TURN = 4
_EARLIEST = -(2**63)

Key = tuple[int, int, str]


@dataclass(slots=True, eq=False)
class Candidate:
    """A job that may be claimed. Dates in ms since 1970 UTC, ``seen`` in boot seconds.

    Attributes:
        retries: the attempts left, as far as is known.
        name: its id, as something that can be looked up.
        asap: whether it is to run as soon as possible.
        due: when it is due: an ASAP job when it was created.
        key: its place in its range.

    """

    id: Any
    kind: str
    status: int
    runat: int
    created: Any
    seen: float
    source: str
    retries: int = 0
    name: Any = field(init=False)
    asap: bool = field(init=False)
    due: int = field(init=False)
    key: Key = field(init=False)

    def __lt__(self, other: Candidate) -> bool:
        """Nothing: of two in one place (a text and a number may be one as texts) either may be first."""
        return False

    def __post_init__(self) -> None:
        ms = date_ms(self.created)
        created = _EARLIEST if ms is None else ms
        self.name = id_key(self.id)
        self.asap = self.runat == ASAP_MS
        self.due = created if self.asap else self.runat
        self.key = (self.due, created, str(self.id))

    @property
    def once(self) -> bool:
        """Whether it may start only once, or nobody knows."""
        return self.retries <= 1


@dataclass(slots=True, eq=False)
class Range:
    """One status of one kind, ASAP or dated: the candidates known, and how far it has been read."""

    kind: str
    status: int
    asap: bool
    heap: list[tuple[Key, Candidate]] = field(default_factory=list[tuple[Key, Candidate]])
    ids: dict[Any, float] = field(default_factory=dict[Any, float])  # and when each was last told of
    cursor: Candidate | None = None
    more: bool = True
    reading: bool = False
    restarted: bool = False  # while a read was in flight, whose page says nothing of the beginning
    passed: int = 0
    dropped: set[str] = field(default_factory=set[str])  # kinds of which too much was told to keep it

    @property
    def unread(self) -> bool:
        """Whether it must be read before it can be said what is next."""
        if not self.more or not self.heap:
            return self.more
        return self.cursor is not None and self.heap[0][0] > self.cursor.key

    @property
    def size(self) -> int:
        """Rows in its next read."""
        return FIRST if self.cursor is None else PAGE

    def push(self, candidate: Candidate) -> bool:
        """Take a candidate in, once."""
        if candidate.name in self.ids:
            self.ids[candidate.name] = candidate.seen
            return False
        if len(self.heap) >= LIMIT:
            self.restart()  # it will be read again from its beginning
            self.dropped.add(self.kind)
            return True
        self.ids[candidate.name] = candidate.seen
        heapq.heappush(self.heap, (candidate.key, candidate))
        return True

    def pop(self, after: int = 0) -> Candidate:
        """The earliest candidate, or the one so many places after it."""
        before = [heapq.heappop(self.heap) for _ in range(min(after, len(self.heap) - 1))]
        _, candidate = heapq.heappop(self.heap)
        for entry in before:
            heapq.heappush(self.heap, entry)
        self.ids.pop(candidate.name, None)
        self.passed = 0
        return candidate

    def drop(self, names: set[Any], before: float) -> None:
        """Forget candidates, unless they were told of since ``before``, in boot seconds."""
        gone = {name for name in names if self.ids.get(name, before) < before}
        if gone:
            self.heap = [entry for entry in self.heap if entry[1].name not in gone]
            heapq.heapify(self.heap)
            for name in gone:
                del self.ids[name]

    def restart(self) -> None:
        """Read it again from its beginning."""
        self.cursor, self.more, self.restarted = None, True, self.reading

    def will_read(self, candidate: Candidate) -> bool:
        """Whether the cursor has still to come to this candidate."""
        last = self.cursor
        if not self.more or self.reading or last is None or candidate.key[:2] != last.key[:2]:
            return self.more and not self.reading and (last is None or candidate.key > last.key)
        # among equal dates only ObjectIds are surely in the index's order here
        plain = isinstance(candidate.id, ObjectId) and isinstance(last.id, ObjectId)
        return plain and date_ms(candidate.created) is not None and candidate.key > last.key

    def queries(self, until: int) -> list[dict[str, Any]]:
        """Filters that together give what comes after the cursor, in order: equalities, then one range."""
        base: dict[str, Any] = {"kind": self.kind, "status": self.status}
        last = self.cursor
        upto = {"$lte": DatetimeMS(until)}
        if last is None:
            first: Any = DatetimeMS(ASAP_MS) if self.asap else _after(ASAP_MS) | upto
            return [{**base, "runat": first}]
        here = {**base, "runat": DatetimeMS(last.runat)}
        # a missing or foreign `created` sorts before the dates and brackets would hide them
        later = _after(ASAP_MS - 1 if (at := date_ms(last.created)) is None else at)
        made = last.created  # a foreign one may be a document that looks like a condition
        plain = made is None or isinstance(made, (datetime, DatetimeMS, str, int, float))
        steps = [
            {**here, "created": made if plain else {"$eq": made}, "_id": {"$gt": last.id}},
            {**here, "created": later},
        ]
        if not self.asap:
            steps.append({**base, "runat": _after(last.runat) | upto})
        return steps

    @property
    def order(self) -> list[tuple[str, int]]:
        """The sort of its queries."""
        return [("created", 1), ("_id", 1)] if self.asap else [("runat", 1), ("created", 1), ("_id", 1)]


def _after(ms: int) -> dict[str, Any]:
    """Dates after this one: from the next millisecond on, since a server may walk over all that equal a ``$gt``."""
    return {"$gte": DatetimeMS(ms + 1)} if ms < -_EARLIEST - 1 else {"$gt": DatetimeMS(ms)}


class Backlog:
    """The ranges of all kinds served, and the timers of what falls due soon.

    Args:
        kinds: the kinds served.
        horizon_ms: how far ahead timers are set: the fallback's period and a little.

    """

    def __init__(self, kinds: Iterable[str], horizon_ms: int) -> None:
        self.horizon_ms = horizon_ms
        #: Kinds of which wakes or timers were dropped: they are read again.
        self.dropped: set[str] = set()
        self._ranges = {
            kind: [
                Range(kind, int(status), asap, dropped=self.dropped)
                for status in RUNNABLE
                for asap in (True, False)
            ]
            for kind in kinds
        }
        self._turns: OrderedDict[str, None] = OrderedDict.fromkeys(self._ranges)
        self._in_turn = False  # the last was a range to read
        self._timers: list[tuple[int, int, Candidate]] = []
        self._timed: dict[Any, int] = {}
        self._cut = False
        self._sequence = itertools.count()
        self._taken: OrderedDict[Any, Key] = OrderedDict()
        self._bad: OrderedDict[Any, Any] = OrderedDict()  # left out, by name
        self._told: OrderedDict[Any, None] = OrderedDict()

    def offer(self, candidate: Candidate, now_ms: float, *, fresh: bool = False) -> bool:
        """Take in what a put, the stream or a claim told of; whether it was news.

        ``fresh`` is for inserts: one that this runner has taken already is no news.
        """
        ranges = self._ranges.get(candidate.kind)
        # one that was deleted and put again has its id, and another date
        if ranges is None or (fresh and self._taken.get(candidate.name) == candidate.key):
            return False
        self._bad.pop(candidate.name, None)  # somebody wrote it: it may be good now
        if candidate.runat > now_ms:
            return candidate.runat <= now_ms + self.horizon_ms and self._time(candidate)
        home = self._home(ranges, candidate)
        self._turns.setdefault(candidate.kind)
        return True if home is None or home.will_read(candidate) else home.push(candidate)

    def next(self, count: int, spread: int = 1, ahead: int = 0) -> list[Candidate] | Range | None:
        """Up to ``count`` candidates to claim, or a range to read first, or None: nothing may be claimed.

        What is known does not wait for more than one range to be read: reads and claims take turns.

        Up to ``ahead`` more follow as long as none of them all may start only once. With a ``spread`` above 1,
        each is one of the first so many at random: runners that compete for the same jobs then get in each
        other's way less.
        """
        out: list[Candidate] = []
        once = False
        while self._turns and len(out) < count + ahead:
            kind = next(iter(self._turns))
            ranges = self._ranges[kind]
            unread = next((one for one in ranges if one.unread), None)
            ready = [one for one in ranges if one.heap and not one.unread]
            if unread is not None and not (self._in_turn and ready):
                self._in_turn = not out
                return out or unread
            chosen = _choose(ready)
            if chosen is None:
                del self._turns[kind]
                continue
            passed = chosen.passed
            candidate = chosen.pop(random.randrange(spread) if spread > 1 else 0)  # noqa: S311 - only to spread
            once = once or candidate.once
            if once and len(out) >= count:
                chosen.push(candidate)
                chosen.passed = passed
                break
            self._turns.move_to_end(kind)
            for one in ranges:
                one.passed = one.passed + 1 if one.heap and one is not chosen else 0
            self._remember(self._taken, candidate.name, candidate.key)
            out.append(candidate)
        self._in_turn = False
        return out or None

    def ahead(self, count: int) -> list[Candidate]:
        """Some candidates that may be claimed soon, to look whether they are still to be had."""
        heaps = [one.heap for ranges in self._ranges.values() for one in ranges if one.heap]
        return [entry[1] for heap in heaps for entry in heap[: -(-count // len(heaps))]]

    def holds(self, candidate: Candidate) -> bool:
        """Whether a candidate waits here to be claimed, or will be read."""
        home = self._home(self._ranges.get(candidate.kind, []), candidate)
        return home is not None and (candidate.name in home.ids or home.will_read(candidate))

    def knows(self, kind: str) -> bool:
        """Whether there is something of a kind to claim, or to read."""
        return any(one.heap or one.more for one in self._ranges.get(kind, ()))

    def drop(self, names: set[Any], before: float) -> None:
        """Forget candidates that were no longer to be had at ``before``, in boot seconds; what was told since counts."""
        for ranges in self._ranges.values():
            for one in ranges:
                one.drop(names, before)

    def page(
        self, home: Range, rows: Sequence[Candidate], full: bool, now_ms: float, last: Candidate | None = None
    ) -> None:
        """Take in a page of a range: rows in its order, whether more may follow, and where it ended."""
        if not home.restarted:
            home.more = full
            home.cursor = last or (rows[-1] if rows else home.cursor)
        home.reading = home.restarted = False
        for row in rows:
            if row.name in self._bad:
                continue
            if row.runat <= now_ms:
                home.push(row)
            elif not self._time(row):
                # timers are full of earlier ones: read again when they have fired
                home.more = home.cursor is None
                break
        self._turns.setdefault(home.kind)

    def restart(self, kind: str) -> None:
        """Read all of a kind again from its beginning."""
        for one in self._ranges[kind]:
            one.restart()
        self._turns.setdefault(kind)

    def fire(self, now_ms: float) -> list[Candidate]:
        """Move timers that are due into their ranges; which."""
        fired: list[Candidate] = []
        while self._timers and self._timers[0][0] <= now_ms:
            _, _, candidate = heapq.heappop(self._timers)
            self._timed.pop(candidate.name, None)
            home = self._home(self._ranges[candidate.kind], candidate)
            if home is not None:
                home.push(candidate)
            self._turns.setdefault(candidate.kind)
            fired.append(candidate)
        if self._cut and not self._timers:
            self._cut = False
            for kind in self._ranges:
                self.restart(kind)
        return fired

    def again(self, candidate: Candidate, at_ms: int) -> None:
        """Try a candidate once more at this time."""
        if candidate.kind not in self._ranges:
            return  # somebody has given it another kind
        if self._timed.get(candidate.name, at_ms + 1) > at_ms:
            self._timed[candidate.name] = at_ms
            heapq.heappush(self._timers, (at_ms, next(self._sequence), candidate))

    @property
    def next_timer(self) -> int | None:
        """When the earliest timer is due, in ms since 1970 UTC on the server's clock."""
        return self._timers[0][0] if self._timers else None

    def leave_out(self, id_: Any) -> None:
        """Leave a document out until somebody writes it, or it is looked at again."""
        self._remember(self._bad, id_key(id_), id_)

    def left_out(self, count: int) -> list[Any]:
        """The ids of some that are left out, in turn: they may have been mended without a word."""
        names = list(itertools.islice(self._bad, count))
        for name in names:
            self._bad.move_to_end(name)
        return [self._bad[name] for name in names]

    def news(self, id_: Any) -> bool:
        """Whether a document has not been told of before."""
        new = id_key(id_) not in self._told
        self._remember(self._told, id_key(id_))
        return new

    def _time(self, candidate: Candidate) -> bool:
        known = self._timed.get(candidate.name)
        if known is not None and known <= candidate.runat:
            return True
        if len(self._timers) >= LIMIT:
            if not self._cut:
                self.dropped.add(candidate.kind)
            self._cut = True
            latest = max(self._timers)
            if candidate.runat >= latest[0]:
                return False
            self._timers.remove(latest)
            heapq.heapify(self._timers)
            self._timed.pop(latest[2].name, None)
        self._timed[candidate.name] = candidate.runat
        heapq.heappush(self._timers, (candidate.runat, next(self._sequence), candidate))
        return True

    @staticmethod
    def _home(ranges: list[Range], candidate: Candidate) -> Range | None:
        return next(
            (one for one in ranges if one.status == candidate.status and one.asap == candidate.asap), None
        )

    @staticmethod
    def _remember(ids: OrderedDict[Any, Any], name: Any, value: Any = None) -> None:
        ids[name] = value
        if len(ids) > 2 * LIMIT:
            ids.popitem(last=False)


def _choose(ready: list[Range]) -> Range | None:
    """The range with the earliest job, unless another would then wait for more than its turn."""
    if len(ready) < 2:
        return ready[0] if ready else None
    earliest = min(ready, key=lambda one: one.heap[0][0])
    others = sorted((one for one in ready if one is not earliest), key=lambda one: -one.passed)
    if any(one.passed + 1 + place >= TURN for place, one in enumerate(others)):
        return max(ready, key=lambda one: one.passed)
    return earliest
