"""What a runner's process could do when: the measure of what was promised while it could."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from streamjobs.runner.slots import HANDFUL
from tests.history import Process, Run
from tests.windows import FOREVER, Window, crowded, merged, without

MS = 0.005  # seconds by which the server's dates may seem wrong on the history's clock
_CLAIM = 0.01  # seconds that a claim stands for
#: Seconds that a due job may wait for a runner that is idle with its stream live.
LIVE = 1.5


@dataclass(frozen=True, slots=True)
class Limits:
    """What the runners' settings promise, in seconds.

    ``live`` bounds lateness while the stream is live, ``back`` is what a runner gets to recover after a fault,
    ``turn`` an event loop for its first turn, ``sweep`` the second of promise 2. ``drained`` says that all jobs had
    the time to end.
    """

    lease: float
    beat: float
    margin: float
    interval: float
    slots: int
    live: float = LIVE
    back: float = 2.0
    turn: float = 0.5
    sweep: float = 1.0
    drained: bool = True


@dataclass(frozen=True, slots=True)
class Breach:
    """A promise that was broken: its number, a name for the sort, by which job, and how."""

    promise: int
    name: str
    job: str | None
    text: str


@dataclass(slots=True)
class Sight:
    """When a process could work: its lease was trusted.

    ``idle`` is when it had a slot free too and claimed nothing, whatever its stream did; ``awake`` when its stream
    was live as well and, where slots are shared out, not two others were away at once, who may be a job's holder and
    watcher: the fallback bounds that; ``stuck`` when it was frozen or its loop blocked, and for the turn after that.
    """

    process: Process
    trusted: list[Window]
    idle: list[Window]
    awake: list[Window]
    stuck: list[Window]


def sights_of(run: Run, limits: Limits) -> dict[int, Sight]:
    """Each process by its pid."""
    spans: dict[int, list[Window]] = defaultdict(list)
    blocked: dict[int, list[Window]] = defaultdict(list)
    for life in run.jobs.values():
        for one in life.attempts.values():
            ends = [at for at in (one.when, one.end) if at is not None]
            over = max(ends) if one.when is not None and (one.end is not None or not one.starts) else FOREVER
            spans[one.pid].append((one.begun, over))
            if one.sort == "blocking" and one.starts:
                blocked[one.pid].append((one.starts[0], FOREVER if one.end is None else one.end))
    everywhere = run.broken("server", "fleet")
    out: dict[int, Sight] = {}
    for pid, process in run.processes.items():
        held_up = merged([*process.frozen, *process.lagged, *blocked[pid], *run.stalls])
        broken = merged([*everywhere, *run.broken(process.runner), *process.doubted, *process.frozen])
        stuck = longer(held_up, limits.turn)
        holes = merged([*stuck, *longer(broken, limits.back)])
        trusted = without([(process.born + limits.back, process.until)], holes)
        claims = merged((since, since + _CLAIM) for since, _ in spans[pid])
        idle = without(without(trusted, crowded(spans[pid], limits.slots)), claims)
        awake = without(idle, longer(process.deaf, limits.back))
        out[pid] = Sight(process, trusted, idle, awake, stuck)
    pairs = _pairs_away(out.values(), limits)
    for sight in out.values():
        sight.awake = without(sight.awake, pairs)
    return out


def _pairs_away(sights: Iterable[Sight], limits: Limits) -> list[Window]:
    """When two runners or more could not be told of a job, if there are so many that they share the slots."""
    there: dict[str, list[Window]] = defaultdict(list)
    for one in sights:
        there[one.process.runner] += without(one.trusted, longer(one.process.deaf, limits.back))
    if len(there) <= HANDFUL:
        return []
    away = [hole for windows in there.values() for hole in without([(0.0, FOREVER)], merged(windows))]
    return crowded(away, 2)


def longer(windows: list[Window], by: float) -> list[Window]:
    """Windows that end so much later."""
    return merged((since, until + by) for since, until in windows)
