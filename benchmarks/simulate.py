"""Simulate a fleet: ``python -m benchmarks.simulate [--chart FILE] [--json FILE]``.

Discrete events over the assignment that runners really use (``streamjobs.runner.slots``), with their times and
limits: who is told, who claims, who looks, who passes on and who asks. What a fleet costs besides (beats, records,
fallback, connections) is arithmetic over the defaults.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import deque
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import simpy
from rich.console import Console
from rich.table import Table

from streamjobs.runner import fleet, passing, slots
from streamjobs.settings import Settings

DEFAULTS = Settings()
#: Seconds: a command and its reply, an event's way from the commit to a runner.
ROUND_TRIP, EVENT = 0.001, 0.002
#: Connections of one runner: the stream, the roles, the beat, two monitors of their client and one of the beat's.
CONNECTIONS = 6
#: Where something stands in the way: mongod's own default; the greatest number of streams of a hosted cluster's usual
#: sizes; events that a primary compares with streams' filters in a second; records read in a second.
LIMITS = {"connections": 65_536, "streams": 1_000, "compared": 1_000_000, "records": 100_000}


@dataclass
class Runner:
    """A runner's slots for jobs, and what it knows of."""

    name: str
    free: int
    alive: bool = True
    ran: int = 0
    known: deque[Job] = field(default_factory=deque)
    asked: float = -1.0
    pause: float = fleet._ASK


@dataclass(eq=False)
class Job:
    """A job on its way."""

    put: float
    slot: int
    taken: bool = False
    passed: bool = False
    late: float = 0.0


@dataclass
class Outcome:
    """What one simulated fleet did; numbers for each job unless they say otherwise."""

    mode: str
    runners: int
    rate: float
    busy: float
    jobs: int = 0
    told: float = 0.0
    tried: float = 0.0
    looked: float = 0.0
    asked: float = 0.0
    passed: float = 0.0
    p50_ms: float = 0.0
    p99_ms: float = 0.0
    worst_ms: float = 0.0
    oplog: float = 0.0  # entries a second
    compared: float = 0.0  # events with filters, a second
    beats: float = 0.0  # a second
    records: float = 0.0  # read in a second
    fallback: float = 0.0  # queries a second, one kind
    connections: int = 0
    exceeds: str = ""


class Simulation:
    """One fleet under one load."""

    def __init__(
        self, mode: str, count: int, rate: float, service: float, seconds: float, kill: float = 0.0
    ) -> None:
        self.env = simpy.Environment()
        self.random = random.Random(7)
        self.mode, self.rate, self.service, self.seconds, self.kill = mode, rate, service, seconds, kill
        self.runners = [
            Runner(f"h{n % 97}:{n}:{n * 2_654_435_761:x}", DEFAULTS.concurrency) for n in range(count)
        ]
        self.by_name = {one.name: one for one in self.runners}
        self.shared = mode == "slots" and count > slots.HANDFUL
        self.dealt = slots.assign({one.name: one.free for one in self.runners}) if self.shared else {}
        self.jobs: list[Job] = []
        self.waiting: deque[Job] = deque()  # not taken, in order, as a due query would find them
        self.told = self.tried = self.looked = self.asked = self.passed = 0

    def run(self) -> Outcome:
        """The figures."""
        self.env.process(self._puts())
        self.env.run(until=self.seconds + 60)
        done = [job for job in self.jobs if job.taken]
        assert len(done) == len(self.jobs), f"{len(self.jobs) - len(done)} jobs were never taken"
        count, late = len(done), sorted(job.late * 1000 for job in done)
        busy = self.rate * self.service / (len(self.runners) * DEFAULTS.concurrency)
        out = Outcome(self.mode, len(self.runners), self.rate, round(busy, 2), count)
        out.told, out.tried, out.looked = self.told / count, self.tried / count, self.looked / count
        out.asked, out.passed = self.asked / count, self.passed / count
        out.p50_ms, out.p99_ms, out.worst_ms = late[count // 2], late[int(count * 0.99)], late[-1]
        return _arithmetic(out)

    def _puts(self) -> Any:
        counter = self.random.randrange(256)
        killed = self.kill == 0
        while self.env.now < self.seconds:
            yield self.env.timeout(self.random.expovariate(self.rate))
            if not killed and self.env.now > self.seconds / 2:
                killed = True
                for one in self.random.sample(self.runners, int(len(self.runners) * self.kill)):
                    one.alive = False
            counter += 1
            job = Job(self.env.now, counter % 256)
            self.jobs.append(job)
            self.waiting.append(job)
            (self._share if self.shared else self._herd)(job)

    def _herd(self, job: Job) -> None:
        """All are told, and all that have a free slot try; one of them is the first."""
        live = [one for one in self.runners if one.alive]
        self.told += len(live)
        able = [one for one in live if one.free > 0]
        self.tried += len(able)
        if able:
            winner = self.random.choice(able)
            winner.free -= 1
            self.env.process(self._win(winner, job))
        else:
            for one in self.random.sample(live, min(3, len(live))):
                one.known.append(job)

    def _win(self, runner: Runner, job: Job) -> Any:
        yield self.env.timeout(EVENT + ROUND_TRIP)
        yield from self._work(runner, job)

    def _share(self, job: Job) -> None:
        holder, watcher = (self.by_name[name or ""] for name in self.dealt[job.slot])
        if holder.alive:
            self.told += 1
            self.env.process(self._hold(holder, job))
        if watcher.alive:
            self.told += 1
            self.env.process(self._watch(watcher, job))
        if not holder.alive and not watcher.alive:
            self.env.process(self._fall_back(job))

    def _hold(self, runner: Runner, job: Job) -> Any:
        yield self.env.timeout(EVENT)
        if runner.free > 0:
            yield from self._claim(runner, job)
            return
        runner.known.append(job)
        yield self.env.timeout(passing.PASS)
        if job.taken or runner.free > 0:
            return
        live = self.random.sample(
            self.runners, min(64, len(self.runners))
        )  # of those that a full one reads of
        free = [one for one in live if one.alive and one.free > 0]
        if not free or job.passed:
            return
        job.passed = True
        self.passed += 1
        self.told += 1
        yield self.env.timeout(ROUND_TRIP + EVENT)
        target = self.random.choice(free)
        if target.free > 0 and not job.taken:
            yield from self._claim(target, job)
        target.pause = fleet._ASK
        self._ask(target)

    def _watch(self, runner: Runner, job: Job) -> Any:
        yield self.env.timeout(EVENT + fleet.WATCH)
        if runner.free <= 0:
            return
        self.looked += 1
        yield self.env.timeout(ROUND_TRIP)
        if not job.taken and runner.free > 0:
            yield from self._claim(runner, job)

    def _fall_back(self, job: Job) -> Any:
        """Both are dead: whoever reads the kind next, or the share that moves when the leases are over."""
        reads = DEFAULTS.period / max(1, sum(one.alive for one in self.runners))
        yield self.env.timeout(min(self.random.uniform(0, 2 * reads) + fleet.ASIDE, DEFAULTS.lease + 1))
        able = [one for one in self.runners if one.alive and one.free > 0]
        if able and not job.taken:
            yield from self._claim(self.random.choice(able), job)

    def _claim(self, runner: Runner, job: Job) -> Any:
        runner.free -= 1
        self.tried += 1
        yield self.env.timeout(ROUND_TRIP)
        if job.taken:
            runner.free += 1
            return
        yield from self._work(runner, job)

    def _work(self, runner: Runner, job: Job) -> Any:
        job.taken, job.late = True, self.env.now - job.put
        runner.ran += 1
        yield self.env.timeout(self.random.expovariate(1 / self.service))
        yield self.env.timeout(ROUND_TRIP)  # its outcome
        runner.free += 1
        while runner.known and runner.known[0].taken:
            runner.known.popleft()
        if runner.known:
            self.env.process(self._claim(runner, runner.known.popleft()))
        elif runner.free == 1:
            self._ask(runner)

    def _ask(self, runner: Runner) -> None:
        if not self.shared or self.env.now - runner.asked < runner.pause or runner.free <= 0:
            return
        runner.asked, runner.pause = self.env.now, min(2 * runner.pause, fleet._ASK_MOST)
        self.asked += 1
        while self.waiting and self.waiting[0].taken:
            self.waiting.popleft()
        old = [job for job, _ in zip(self.waiting, range(runner.free * 4), strict=False) if not job.taken]
        for job in [one for one in old if self.env.now - one.put > fleet.ASIDE][: runner.free]:
            runner.pause = fleet._ASK
            self.env.process(self._claim(runner, job))


def _arithmetic(out: Outcome) -> Outcome:
    """What a second costs in all."""
    out.beats = out.runners / DEFAULTS.beat
    out.oplog = out.rate * (3 + out.passed) + out.beats
    out.compared = out.oplog * out.runners
    out.records = out.runners**2 / (DEFAULTS.lease - DEFAULTS.beat)
    out.fallback = 4 * out.runners / DEFAULTS.period
    out.connections = CONNECTIONS * out.runners
    met = {
        "connections": out.connections, "streams": out.runners, "compared": out.compared, "records": out.records,
    }  # fmt: skip
    out.exceeds = ", ".join(name for name, value in met.items() if value > LIMITS[name])
    return out


def fleets() -> list[Outcome]:
    """Runners against jobs per second, both ways, at a load that leaves some slots free."""
    out = []
    for count in (1, 4, 16, 64, 256, 1_000, 10_000):
        for rate in (100, 1_000, 5_000):
            if rate * 0.02 > 0.7 * count * DEFAULTS.concurrency:
                continue  # more than such a fleet could run at 20 ms a job
            seconds = min(10.0, 10_000 / rate)
            for mode in ("all", "slots"):
                if mode == "slots" and count <= slots.HANDFUL:
                    continue
                out.append(Simulation(mode, count, rate, 0.02, seconds).run())
    return out


def loads() -> list[Outcome]:
    """64 runners from idle to full: where jobs are passed on."""
    return [
        Simulation("slots", 64, share * 64 * DEFAULTS.concurrency / 0.2, 0.2, 5.0).run()
        for share in (0.3, 0.6, 0.8, 0.9, 0.95, 1.1)
    ]


def killed() -> Outcome:
    """A quarter of 32 runners dies at once under load."""
    return Simulation("slots", 32, 400.0, 0.05, 20.0, kill=0.25).run()


SHOWN = (
    "mode", "runners", "rate", "busy", "told", "tried", "looked", "asked", "passed", "p50_ms", "p99_ms", "oplog",
    "compared", "beats", "records", "connections", "exceeds",
)  # fmt: skip


def markdown(rows: list[Outcome], shown: tuple[str, ...] = SHOWN) -> str:
    """Rows as a table for the documents."""
    lines = ["| " + " | ".join(shown) + " |", "|" + "---|" * len(shown)]
    lines += ["| " + " | ".join(_text(getattr(row, name)) for name in shown) + " |" for row in rows]
    return "\n".join(lines)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.2f}"
    return f"{value:,}" if isinstance(value, int) else value


def chart(rows: list[Outcome], path: Path) -> None:
    """Told, tried and compared against the number of runners."""
    import matplotlib as mpl  # noqa: PLC0415 - the extra "bench"

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "streamjobs"
    import matplotlib.pyplot as plt  # noqa: PLC0415

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    for mode, style in (("all", "--"), ("slots", "-")):
        some = [row for row in rows if row.mode == mode and row.rate == 1_000]
        if mode == "slots":
            some = [row for row in rows if row.runners <= slots.HANDFUL and row.rate == 1_000] + some
        counts = [row.runners for row in some]
        left.plot(counts, [row.told for row in some], style, marker="o", label=f"events delivered, {mode}")
        left.plot(counts, [row.tried for row in some], style, marker="x", label=f"claims tried, {mode}")
    left.set(xscale="log", yscale="log", xlabel="runners", title="for each job")
    for rate in (100, 1_000, 5_000):
        some = [
            row for row in rows if row.rate == rate and (row.mode == "slots" or row.runners <= slots.HANDFUL)
        ]
        right.plot(
            [row.runners for row in some], [row.compared for row in some], marker="o", label=f"{rate} jobs/s"
        )
    right.axhline(LIMITS["compared"], color="grey", linestyle=":")
    right.set(xscale="log", yscale="log", xlabel="runners", title="events compared with filters, a second")
    for axes in (left, right):
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, format="svg", metadata={"Date": None})


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulate", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--chart", type=Path, help="write an SVG to this file; takes the extra 'bench'")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    options = parser.parse_args()
    rows, load, death = fleets(), loads(), killed()
    for title, some in (
        ("fleets", rows),
        ("64 runners, from idle to full", load),
        ("a quarter of 32 dies", [death]),
    ):
        shown = SHOWN if some is rows else (*SHOWN[:11], "worst_ms")
        if options.markdown:
            print(f"\n{title}\n\n{markdown(some, shown)}")
            continue
        table = Table(*shown, title=title)
        for row in some:
            table.add_row(*(_text(getattr(row, name)) for name in shown))
        Console(width=200).print(table)
    if options.json:
        options.json.write_text(json.dumps([asdict(one) for one in [*rows, *load, death]], indent=2) + "\n")
    if options.chart:
        chart(rows, options.chart)


if __name__ == "__main__":
    main()
