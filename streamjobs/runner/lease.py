"""The lease: a record that the runner renews from a thread of its own, and the trust that follows from it.

The thread has a synchronous client, so that a handler that blocks the event loop keeps its runner's jobs.
A runner trusts its lease until the moment it *sent* the last good renewal + lease - margin, by the boot clock.
"""

from __future__ import annotations

import os
import queue
import secrets
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pymongo
from pymongo import MongoClient
from pymongo.errors import PyMongoError

from streamjobs import events
from streamjobs.check import RECORD
from streamjobs.clients import HEARTBEAT_MS, Source, close_sync
from streamjobs.clock import boot
from streamjobs.job import date_ms
from streamjobs.runner.outage import SOON, unsent
from streamjobs.runner.slots import Member
from streamjobs.runner.turns import Turns
from streamjobs.settings import Settings
from streamjobs.transitions import Pipeline, literal
from streamjobs.version import __version__

CONTROL = "runner"
_PREFIX = RECORD
_NEVER = float("-inf")
_LAST = 0.5  # seconds for a command once the runner has stopped
_UNAUTHORIZED = 13
_RETRY = 0.5  # seconds between attempts while the server is away
_CONNECT_MS = 1_000  # at least; as a rule well below what a renewal may take: see clients.CONNECT_MS


def _renew_now() -> None:
    """A command that is told from others by its identity: the next renewal is due."""


def record_id(owner: str) -> str:
    """``_id`` of an owner's control document."""
    return _PREFIX + owner


def owner_of(record: str) -> str:
    """The owner that a control document's ``_id`` names."""
    return record.removeprefix(_PREFIX)


def listens(record: Mapping[str, Any], now_ms: float, judge: bool) -> bool:
    """Whether a record is that of a live runner that listens; a lease that is over counts where one may ``judge``."""
    there = record.get("fenced") is None and record.get("away") is None
    ends = date_ms(record.get("ends"))
    return there and ends is not None and (not judge or ends > now_ms)


def member_of(record: Mapping[str, Any]) -> Member:
    """Who shares the slots out, by its record."""
    found: Any = record.get("kinds")
    kinds: Any = found if isinstance(found, list) else []  # pyright: ignore[reportUnknownVariableType]
    weight = max(1, whole(record.get("slots")))
    return Member(owner_of(str(record["_id"])), frozenset(str(kind) for kind in kinds), weight)


def whole(value: Any) -> int:
    """A number of a record, 0 for anything else."""
    return value if isinstance(value, int) else 0


def fresh_owner() -> str:
    """An id that no other run of any process has: host, pid and random digits."""
    return f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(6)}"


def in_ms(milliseconds: int) -> dict[str, Any]:
    """The server's date so many milliseconds from now, as an expression."""
    return {"$dateAdd": {"startDate": "$$NOW", "unit": "millisecond", "amount": milliseconds}}


def fence() -> Pipeline:
    """Mark a record as fenced if its lease is over by the server's clock; once is for ever."""
    over = {"$lt": [{"$toLong": "$ends"}, {"$toLong": "$$NOW"}]}
    return [{"$set": {"fenced": {"$cond": [over, "$$NOW", "$fenced"]}}}]


def _told(state: tuple[int, str | None]) -> dict[str, Any]:
    """What a record says of its runner at the moment: free slots, and why it does not listen."""
    free, away = state
    return {"free": literal(max(0, free)), "away": "$$REMOVE" if away is None else literal(away)}


class Trust:
    """What this runner may believe of its own lease. Read from the loop and from handlers' threads."""

    def __init__(self, settings: Settings) -> None:
        self._span = settings.lease - settings.margin
        self._wait = settings.beat + settings.margin
        self._primary: object = None
        self.owner = ""
        self.until = _NEVER
        self.fence_from: float | None = None

    def holds(self, owner: str | None = None) -> bool:
        """Whether the lease of this owner (by default the present one) may be trusted now."""
        return (owner is None or owner == self.owner) and boot() < self.until

    def may_fence(self) -> bool:
        """Whether this runner may judge others: not right after an outage, when owners come first."""
        return self.fence_from is not None and boot() >= self.fence_from and self.holds()

    def renewed(self, owner: str, sent: float, primary: object) -> None:
        """A renewal sent at this moment was acknowledged by this primary."""
        if self.fence_from is None or primary != self._primary:
            self.fence_from = sent + self._wait
        self._primary = primary
        self.owner = owner
        self.until = sent + self._span

    def failed(self) -> None:
        """A renewal failed."""
        self.fence_from = None

    def end(self) -> None:
        """The record was fenced or is gone."""
        self.until = _NEVER
        self.fence_from = None


class Beat(threading.Thread):
    """Registers the runner, renews its lease, and writes what outlives the event loop.

    Args:
        tell: called in this thread with "registered", "late", "lost" or "renewed".
        turns: whether the event loop turns; looked at between renewals.
        state: gives in this thread how many slots are free and why the runner does not listen, None if it does.
        health: a file that is touched at each renewal while it does, for probes.

    """

    def __init__(
        self,
        source: Source,
        name: str,
        kinds: Sequence[str],
        settings: Settings,
        tell: Callable[[str], None],
        turns: Turns,
        state: Callable[[], tuple[int, str | None]],
        health: str | None = None,
    ) -> None:
        super().__init__(name=f"streamjobs beat {name}", daemon=True)
        self.trust = Trust(settings)
        self._source = source
        self._runner = name
        self._kinds = list(kinds)
        self._settings = settings
        self._tell = tell
        self._state = state
        self._written: tuple[int, str | None] | None = None  # what the record says of it
        self._health = None if health is None else Path(health)
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._pending = fresh_owner()
        self._late = False
        self._abandoned: list[str] = []
        self._ending = False
        self._again: list[Callable[[], None]] = []  # commands that failed, until the next renewal
        self._turns = turns
        self._client: Any = None
        self._jobs: Any = None
        self.last_error: BaseException | None = None

    def submit(self, write: Callable[[Any], None]) -> None:
        """Have ``write(collection)`` called in this thread, after the loop has gone."""
        self._commands.put(lambda: write(self._jobs))

    def now(self) -> None:
        """Renew at once: somebody touched the record."""
        self._commands.put(_renew_now)

    def finish(self) -> None:
        """End the thread after what was submitted, each tried once more and not for long."""
        self._ending = True
        self._commands.put(None)

    def run(self) -> None:
        """The thread."""
        try:
            self._client = self._source.connect(
                MongoClient,
                appname="streamjobs/beat",
                timeoutMS=int(self._settings.beat * 1000),
                maxPoolSize=2,
                heartbeatFrequencyMS=HEARTBEAT_MS,
                serverMonitoringMode="poll",  # one connection less to each member: it can wait for an error
                connectTimeoutMS=max(_CONNECT_MS, int(600 * self._settings.beat)),
            )
            self._jobs = self._source.jobs_of(self._client)
            while self._obey(self._renew()):
                pass
        except Exception as error:  # noqa: BLE001 - without its beat a runner must stop
            self.last_error = error
            self._tell("broken")
        finally:
            if self._health is not None:
                with suppress(OSError):  # where it could not be made either
                    self._health.unlink(missing_ok=True)
            if self._client is not None:
                close_sync(self._client)

    def _obey(self, pause: float) -> bool:
        """Carry out commands until the next renewal is due; False when there is to be none."""
        for failed in self._again:
            self._commands.put(failed)
        self._again.clear()
        until = boot() + pause
        while (left := until - boot()) > 0 or self._ending:  # the record is gone by then: renewed no more
            self._turns.look()
            try:
                command = self._commands.get(timeout=None if self._ending else min(left, self._turns.period))
            except queue.Empty:
                continue
            if command is None:
                return False
            if command is not _renew_now:
                self._attempt(command)
            elif not self._ending:
                return True
        return True

    def _pause(self) -> float:
        registered = self.trust.owner == self._pending
        return self._settings.beat if registered and not self._late else min(_RETRY, self._settings.beat)

    def _renew(self) -> float:
        """Register or renew, and draw the conclusion; seconds until the next."""
        sent, owner = boot(), self._pending
        new = self.trust.owner != owner
        try:
            with pymongo.timeout(self._settings.beat):
                good = self._register(owner) if new else self._extend(owner)
        except PyMongoError as error:
            if not self.trust.owner and getattr(error, "code", None) == _UNAUTHORIZED:
                raise  # at the start, and no patience mends it
            self.last_error = error
            self.trust.failed()
            if not self._late and (not new or self.trust.owner):
                events.emit("lease.late", runner=self._runner, owner=owner, **events.about(error))
            if new and not unsent(error):
                self._abandoned.append(owner)
                self._pending = fresh_owner()  # it may have been written, and fenced since
            self._late = True
            self._tell("late")
            return SOON if unsent(error) else self._pause()
        if not good:
            self.trust.end()
            self._pending = fresh_owner()
            self._tell("lost")
            return 0.0
        late, self._late = self._late, False
        self.trust.renewed(owner, sent, self._primary())
        if new:
            events.emit("lease.registered", runner=self._runner, owner=owner, lease=self._settings.lease)
            self._bury()
        elif late:
            events.emit("lease.renewed", runner=self._runner, owner=owner)
        self._touch()
        self._tell("registered" if new else "renewed")
        return self._pause()

    def _bury(self) -> None:
        """Delete records of registrations without an answer: they hold nothing, and would be given slots for a lease."""
        if self._abandoned:
            some = [record_id(owner) for owner in self._abandoned]
            with suppress(PyMongoError), pymongo.timeout(self._settings.beat):
                self._jobs.delete_many({"_id": {"$in": some}})
            self._abandoned.clear()

    def _register(self, owner: str) -> bool:
        about = {
            "name": self._runner,
            "kinds": self._kinds,
            "slots": self._settings.concurrency,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "version": __version__,
        }
        fields: dict[str, Any] = {key: literal(value) for key, value in about.items()}
        fields |= {"control": literal(CONTROL), "started": "$$NOW", "ends": in_ms(self._lease_ms)}
        state = self._state()
        fields |= _told(state)
        self._jobs.update_one({"_id": record_id(owner)}, [{"$set": fields}], upsert=True)
        self._written = state
        return True

    def _extend(self, owner: str) -> bool:
        guard = {"_id": record_id(owner), "control": CONTROL, "fenced": None}
        state = self._state()
        fields = {"ends": in_ms(self._lease_ms)} | ({} if state == self._written else _told(state))
        there = bool(self._jobs.update_one(guard, [{"$set": fields}]).matched_count)
        self._written = state
        return there

    @property
    def _lease_ms(self) -> int:
        return round(self._settings.lease * 1000)

    def _primary(self) -> object:
        servers = self._client.topology_description.server_descriptions().values()
        return [(one.address, one.election_id) for one in servers if one.is_writable]

    def _touch(self) -> None:
        if self._health is not None and self._turns.good:
            with suppress(OSError):  # a probe that finds it old is the signal
                self._health.touch()

    def _attempt(self, command: Callable[[], None]) -> None:
        try:
            with pymongo.timeout(min(self._settings.beat, _LAST if self._ending else self._settings.beat)):
                command()
        except PyMongoError as error:
            self.last_error = error
            if not self._ending:
                self._again.append(command)  # the token fences it: writing it again is safe
            else:
                events.emit("lease.kept", runner=self._runner, owner=self.trust.owner, **events.about(error))
