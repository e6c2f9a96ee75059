"""Waking: one change stream, and the supervisor that keeps it open.

The reader is a plain task outside every cancel scope: cancelling a read closes the stream, and a scope that
delivers its cancellation again and again leaks the stream's cursor on the server.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from pymongo.errors import ConfigurationError, ConnectionFailure, OperationFailure, PyMongoError
from pymongo.read_concern import ReadConcern

from streamjobs import events
from streamjobs.clients import close as close_bounded
from streamjobs.clock import boot
from streamjobs.job import MS_CODEC, RUNNABLE
from streamjobs.runner.lease import record_id
from streamjobs.runner.slots import digits, expression, groups
from streamjobs.runner.tasks import end_task

#: Errors after which the token is useless: history lost, invalidated, a resume that can't be, an event too large.
_GAP = {286, 280, 40576, 260, 10334, 9}
#: What a server says that gives no stream here: standalone, no privilege, not allowed by the host.
_REFUSED = {40573, 13, 8000, 115, 304, 59, 40415, 40324}
_RUNNABLE = [int(status) for status in RUNNABLE]
_ENDS = ["drop", "rename", "dropDatabase", "invalidate"]
#: Ids of the runners' records, as a range (";" follows ":"): a server may compile an expression anew for each event.
_RECORDS = {"$gte": record_id(""), "$lt": record_id("")[:-1] + ";"}
_NEAR, _FAR = 1.0, 30.0  # longest backoff in seconds: no server reachable; refused by the server
_HAD = 0.0002  # seconds: an event that came sooner was one of a batch that the driver had already
_DEAD = 30.0  # seconds of failed reopening after which the stream counts as degraded
_TIMES = 4  # failures that the server itself answered after which it does


#: What is heard of each kind: its slots, or None for all.
Heard = Mapping[str, frozenset[int] | None]


def pipeline(heard: Heard, owner: str, past: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """The server's part of waking: wakes for these kinds, messages to this owner, and nothing of the payload.

    ``past`` is the event that a stream which is opened again has come to. A server meets it once more and keeps it to
    itself; where the filter drops it, because the slots or the owner have changed, it cannot resume (error 280).
    """
    kinds = list(heard)
    again = [] if past is None else [_event(past)]
    change = "updateDescription.updatedFields"
    written = {"operationType": {"$in": ["insert", "replace"]}}
    mine = record_id(owner)
    others = {**_RECORDS, "$ne": mine}
    update = {"operationType": "update"}
    told = [
        {**written, "fullDocument.kind": {"$in": kinds}, "fullDocument.status": {"$nin": [2, 4, 5, 6]},
         "fullDocument.wake.by": {"$ne": owner}, "fullDocument.passed.to": {"$in": [None, owner]}},
        {**update, f"{change}.wake.kind": {"$in": kinds}, f"{change}.wake.by": {"$ne": owner}},
        {**update, f"{change}.passed.to": owner},
        # an update that makes a job claimable without a whole wake: somebody's hand, another version
        {**update, f"{change}.status": {"$in": _RUNNABLE}, f"{change}.wake.kind": {"$exists": False}},
        {"operationType": "insert", "fullDocument.control": "runner"},
        {**update, "documentKey._id": others, f"{change}.away": {"$exists": True}},
        {"operationType": "replace", "documentKey._id": others, "fullDocument.away": {"$exists": True}},
        {**update, "documentKey._id": mine, f"{change}.fenced": {"$exists": True}},
        {"operationType": "replace", "documentKey._id": mine, "fullDocument.fenced": {"$exists": True}},
        {"operationType": "delete", "documentKey._id": _RECORDS},
        {"operationType": {"$in": _ENDS}},
        *again,
    ]  # fmt: skip
    full = "$fullDocument"
    fields = {
        "operationType": 1,
        "documentKey": 1,
        "kind": f"{full}.kind",
        "status": {"$ifNull": [f"{full}.status", f"${change}.status"]},
        "runat": f"{full}.runat",
        "created": f"{full}.created",
        "retries": f"{full}.retries",
        "control": f"{full}.control",
        "data": {"$type": f"{full}.data"},
        "wake": f"${change}.wake",
        "passed": {"$ifNull": [f"{full}.passed", f"${change}.passed"]},
    }
    told_of: list[dict[str, Any]] = [{"$match": {"$or": told}}, {"$project": fields}]
    if any(slots is not None for slots in heard.values()):
        fields["slot"] = expression("$documentKey._id")
        told_of.append({"$match": {"$or": [*_in_slots(heard, owner), *again]}})
    return told_of


def _event(past: Mapping[str, Any]) -> dict[str, Any]:
    """Matches one event; by its document too, which a server can compare before it has made an event of an entry."""
    return {"documentKey._id": {"$eq": past["documentKey"]["_id"]}, "_id": {"$eq": past["_id"]}}


def _in_slots(heard: Heard, owner: str) -> list[dict[str, Any]]:
    """What of it is to be heard: jobs by their slots, messages always."""
    out: list[dict[str, Any]] = [
        {"passed.to": owner},
        {"documentKey._id": _RECORDS},
        {"operationType": {"$in": _ENDS}},
    ]
    for kinds, slots in groups(heard):
        where = {} if slots is None else {"slot": {"$in": slots}}
        out += [{"kind": {"$in": kinds}, **where}, {"wake.kind": {"$in": kinds}, **where}]
    some = [slots for slots in heard.values() if slots is not None]
    hand: dict[str, Any] = {"operationType": "update", "wake.kind": {"$exists": False}}
    if len(some) == len(heard):  # an update by hand names no kind
        hand["slot"] = {"$in": digits(frozenset[int]().union(*some))}
    return [*out, hand]


class _Reader:
    """One reading of the stream; another may take its place while it goes on."""

    def __init__(self, quietly: bool) -> None:
        self.task: asyncio.Task[None] | None = None
        self.quietly = quietly  # opened on purpose beside one that is read, and no failure yet
        self.ending = False
        self.tried = asyncio.Event()  # it was opened, or that failed

    @property
    def done(self) -> bool:
        """Whether it has ended."""
        return self.task is None or self.task.done()


class Stream:
    """Keeps one change stream open and tells what it says.

    Args:
        collection: of a client whose ``timeoutMS`` exceeds the wait.
        heard: gives the kinds served, and what is to be heard of each.
        owner: gives this runner's present owner id.
        runner: its name, for events.
        wait: longest wait of one read, in seconds.
        change: called with each event.
        opened: called when everything has to be read, because events may have been missed; with whether the stream
            begins now, and not where it had come to.
        refiltered: called when it was opened again on purpose and no event was missed by what it heard before.
        turn: awaited before the next read, for what an event has begun; short whatever happens.

    """

    def __init__(
        self, collection: Any, heard: Callable[[], Heard], owner: Callable[[], str], runner: str, wait: float,
        change: Callable[[dict[str, Any]], None], opened: Callable[[bool], None], refiltered: Callable[[], None],
        turn: Callable[[], Awaitable[None]],
    ) -> None:  # fmt: skip
        # a stream tells of what a majority has, and servers refuse any other read concern for it
        self._collection = collection.with_options(
            codec_options=MS_CODEC, read_concern=ReadConcern("majority")
        )
        self._heard = heard
        self._owner = owner
        self._runner = runner
        self._wait = wait
        self._change = change
        self._opened = opened
        self._refiltered = refiltered
        self._turn = turn
        self._reopening = asyncio.Lock()
        self._token: Any = None
        self._past: dict[str, Any] | None = None  # the last event, which the token may be of
        self._reader: _Reader | None = None  # whose word counts
        self._readers: set[_Reader] = set()
        self._changed = asyncio.Event()
        self._failing_since: float | None = None
        self._failures = 0
        self._backoff = 0.05
        self._closed = False
        self.state = "closed"
        self.error: BaseException | None = None
        self.last_return = boot()

    async def first(self) -> None:
        """Start, and return when the stream is live, degraded or refused for the first time."""
        self._start()
        while self.state not in ("live", "refused", "degraded"):
            self._changed.clear()
            await self._changed.wait()

    async def watch(self) -> None:
        """Notice a read that does not return; runs until cancelled."""
        limit = 2 * self._wait
        while True:
            await asyncio.sleep(max(0.05, self.last_return + limit - boot()))
            silent = boot() - self.last_return
            if silent >= limit and self.state == "live":
                self._say("degraded", f"the stream has not answered for {silent:.0f} s")
            if silent >= limit:
                await asyncio.sleep(min(1.0, limit))
                if self._reader is not None and self._reader.done:
                    self._start()

    async def reopen(self, *, quietly: bool = False) -> None:
        """Open again with a new filter, missing nothing: the owner has changed, or what is heard (quietly).

        Quietly, what was open is read until the new one is: on a busy server that takes a while, for a whole fleet
        at the same time. What both tell of comes twice, which harms nothing.
        """
        async with self._reopening:
            before = list(self._readers)
            beside = quietly and self.state == "live"
            if not beside:
                await self._end(before)
            reader = self._start(quietly=beside)
            if beside and reader is not None:
                await reader.tried.wait()
                await self._end(before)

    async def close(self) -> None:
        """Stop reading and free the server's cursor."""
        self._closed, self._reader = True, None
        await self._end(list(self._readers))
        self._say("closed", "the runner stops")

    def _start(self, *, quietly: bool = False) -> _Reader | None:
        if self._closed:
            return None
        reader = self._reader = _Reader(quietly)
        reader.task = asyncio.create_task(self._read(reader), name=f"streamjobs stream {self._runner}")
        reader.task.add_done_callback(lambda _: self._ended(reader))
        self._readers.add(reader)
        return reader

    def _ended(self, reader: _Reader) -> None:
        self._readers.discard(reader)
        reader.tried.set()

    async def _end(self, readers: Sequence[_Reader]) -> None:
        """End readers; the driver closes the stream, and so the server's cursor, when its read is cancelled.

        Closing the stream from here instead would race with the driver's own closing of it.
        """
        for reader in readers:
            reader.ending = True
            if reader.task is not None:
                await end_task(reader.task)

    async def _read(self, reader: _Reader) -> None:
        """Open, read, and open again, for ever, or until another has its place."""
        # looked at too, since the driver may turn a cancellation into an error of its own
        while not reader.ending and reader is self._reader:
            if self.state not in ("degraded", "refused") and not reader.quietly:
                self._say("connecting", "opening the stream")
            try:
                await self._once(reader)
            except Exception as error:  # noqa: BLE001 - whatever happens, it is opened again
                reader.quietly = False
                reader.tried.set()
                if not reader.ending and reader is self._reader:
                    await self._failed(error)

    async def _once(self, reader: _Reader) -> None:
        resumed = self._token is not None
        stream = await self._collection.watch(
            pipeline(self._heard(), self._owner(), self._past),
            max_await_time_ms=int(self._wait * 1000),
            resume_after=self._token,
            comment=f"streamjobs {self._runner}",
        )
        try:
            if reader is not self._reader:
                return
            # to be opened again from here, though nothing was read
            self._token = stream.resume_token or self._token
            self._live(reader, resumed)
            while stream.alive and not reader.ending:
                asked = boot()
                change = await stream.try_next()
                returned = boot()
                counts = reader is self._reader  # else another is opened, from where this one had come to
                if counts:
                    self.last_return = returned
                if counts and self.state == "degraded":
                    self._live(reader, resumed=True)
                if change is not None and change["operationType"] in _ENDS:
                    if counts:
                        self._gap(f"the collection was changed: {change['operationType']}", None)
                    return
                if change is not None:
                    self._change(change)
                # the claim that this has woken goes now; and a dead stream returns at once, without a turn of the loop
                await asyncio.sleep(0)
                if reader is self._reader:
                    self._token = stream.resume_token or self._token
                    self._past = change or self._past
                    if change is not None and returned - asked > _HAD:
                        await self._turn()  # and is answered before the next read
            if not reader.ending and reader is self._reader:
                self._gap("the server closed the stream", None)
        finally:
            await _closed(stream)

    def _live(self, reader: _Reader, resumed: bool) -> None:
        self._failing_since, self._failures, self._backoff, self.error = None, 0, 0.05, None
        self.last_return = boot()
        self._say("live", "resumed" if resumed else "opened")
        quietly, reader.quietly = reader.quietly and resumed, False
        reader.tried.set()
        if quietly:
            self._refiltered()
        else:
            self._opened(not resumed)

    def _gap(self, reason: str, code: int | None) -> None:
        self._token = self._past = None
        self._say("gap", reason, code=code)

    async def _failed(self, error: Exception) -> None:
        """Decide what an error means, and wait as long as it deserves."""
        now = boot()
        self.error = error
        self._failing_since = self._failing_since or now
        self._failures += 1
        since = (now - self._failing_since) * 1000
        code = error.code if isinstance(error, OperationFailure) else None
        text = f"{type(error).__name__}: {error}"[:500]
        away = isinstance(error, ConnectionFailure) or (isinstance(error, PyMongoError) and error.timeout)
        if refused(error):
            self._token = self._past = None
            self._say("refused", text, code=code, since_ms=since)
        elif code in _GAP or (
            isinstance(error, OperationFailure) and error.has_error_label("NonResumableChangeStreamError")
        ):
            self._gap(text, code)
        elif since >= _DEAD * 1000 or (not away and self._failures >= _TIMES):
            self._say("degraded", f"not reopened for {since / 1000:.0f} s: {text}", code=code, since_ms=since)
        elif not isinstance(error, PyMongoError):
            self._gap(text, None)  # an event that the driver could not read: go past it
        elif self.state == "live":
            self._say("connecting", text, code=code)
        limit = _NEAR if away or code in _GAP else _FAR
        pause = min(self._backoff, limit) * random.uniform(0.5, 1.0)  # noqa: S311 - only to spread reopening
        self._backoff = min(2 * self._backoff, _FAR)
        await asyncio.sleep(pause)

    def _say(
        self, state: str, reason: str, *, code: int | None = None, since_ms: float | None = None
    ) -> None:
        if state != self.state:
            level = {"gap": "warning", "degraded": "warning", "refused": "error"}.get(state, "info")
            about = {
                "runner": self._runner,
                "owner": self._owner(),
                "state": state,
                "reason": events.printable(reason),
            }
            events.emit("stream.state", level=level, **about, code=code, since_ms=since_ms)
        self.state = state
        self._changed.set()


def refused(error: BaseException | None) -> bool:
    """Whether an error means that this server gives no change stream to this user."""
    if isinstance(error, ConfigurationError):
        return True
    return isinstance(error, OperationFailure) and error.code in _REFUSED


async def _closed(stream: Any) -> None:
    """Close a stream even while being cancelled, so that its cursor does not stay on the server."""
    closing = asyncio.ensure_future(close_bounded(stream))
    try:
        await asyncio.shield(closing)
    except asyncio.CancelledError:
        await asyncio.wait([closing])
        raise
    except PyMongoError:
        pass  # the server is away, and its cursor with it
