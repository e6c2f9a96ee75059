"""Waking: what a put, the stream, a finish or the fallback tell → candidates in the backlog."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from typing import Any

from streamjobs import events
from streamjobs.clock import ServerClock, boot
from streamjobs.job import RUNNABLE, Job, date_ms, problem_of
from streamjobs.runner.backlog import Backlog, Candidate
from streamjobs.runner.claim import Claimer
from streamjobs.runner.fleet import Fleet
from streamjobs.runner.store import candidate_of


class Waker:
    """Turns tidings into candidates and wakes the claim loop; what is for others first, the fleet watches."""

    def __init__(
        self, backlog: Backlog, claimer: Claimer, fleet: Fleet, clock: ServerClock, kinds: Sequence[str],
        period: float, who: Callable[[], dict[str, str]],
    ) -> None:  # fmt: skip
        self._backlog = backlog
        self._claimer = claimer
        self._fleet = fleet
        self._clock = clock
        self._kinds = list(kinds)
        self._period = period
        self._who = who
        self._read = dict.fromkeys(self._kinds, 0.0)
        self._turn = 0
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()

    def put(self, jobs: Sequence[Job]) -> None:
        """A put of this process was acknowledged; in any thread."""
        if threading.get_ident() == self._thread:
            self._offer_jobs(jobs)
        elif not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._offer_jobs, jobs)

    def offer_back(self, jobs: Sequence[Job]) -> None:
        """These jobs were put back by this runner: the server hides its own wakes from it."""
        for job in jobs:
            lag = self._fleet.lag(job.kind, job.id)
            if job.kind in self._read and not lag:
                self._claimer.look_up(job.id)
            elif job.kind in self._read:
                self._fleet.watch(job.id, lag)

    def own(self, job: Job, status: int, after_ms: int | None) -> None:
        """This runner put a job back, due so many milliseconds from now, or as it was."""
        runat = date_ms(job.runat) if after_ms is None else round(self._clock.now_ms()) + after_ms
        if runat is not None:
            left = job.retries - 1  # at least
            self._take(Candidate(job.id, job.kind, int(status), runat, job.created, boot(), "timer", left))

    def change(self, id_: Any, change: dict[str, Any]) -> None:
        """An event of the stream about a job."""
        wake, passed = _document(change.get("wake")), _document(change.get("passed"))
        wake = passed or wake
        status = wake.get("status") if change.get("status") is None else change["status"]
        if "kind" in wake and status is not None:
            row = {
                "_id": id_,
                "status": status,
                **{key: wake.get(key) for key in ("kind", "runat", "created")},
            }
        elif change["operationType"] in ("insert", "replace"):
            row = {
                "_id": id_,
                **{key: change.get(key) for key in ("kind", "status", "runat", "created", "retries")},
            }
            row["data"] = {} if change.get("data") == "object" else None
            problem = problem_of(row)
            if problem is not None:
                self._claimer.unreadable(id_, problem)
                return
        else:
            self._claimer.look_up(id_)
            return
        candidate = candidate_of(row, "stream")
        if candidate is None:
            self._claimer.look_up(id_)
        elif candidate.status in RUNNABLE and passed:
            self.offer(candidate)
            self._fleet.passed(candidate.kind)
        elif candidate.status in RUNNABLE:
            self._take(candidate, fresh=change["operationType"] == "insert")

    def restart_all(self) -> None:
        """Read everything: events may have been missed."""
        now = boot()
        for kind in self._kinds:
            self._backlog.restart(kind)
            self._read[kind] = now
        self._claimer.wake()

    def restart(self, kind: str) -> None:
        """Read what is due of a kind."""
        if kind in self._read:
            self._read[kind] = boot()
            self._backlog.restart(kind)
            self._claimer.wake()

    def restart_next(self) -> None:
        """Read one more kind from its beginning, unless it was read a moment ago."""
        kind = self._kinds[self._turn % len(self._kinds)]
        self._turn += 1
        now = boot()
        if now - self._read[kind] >= min(1.0, self._period / 2):
            self._read[kind] = now
            self._backlog.restart(kind)
            self._claimer.wake()

    def _offer_jobs(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            runat = date_ms(job.runat)
            if runat is None or job.kind not in self._read:
                continue
            status, made, seen = int(job.status), job.created, boot()
            one = Candidate(job.id, job.kind, status, runat, made, seen, "put", job.retries)
            if self._fleet.lag(job.kind, job.id) == 0:
                self._hold(one, fresh=True)
            elif self._fleet.deaf:
                self.offer(one, fresh=True)

    def _take(self, candidate: Candidate, *, fresh: bool = False) -> None:
        """Something may be claimed: now by whoever holds its slot, in a while by others."""
        lag = self._fleet.lag(candidate.kind, candidate.id)
        if lag:
            self._fleet.watch(candidate.id, lag, None if candidate.asap else candidate.runat)
        else:
            self._hold(candidate, fresh=fresh)

    def _hold(self, candidate: Candidate, *, fresh: bool) -> None:
        """This runner holds its slot: it takes it, or passes it on."""
        self.offer(candidate, fresh=fresh)
        self._fleet.holding(candidate)

    def offer(self, candidate: Candidate, *, fresh: bool = False) -> None:
        """Take a candidate in, and try to claim it."""
        if self._backlog.offer(candidate, self._clock.now_ms(), fresh=fresh):
            if events.wanted("debug"):
                events.emit_wanted(
                    "job.woken", job=candidate.id, kind=candidate.kind, source=candidate.source, **self._who()
                )
            self._claimer.wake()


def _document(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}  # pyright: ignore[reportUnknownVariableType]
