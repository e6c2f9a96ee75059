"""``run --processes N``: a supervisor that starts runner processes, restarts the dead, and stops all in order.

It opens no client and imports no handler: each process is a fresh interpreter that does. Everything that happens
is a message in one queue, which the main thread works off: what a process reports, its end, a signal, a time.
"""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streamjobs import events
from streamjobs.cli import log
from streamjobs.cli.processes import JOBS, STARTED, Hooks, RunnerProcess, caught, describe_end
from streamjobs.clock import boot

_LATE = 0.8  # seconds after the stop deadline at which a process is killed, so that all is over within one
_STEADY = 60.0  # a process that ran for so long begins again with the shortest delay
_DELAYS = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
_GIVE_UP = 5  # failed starts in a row, with no process running
_LOOK = 1.0  # seconds between two looks at memory and health
_MB = 1_000_000
_ENDED = "ended"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a supervisor is to do.

    Attributes:
        name: its name; the runners are called that with -1, -2 and so on.
        target: MODULE:NAME.
        processes: how many.
        options: of each process's ``run``, without name, log and health file.
        environment: what to set for each.
        stop_deadline: theirs, in seconds.
        form: what stderr gets.
        health: the health file; a process's own has its number appended.
        recycle_jobs: jobs after which a process is replaced.
        recycle_memory: resident memory in MB above which it is.

    """

    name: str
    target: str
    processes: int
    options: Sequence[str]
    environment: Mapping[str, str]
    stop_deadline: float
    form: log.Form
    health: Path | None = None
    recycle_jobs: int | None = None
    recycle_memory: int | None = None


@dataclass(eq=False, slots=True)
class _Place:
    """One of the N: a name, and the process that has it at the moment."""

    name: str
    health: Path | None
    process: RunnerProcess | None = None
    since: float = 0.0  # when it was started
    ready: bool = False  # its runner has started
    again_at: float | None = None  # when to start the next one
    kill_at: float | None = None
    short: int = 0  # processes in a row that did not last
    wanted: bool = False  # to be recycled
    recycling: bool = False


@dataclass(eq=False, slots=True)
class Supervisor:
    """Keeps the processes of a plan."""

    plan: Plan
    _messages: queue.SimpleQueue[tuple[_Place | None, RunnerProcess | None, Any]] = field(
        default_factory=queue.SimpleQueue[Any]
    )
    _places: list[_Place] = field(default_factory=list[_Place])
    _full: deque[tuple[_Place, dict[str, Any]]] = field(default_factory=deque[Any])
    _signals: int = 0
    _stopping: bool = False
    _code: int = 0
    _failed: int = 0  # starts in a row
    _any_ready: bool = False
    _look_at: float | None = None

    def run(self) -> int:
        """Keep them until signals stop it; the exit code.

        That is 0, or the worst of the processes' codes after an orderly stop (128 + n for one that signal n
        ended), or 1 where no process could be started.
        """
        plan, began = self.plan, boot()
        for number in range(1, plan.processes + 1):
            health = None if plan.health is None else plan.health.with_name(f"{plan.health.name}-{number}")
            self._places.append(_Place(f"{plan.name}-{number}", health))
        self._forget_health()
        if plan.health is not None or plan.recycle_memory is not None:
            self._look_at = began
        self._emit("supervisor.started", processes=plan.processes, pid=os.getpid(), host=socket.gethostname())
        try:
            with self._caught():
                self._start(self._places[0])  # the others when it is ready: what is wrong is said once
                while not self._stopping or any(place.process for place in self._places):
                    with suppress(queue.Empty):
                        self._take(*self._messages.get(timeout=self._pause()))
                    self._do_what_is_due()
        finally:
            self._kill()
            self._forget_health()
        self._emit("supervisor.stopped", exit=self._code, took_ms=(boot() - began) * 1000)
        return self._code

    # ---- what happens

    @contextmanager
    def _caught(self) -> Generator[None]:
        """Take SIGTERM and SIGINT as messages; the third one ends all at once."""

        def note(number: int) -> None:
            self._signals += 1
            if self._signals > 2:
                self._kill()
                os._exit(128 + number)
            self._messages.put((None, None, number))

        with caught((signal.SIGTERM, signal.SIGINT), note):
            yield

    def _kill(self) -> None:
        """Kill all; from the signals' thread too, while the main one may be forgetting a process that has ended."""
        for process in [place.process for place in self._places]:
            if process is not None:
                process.kill()

    def _take(self, place: _Place | None, process: RunnerProcess | None, what: Any) -> None:
        if place is None or process is None:
            self._stop(signal.Signals(what).name)
        elif place.process is not process:
            pass  # what one said that has been replaced
        elif what == _ENDED:
            self._ended(place, process)
        elif what == STARTED:
            self._is_ready(place)
        elif what == JOBS:
            self._want(place, count=self.plan.recycle_jobs)

    def _is_ready(self, place: _Place) -> None:
        place.ready, place.recycling = True, False
        self._failed = 0
        if not self._any_ready and not self._stopping:
            self._any_ready = True
            for other in self._places[1:]:
                other.again_at = boot()

    def _ended(self, place: _Place, process: RunnerProcess) -> None:
        code = process.wait(0)
        asked = self._stopping or (place.recycling and place.kill_at is not None)
        ready, lived = place.ready, boot() - place.since
        place.process, place.ready, place.kill_at = None, False, None
        retry_in, hopeless = None, None
        worth = _exit_code(code, ready=ready)
        if self._stopping:
            self._code = max(self._code, worth)
        elif asked:
            retry_in = 0.0
        else:
            place.recycling = False
            hopeless, retry_in = self._count_end(place, ready, lived, describe_end(code))
        self._emit(
            "process.ended", level="info" if asked and worth == 0 else "warning", runner=place.name, pid=process.pid,
            exit=code, reason=describe_end(code), since_ms=lived * 1000, retry_in=retry_in,
        )  # fmt: skip
        if hopeless is not None:
            self._give_up(place, hopeless)
        elif retry_in is not None:
            place.again_at = boot() + retry_in

    def _count_end(
        self, place: _Place, ready: bool, lived: float, how: str
    ) -> tuple[str | None, float | None]:
        """After an end that nobody asked for: why there is no use in going on, or the seconds to wait."""
        if not self._any_ready:
            return f"the first process {how} before its runner had started", None
        self._failed = 0 if ready else self._failed + 1
        if self._failed >= _GIVE_UP and not any(other.ready for other in self._places):
            return (
                f"{self._failed} processes in a row ended before their runners had started, and none is left",
                None,
            )
        place.short = 0 if ready and lived >= _STEADY else place.short + 1
        return None, _DELAYS[min(max(place.short - 1, 0), len(_DELAYS) - 1)]

    # ---- what is done

    def _start(self, place: _Place) -> None:
        plan, place.again_at, place.wanted = self.plan, None, False
        options = [*plan.options, "--log", "json"]  # as text its lines are made here, with the runner's name
        if place.health is not None:
            options += ["--health-file", str(place.health)]
        place.since = boot()
        hooks = Hooks(
            log.pass_on if plan.form.is_json else log.pass_on_as_text,
            lambda process: self._messages.put((place, process, _ENDED)),
            lambda process, word: self._messages.put((place, process, word)),
        )
        try:
            process = RunnerProcess(
                place.name, plan.target, options, plan.environment, hooks, jobs=plan.recycle_jobs or 0
            )
        except OSError as error:
            place.recycling = False
            hopeless, retry_in = self._count_end(place, False, 0.0, f"could not be started ({error})")
            if hopeless is not None:
                self._give_up(place, hopeless)
            place.again_at = None if retry_in is None else boot() + retry_in
            return
        place.process = process
        self._emit("process.started", runner=place.name, pid=process.pid)

    def _stop(self, reason: str) -> None:
        """Ask all to stop; again: at once."""
        hurry, self._stopping = self._stopping, True
        if not hurry:
            self._emit("supervisor.stopping", reason=reason)
        until = boot() + _LATE + (0.0 if hurry else self.plan.stop_deadline)
        for place in self._places:
            place.again_at = None
            if place.process is not None:
                # one that is being recycled was asked already; asked twice, it would cancel its handlers
                if hurry or place.kill_at is None:
                    place.process.terminate()
                place.kill_at = min(until, place.kill_at or until)

    def _give_up(self, place: _Place, why: str) -> None:
        self._code = max(self._code, 1)
        self._emit("supervisor.failed", runner=place.name, reason=why)
        self._stop("processes can't be started")

    def _want(self, place: _Place, **why: Any) -> None:
        """To be recycled, when it is its turn."""
        if not place.wanted and not self._stopping:
            place.wanted = True
            self._full.append((place, why))

    def _recycle(self) -> None:
        """One at a time, so that never more than one is missing: the next begins when this one is replaced."""
        while self._full and not self._stopping and not any(place.recycling for place in self._places):
            place, why = self._full.popleft()
            if place.process is None or not place.wanted:
                continue  # it has died meanwhile
            place.recycling, place.kill_at = True, boot() + self.plan.stop_deadline + _LATE
            reason = "jobs" if "count" in why else "memory"
            self._emit("process.recycled", runner=place.name, pid=place.process.pid, reason=reason, **why)
            place.process.terminate()

    def _do_what_is_due(self) -> None:
        now = boot()
        for place in self._places:
            if place.kill_at is not None and now >= place.kill_at and place.process is not None:
                place.process.kill()
                place.kill_at = now + _LOOK
            if place.again_at is not None and now >= place.again_at:
                self._start(place)
        if self._look_at is not None and now >= self._look_at:
            self._look_at = now + _LOOK
            self._look()
        self._recycle()

    def _pause(self) -> float | None:
        """Seconds until something is due."""
        times = [self._look_at, *(time for one in self._places for time in (one.again_at, one.kill_at))]
        known = [time for time in times if time is not None]
        return max(0.0, min(known) - boot()) if known else None

    # ---- memory, health, lines

    def _look(self) -> None:
        limit = self.plan.recycle_memory
        if limit is not None:
            for place in self._places:
                memory = 0.0 if place.process is None or not place.ready else resident(place.process.pid)
                if memory >= limit:
                    self._want(place, memory=memory)
        if self.plan.health is not None and not self._stopping:
            with suppress(OSError):  # one is not there (yet): then neither is this one touched
                oldest = min(place.health.stat().st_mtime_ns for place in self._places if place.health)
                self.plan.health.touch()
                os.utime(self.plan.health, ns=(oldest, oldest))

    def _forget_health(self) -> None:
        for path in (self.plan.health, *(place.health for place in self._places)):
            if path is not None:
                with suppress(OSError):
                    path.unlink(missing_ok=True)

    def _emit(self, name: str, **fields: Any) -> None:
        events.emit(name, supervisor=self.plan.name, **fields)


def resident(pid: int) -> float:
    """Resident memory of a process, in MB of 1,000,000 bytes; 0 if it can't be told."""
    try:
        if sys.platform == "linux":
            pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
            return pages * os.sysconf("SC_PAGESIZE") / _MB
        told = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, check=False)  # noqa: S603, S607
        return int(told.stdout or 0) * 1024 / _MB
    except (OSError, ValueError, IndexError):
        return 0.0


def _exit_code(code: int, *, ready: bool) -> int:
    """A process's code as the supervisor's own, after a stop."""
    if code == -signal.SIGTERM and not ready:
        return 0  # it was asked to stop before it could listen
    return 128 - code if code < 0 else code
