"""Finishing: outcome → one fenced write with the try in it → event.

One plain task, outside every cancel scope, with at most one round trip under way; what ends meanwhile goes
with the next. An outcome that can't be written is kept and written again: the token in its filter makes
that safe, and tells afterwards whether an earlier write has landed.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pymongo
from bson.errors import BSONError
from pymongo import UpdateMany, UpdateOne
from pymongo.errors import (
    AutoReconnect,
    BulkWriteError,
    DocumentTooLarge,
    PyMongoError,
    WriteConcernError,
    WriteError,
)

from streamjobs import events, transitions
from streamjobs.clients import COMMAND_TIMEOUT
from streamjobs.clock import ServerClock, boot
from streamjobs.job import Status
from streamjobs.runner.held import Ended, Held
from streamjobs.runner.outage import Pause
from streamjobs.runner.store import PASSING, SETTLED, Store, surely
from streamjobs.runner.tasks import end_task, going
from streamjobs.transitions import Change

_BATCH = 200
_END = 0.2  # seconds that the task gets to end


def change_of(held: Held, ended: Ended, owner: str, clock: ServerClock) -> Change:
    """The transition that an outcome is."""
    claim = held.claim(owner, random.getrandbits(31), clock)
    match ended.outcome:
        case "success":
            return transitions.succeed(claim)
        case "snoozed":
            return transitions.snooze(claim, round((ended.delay or 0.0) * 1000))
        case "cancelled":
            return transitions.cancel_by_handler(claim, ended.text)
        case "released":
            return transitions.release(claim, ended.text)
        case "interrupted":
            return transitions.interrupt(claim, ended.text)
        case "lost":
            return transitions.lose(claim, ended.text)
        case _:
            return transitions.fail(claim, ended.text, ended.trace)


@dataclass(slots=True, eq=False)
class _Write:
    held: Held
    ended: Ended
    change: Change
    refused: int = 0  # times that the server refused just this write
    alone: bool = (
        False  # the server refused it or one that was written with it: not together with others again
    )

    @property
    def status(self) -> Status:
        """The job's status after it."""
        return Status(self._fields["status"]["$literal"])

    @property
    def after_ms(self) -> int | None:
        """In how many milliseconds the job is due again, where that changes."""
        runat = self._fields.get("runat")
        return None if runat is None else int(runat["$dateAdd"]["amount"])

    @property
    def _fields(self) -> dict[str, Any]:
        fields: dict[str, Any] = self.change[1][0]["$set"]
        return fields


class Finisher:
    """Writes outcomes in the order they come.

    Attributes:
        done: called with each job whose outcome is settled, its status (INVALID where it was not recorded) and
            in how many milliseconds it is due again, where that changed.

    """

    def __init__(self, store: Store, clock: ServerClock, owner: Callable[[], str], runner: str) -> None:
        self._store = store
        self._clock = clock
        self._owner = owner
        self._runner = runner
        self._waiting: list[_Write] = []
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._kept = False
        self._pause = Pause()
        self._task: asyncio.Task[None] | None = None
        self.done: Callable[[Held, Status, int | None], None] = lambda _held, _status, _after: None

    def begin(self, ended: Callable[[asyncio.Task[None]], None]) -> None:
        """Begin to write; ``ended`` is called with the task when it has ended."""
        self._when_ended = ended
        self._task = asyncio.create_task(self._run(), name=f"streamjobs finish {self._runner}")
        self._task.add_done_callback(ended)

    async def begin_again(self) -> None:
        """Go on with what waits if another has ended the task: ``asyncio.run``, at its end, cancels all there are."""
        if self._task is not None and (self._task.done() or self._task.cancelling()):
            await end_task(self._task, _END)
            self.begin(self._when_ended)

    async def end(self) -> None:
        """Write no more."""
        if self._task is not None:
            await end_task(self._task, _END)

    def put(self, held: Held, ended: Ended) -> None:
        """Have an outcome written."""
        self._waiting.append(_Write(held, ended, change_of(held, ended, self._owner(), self._clock)))
        self._idle.clear()
        self._wake.set()

    @property
    def behind(self) -> bool:
        """Whether outcomes could not be written: the server is away."""
        return self._kept

    async def flushed(self) -> None:
        """Wait until nothing is left to write."""
        await self._idle.wait()

    def write_late(self, jobs: Any, held: Held, ended: Ended) -> None:
        """Write one outcome through a synchronous collection, after the loop that would have done it."""
        write = _Write(held, ended, change_of(held, ended, self._owner(), self._clock))
        matched = jobs.update_one(*write.change).matched_count
        self.done = lambda _held, _status, _after: None
        if matched:
            self._recorded(write)
        elif not self._settle(write, surely(jobs).find_one({"_id": held.job.id}, SETTLED)):
            raise AutoReconnect("nothing was written though the try still holds its job")  # so: again

    def give_up(self, held: Held, ended: Ended, why: str) -> None:
        """Say that an outcome can't be written."""
        self._not_recorded(
            _Write(held, ended, change_of(held, ended, self._owner(), self._clock)), why[:1000]
        )

    async def _run(self) -> None:
        """The task; ends by being cancelled."""
        self._wake.set()
        while going():
            await self._wake.wait()
            self._wake.clear()
            while self._waiting and going():
                batch = self._waiting[:_BATCH]
                settled: list[_Write] = []
                failed: Exception | None = None
                try:
                    with pymongo.timeout(COMMAND_TIMEOUT):
                        settled = await self._write(batch)
                except (PyMongoError, BSONError) as error:
                    failed = error
                    self._keep(error)
                gone = set(map(id, settled))
                self._waiting = [one for one in self._waiting if id(one) not in gone]
                if len(settled) == len(batch):
                    self._kept = False
                    self._pause.succeeded()
                else:
                    await self._pause.wait(failed)
            if not self._waiting:  # else this is ending, and the next task writes them
                self._idle.set()

    def _keep(self, error: Exception) -> None:
        if not self._kept:
            self._kept = True
            about = events.about(error)
            events.emit(
                "outcome.kept", count=len(self._waiting), runner=self._runner, owner=self._owner(), **about
            )

    async def _write(self, batch: list[_Write]) -> list[_Write]:
        """Write a batch; those that are settled, one way or another."""
        groups = _grouped(batch)
        failed: dict[int, Any] = {}
        matched = 0
        try:
            matched = await self._send(groups)
        except BulkWriteError as error:
            details: Any = error.details
            if details.get("writeConcernErrors"):
                raise  # written, but not by a majority yet: write again, the second finds its token
            failed = {one["index"]: one for one in details.get("writeErrors", [])}
            matched = details.get("nMatched", 0)
        except WriteConcernError:
            raise
        except (WriteError, DocumentTooLarge) as error:
            failed = {0: {"code": getattr(error, "code", None), "errmsg": str(error)}}
        good = [one for index, group in enumerate(groups) if index not in failed for one in group]
        clear = all(len(groups[index]) == 1 for index in failed)  # else some of a failed one's may be counted
        if clear and matched == len(good):
            for one in good:
                self._recorded(one)
        else:
            good = await self._looked_up(good)
        return good + [one for index, error in failed.items() for one in self._refused(groups[index], error)]

    async def _send(self, groups: list[list[_Write]]) -> int:
        changes = [transitions.together([one.change for one in group]) for group in groups]
        jobs = self._store.jobs
        if len(groups) == 1:
            update = jobs.update_one if len(groups[0]) == 1 else jobs.update_many
            return (await update(*changes[0])).matched_count
        writes: list[Any] = [
            (UpdateOne if len(group) == 1 else UpdateMany)(*change)
            for group, change in zip(groups, changes, strict=True)
        ]
        return (await jobs.bulk_write(writes, ordered=False)).matched_count

    def _refused(self, group: list[_Write], error: dict[str, Any]) -> list[_Write]:
        """The server refused just these: repeat each by itself, one with a short try; those that nothing helps."""
        if error.get("code") in PASSING:
            return []
        if len(group) > 1:  # some may be written: each is tried again, and looked up
            for one in group:
                one.alone = True
            return []
        write, message = group[0], str(error.get("errmsg"))[:1000]
        write.alone = True
        write.refused += 1
        if write.refused > 1:
            write.held.refused = True
            self._not_recorded(write, f"the server refused it: {message}")
            return group
        events.emit("outcome.overflow", **write.held.about(), message=message)
        write.change = transitions.overflow(write.held.claim(self._owner(), 0, self._clock))
        return []

    async def _looked_up(self, writes: list[_Write]) -> list[_Write]:
        """Those that are settled; one that can't be looked up now is written again."""
        settled: list[_Write] = []
        for one in writes:
            try:
                if await self._look_up(one):
                    settled.append(one)
            except (PyMongoError, BSONError) as error:
                self._keep(error)
        return settled

    async def _look_up(self, write: _Write) -> bool:
        """Settle a write that matched nothing: it landed before, or the job was taken; True when settled."""
        return self._settle(write, await self._store.settled(write.held.job.id))

    def _settle(self, write: _Write, document: Mapping[str, Any] | None) -> bool:
        """The same, by what was read of the job."""
        document, token = document or {}, write.held.token
        entry = next((one for one in _tries(document) if one.get("token") == token), None)
        if entry is not None:
            if entry.get("outcome") in {"lost", "released"} and entry["outcome"] != write.ended.outcome:
                self._not_recorded(write, "the job was taken back")
            else:
                self._recorded(write)
            return True
        found: Any = document.get("lease")
        lease: Any = found if isinstance(found, dict) else {}  # pyright: ignore[reportUnknownVariableType]
        if lease.get("token") == token:
            if document.get("status") == Status.WORKING:
                return False  # it is still ours: write it
            self._not_recorded(write, f"its status was changed to {document.get('status')!r} by another hand")
            return True
        known = lease or any(one.get("token") for one in _tries(document))
        self._not_recorded(
            write, "another try has the job" if known else "its tokens are gone: outcome unknown"
        )
        return True

    def _recorded(self, write: _Write) -> None:
        held, ended = write.held, write.ended
        now = boot()
        level = (
            "info"
            if ended.outcome in ("success", "snoozed", "cancelled", "released", "interrupted")
            else "warning"
        )
        if events.wanted(level):
            since = {
                "seen_ms": held.seen, "claimed_ms": held.claimed, "started_ms": held.started,
                "ended_ms": held.ended or now, "recorded_ms": now,
            }  # fmt: skip
            split = {
                key: None if at is None else self._clock.at_ms(at) - held.due for key, at in since.items()
            }
            events.emit_wanted(
                "try", level=level, **held.about(), outcome=ended.outcome, status=str(write.status), due=held.due,
                offset_ms=self._clock.offset_ms(), error=ended.error, message=events.printable(ended.text)[:1000] or None,
                delay=ended.delay, **split,
            )  # fmt: skip
        self.done(held, write.status, write.after_ms)

    def _not_recorded(self, write: _Write, reason: str) -> None:
        about = write.held.about()
        events.emit("outcome.lost", **about, outcome=write.ended.outcome, reason=reason)
        self.done(write.held, Status.INVALID, None)


def _grouped(batch: list[_Write]) -> list[list[_Write]]:
    """A batch as groups of neighbours that one statement can write: jobs of one claim that began and ended alike."""
    groups: list[list[_Write]] = []
    for one in batch:
        last = groups[-1][-1] if groups else None
        if last is None or one.alone or last.alone or not transitions.alike(last.change, one.change):
            groups.append([one])
        else:
            groups[-1].append(one)
    return groups


def _tries(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    tries: Any = document.get("tries")
    return [one for one in tries if isinstance(one, dict)] if isinstance(tries, list) else []  # pyright: ignore[reportUnknownVariableType]
