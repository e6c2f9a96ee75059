"""A job in hand: the running try, from the claim's reply to the recorded outcome."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Protocol

from bson.datetime_ms import DatetimeMS
from bson.errors import BSONError
from bson.raw_bson import RawBSONDocument

from streamjobs import events
from streamjobs.clock import ServerClock, boot
from streamjobs.errors import LeaseLost, UnreadableJob
from streamjobs.handler import Handler
from streamjobs.job import Job, date_ms, decode, id_key, undecodable
from streamjobs.runner.backlog import Candidate
from streamjobs.transitions import Claim


class Vouch(Protocol):
    """Who says whether a lease still holds."""

    def holds(self, owner: str) -> bool:
        """Whether what this owner holds may still be trusted."""
        ...


@dataclass(frozen=True, slots=True)
class Ended:
    """How a try ended, before it is recorded.

    ``outcome`` is success, failure, snoozed, cancelled, released, interrupted or lost; ``text`` the error's or
    reason's text.
    """

    outcome: str
    text: str = ""
    error: str | None = None
    trace: str | None = None
    delay: float | None = None


@dataclass(slots=True, eq=False)
class Held:
    """A job in hand. Times in boot seconds, ``due`` in ms since 1970 UTC."""

    job: Job
    handler: Handler
    runner: str
    owner: str
    token: str
    claimed_at: Any
    due: float
    seen: float
    claimed: float
    vouch: Vouch
    started: float | None = None
    ended: float | None = None
    task: asyncio.Task[None] | None = None
    told_lost: bool = False
    told_stop: bool = False
    abandoned: bool = False
    refused: bool = False  # the server does not take its outcome: it stays held, for the lease to free
    result: Ended | None = None
    over: asyncio.Event | None = None  # set at the end of a thread whose waiting task was cancelled
    lock: threading.Lock = field(default_factory=threading.Lock)
    _log: Any = None

    @property
    def lost(self) -> bool:
        """Whether the lease can no longer be trusted."""
        return self.told_lost or not self.vouch.holds(self.owner)

    def check(self) -> None:
        """Raise LeaseLost if it is lost."""
        if self.lost:
            raise LeaseLost(self.job.id)

    @property
    def log(self) -> Any:
        """A logger bound with job, kind, try and runner."""
        if self._log is None:
            about = self.about()
            about.pop("owner")
            about["try"] = about.pop("number")
            self._log = events.job_logger(
                **{key: str(value) if key == "job" else value for key, value in about.items()}
            )
        return self._log

    def about(self) -> dict[str, Any]:
        """The fields that every event of a try has."""
        return {
            "job": self.job.id,
            "kind": self.job.kind,
            "number": self.job.number,
            "runner": self.runner,
            "owner": self.owner,
        }

    def claim(self, owner: str, nonce: int, clock: ServerClock) -> Claim:
        """What the transitions need to know of it."""
        started = None
        if self.started is not None:
            # whole milliseconds, all that is stored, so that what began together is written together; an estimate
            # may be off by some, but no handler starts before the claim
            estimate = max(int(clock.at_ms(self.started)), date_ms(self.claimed_at) or 0)
            started = datetime.fromtimestamp(estimate / 1000, UTC)
        return Claim(self.job, self.token, self.claimed_at, self.runner, owner, nonce, started)

    def cancel(self) -> None:
        """Cancel an async handler; a sync one can only be told."""
        if self.task is not None and self.started is not None and self.handler.asynchronous:
            self.task.cancel()


def hold(
    document: Mapping[str, Any], known: Mapping[Any, Candidate], handlers: Mapping[str, Handler],
    runner: str, owner: str, token: str, vouch: Vouch, now_ms: float,
) -> tuple[Held | None, Ended | None]:  # fmt: skip
    """What a claim brought: the job in hand, and how it has ended if it can't be decoded; None if it is not claimed.

    ``document`` is a row of the claim's reply, decoded or not; ``known`` the candidates that were asked for, by the
    key of their id; ``now_ms`` the server's time, by estimate.
    """
    now, problem = boot(), None
    try:
        fields = decode(document.raw) if isinstance(document, RawBSONDocument) else document
        job = Job.from_document(fields)
    except (BSONError, ValueError, OverflowError, UnreadableJob) as error:
        fields = document
        try:
            one = known[id_key(document["_id"])]
            if document["lease"]["token"] != token:
                return None, None
        except (BSONError, KeyError, TypeError):
            return None, None  # not even its fields can be told apart; its lease frees it
        told = error if isinstance(error, UnreadableJob) else undecodable(one.id, error)
        job = Job(one.id, one.kind, runat=DatetimeMS(one.runat))
        problem = Ended("failure", str(told), "UnreadableJob")
    found: Any = fields.get("lease")
    lease: Any = found if isinstance(found, Mapping) else {}  # pyright: ignore[reportUnknownVariableType]
    if lease.get("token") != token or job.kind not in handlers:
        return None, None  # not claimed; or of another kind since, so that its lease frees it
    candidate = known.get(id_key(job.id))
    since = [date_ms(one) for one in (job.created if job.asap else job.runat, lease.get("back"))]
    due = max((one for one in since if one is not None), default=None)
    held = Held(
        job=job, handler=handlers[job.kind], runner=runner, owner=owner, token=token,
        claimed_at=lease.get("claimed"), due=float(due if due is not None else now_ms),
        seen=now if candidate is None else candidate.seen, claimed=now, vouch=vouch,
    )  # fmt: skip
    return held, problem
