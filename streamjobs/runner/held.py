"""A job in hand: the running try, from the claim's reply to the recorded outcome."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Protocol

from streamjobs import events
from streamjobs.clock import ServerClock
from streamjobs.errors import LeaseLost
from streamjobs.handler import Handler
from streamjobs.job import Job, date_ms
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
