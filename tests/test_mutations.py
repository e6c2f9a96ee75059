"""Each guard of the library switched off in turn: the checker must find the breach, and nothing while it is on.

A guard whose removal no test notices isn't proved. Each scene is made so that the guard decides: the fault strikes
one runner, or comes from the driver's own hand in the place of a process that died or a packet that came late.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from streamjobs import clients, putting, transitions
from streamjobs.job import Job
from streamjobs.runner.lease import fence, record_id
from tests.fleet import Scene
from tests.mutations import MUTATIONS

LEASE = 1.6
SETTINGS = {
    "concurrency": 4,
    "interval": 1.5,
    "lease": LEASE,
    "beat": 0.35,
    "margin": 0.4,
    "stop_deadline": 1,
    "stream_wait": 1,
}


@dataclass(slots=True)
class Stage:
    """What a scene has at hand."""

    scene: Scene
    failpoint: Callable[..., None]

    @asynccontextmanager
    async def broken(self, app: str, commands: list[str], on: str, **what: Any) -> AsyncIterator[None]:
        """A failpoint for the clients with this appName."""
        with self.scene.fault("failpoint", on):
            self.failpoint("alwaysOn", app, commands, **what)
            try:
                yield
            finally:
                self.failpoint("off", app, commands)

    async def two(self, kind: str, seconds: float, retries: int = 9) -> tuple[Job, str]:
        """Two runners, a job, and the name of the one that has it."""
        fleet = self.scene.fleet
        await fleet.start("r1", "r2")
        job = await self.scene.put_one(kind, {"seconds": seconds}, retries=retries)
        await self.scene.held(job)
        lease = (await self.scene.jobs.find_one({"_id": job.id}))["lease"]
        return job, next(name for name in ("r1", "r2") if fleet.owner(name) == lease["owner"])

    async def taken(self, kind: str, seconds: float) -> None:
        """A job whose holder can't renew its lease until the other runner has claimed it."""
        job, holder = await self.two(kind, seconds)
        async with self.broken(f"streamjobs/beat/{holder}", ["update"], holder, errorCode=50):
            await self.scene.held(job, 2)


async def token(stage: Stage) -> None:
    """What ends after another has the job may not touch it."""
    await stage.taken("thread", 3.0)


async def trust(stage: Stage) -> None:
    """What runs without a lease must be cancelled before another may start it."""
    await stage.taken("many", 4.0)


async def due(stage: Stage) -> None:
    """A runner that is wrong about the server's clock asks for a job before it is due."""
    await stage.scene.fleet.start("r1", ahead=0.6)
    await stage.scene.put_one("many", delay=1.0)


async def status(stage: Stage) -> None:
    """Two runners want each job; the second comes too late."""
    await stage.scene.fleet.start("r1", "r2")
    for _ in range(5):
        await stage.scene.put(4, seconds=0.3)


async def majority(stage: Stage) -> None:
    """Everything that a runner writes."""
    await stage.scene.fleet.start("r1")
    await stage.scene.put(4)


async def catch_up(stage: Stage) -> None:
    """Jobs put while the stream has lost its history."""
    await stage.scene.fleet.start("r1")
    async with stage.broken("streamjobs/runner/r1", ["getMore", "aggregate"], "r1", errorCode=286):
        await stage.scene.fleet.wait("stream.state", state="gap")
        await stage.scene.put(3)


async def sweep(stage: Stage) -> None:
    """Whoever fenced a dead runner died before it freed its jobs."""
    scene = stage.scene
    await scene.fleet.start("r1")
    job = await scene.put_one("many", {"seconds": 1.0}, retries=9)
    await scene.held(job)
    record = {"_id": record_id(scene.fleet.owner("r1"))}
    scene.fleet.kill("r1")
    async with asyncio.timeout(20):
        while (await scene.jobs.find_one(record)).get("fenced") is None:
            await scene.jobs.update_one(record, fence())
    await scene.fleet.start("r2")


async def orphan(stage: Stage) -> None:
    """A claim of r1's that lands after r1 has given it up: nobody knows of it."""
    scene = stage.scene
    await scene.fleet.start("r1")
    scene.fleet.freeze("r1")  # so that it does not claim it itself
    try:
        job = await scene.put_one("many", retries=9)
        change = transitions.claim([job.id], ["many"], scene.fleet.owner("r1"), "late")
        assert (await clients.ours(scene.jobs).update_one(*change)).modified_count == 1
    finally:
        scene.fleet.thaw("r1")


async def fast(stage: Stage) -> None:
    """A runner that is wrong about the server's clock takes a living one's lease for over."""
    await stage.scene.fleet.start("r1")
    job = await stage.scene.put_one("many", {"seconds": 5.0}, retries=9)
    await stage.scene.held(job)
    await stage.scene.fleet.start("r2", ahead=5.0)


async def charge(stage: Stage) -> None:
    """A runner dies with a job in hand, which must have cost it an attempt."""
    _, holder = await stage.two("many", 1.0, retries=2)
    stage.scene.fleet.kill(holder)


async def again(stage: Stage) -> None:
    """A put that was written and got no answer is repeated."""
    await stage.scene.fleet.start("r1")
    error = {"code": 64, "errmsg": "waiting for replication timed out"}
    jobs = [stage.scene.draft("many", {}, retries=2)]
    with stage.scene.fault("concern", "producers"):
        stage.failpoint({"times": 1}, "streamjobs/put", ["insert"], writeConcernError=error)
        await stage.scene.put_until_acknowledged(jobs)


@dataclass(frozen=True, slots=True)
class Case:
    """A scene, the breaches of which at least one must be found without the guard, and how long to wait for the end."""

    play: Callable[[Stage], Awaitable[None]]
    breaches: frozenset[str]
    patience: float = 15.0
    settings: dict[str, Any] = field(default_factory=dict)
    here: tuple[Any, str] | None = None  # the guard is in the process that puts


CASES = {
    "token out of the finish filter": Case(token, frozenset({"two tries of one claim"})),
    "trust deadline ignored": Case(trust, frozenset({"two run"})),
    "due check out of the pipeline": Case(due, frozenset({"early"})),
    "claim without status": Case(status, frozenset({"two holders"})),
    "majority off": Case(majority, frozenset({"weak write"})),
    "no catch-up after a gap": Case(catch_up, frozenset({"late"}), 6.0, {"interval": 60}),
    "sweep by event": Case(sweep, frozenset({"not taken back"}), 7.0),
    "own orphans not looked for": Case(orphan, frozenset({"orphan"}), 8.0),
    "fence at any time": Case(fast, frozenset({"taken from a living holder"})),
    "take-back uncharged": Case(charge, frozenset({"status and tries differ"})),
    "repeated put refused": Case(again, frozenset({"put refused"}), here=(putting, "_same_id")),
}


def test_each_mutation_has_its_scene():
    assert set(CASES) == set(MUTATIONS)


@pytest.fixture
def perform(
    uri, namespace, tmp_path, failpoint, monkeypatch, driver_litter
) -> Callable[..., Awaitable[set[str]]]:
    async def run(name: str, *, mutated: bool, attempt: int = 0) -> set[str]:
        case = CASES[name]
        mutation = name if mutated and case.here is None else None
        if mutated and case.here is not None and attempt == 0:
            monkeypatch.setattr(*case.here, getattr(*case.here))  # so that it is undone
            MUTATIONS[name]()
        settings = {**SETTINGS, **case.settings}
        place, folder = f"{namespace}{attempt}", tmp_path / str(attempt)
        folder.mkdir()
        async with Scene(uri, place, folder, settings=settings, apart=True, mutation=mutation) as scene:
            await case.play(Stage(scene, failpoint))
            if not mutated:
                await scene.check(30)
                return set()
            await scene.finished(case.patience)
            _, verdict = await scene.judge()
            return {one.name for one in verdict.breaches}

    return run


@pytest.mark.parametrize("name", CASES)
async def test_with_the_guard_no_promise_is_broken(name, perform):
    await perform(name, mutated=False)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", CASES)
async def test_without_the_guard_the_checker_finds_the_breach(name, perform):
    """One run that shows it is enough; a machine with too much to do may need more than one."""
    found: set[str] = set()
    for attempt in range(3):
        found |= await perform(name, mutated=True, attempt=attempt)
        assert "a runner ended" not in found, "it broke by itself, which says nothing about the guard"
        if found & CASES[name].breaches:
            return
    raise AssertionError(found)
