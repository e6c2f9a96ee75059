"""Runner processes, mostly eight, and what happens to their jobs when one dies, the server does, or history is lost."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest

from streamjobs.clock import boot
from streamjobs.embedded import Server
from tests.fleet import Scene

LEASE = 3.0
SETTINGS = {
    "concurrency": 5,
    "interval": 3,
    "lease": LEASE,
    "beat": 0.5,
    "margin": 0.5,
    "stop_deadline": 5,
    "stream_wait": 2,
}


#: How long a due job may wait for an idle runner is no question here, where eight want each of thousands.
CROWDED = {"live": 60, "interval": 60}


async def runners(scene: Scene, count: int = 8) -> None:
    await scene.fleet.start(*(f"r{n}" for n in range(count)))


@pytest.mark.timeout(600)
async def test_eight_processes_one_killed_with_9_under_load(uri, namespace, tmp_path, python_server):
    count = 60 if python_server else 5_000
    async with Scene(uri, namespace, tmp_path, settings=SETTINGS) as scene:
        await runners(scene)
        fleet = scene.fleet
        await scene.put(60, upto=2.0)
        await scene.put(count)
        await fleet.wait("try", count=20)
        for name in ("r3", "r4", "r5"):  # until one dies with jobs in hand
            owner = fleet.of("lease.registered", runner=name)[0]["owner"]
            fleet.kill(name)
            record = await scene.jobs.find_one({"_id": f"runner:{owner}"})
            if held := await scene.jobs.distinct("_id", {"lease.owner": owner}):
                break
        await fleet.wait("takeback", taken=owner, seconds=LEASE + 20)
        await scene.check(400, **CROWDED)
        documents = await scene.documents()
        assert len(documents) == count + 60
        lost = [
            one
            for doc in documents
            if doc["_id"] in held
            for one in doc["tries"]
            if one.get("outcome") == "lost"
            and owner in one["err"]  # one that was killed before may have lost it too
        ]
        assert len(lost) == len(held) > 0
        for one in lost:
            assert 0 <= (one["when"] - record["ends"]).total_seconds() <= 1.0


@pytest.mark.timeout(300)
async def test_a_frozen_process_finds_its_jobs_taken_and_records_nothing_of_them(uri, namespace, tmp_path):
    async with Scene(uri, namespace, tmp_path, settings=SETTINGS) as scene:
        await runners(scene, 4)
        fleet = scene.fleet
        await scene.put(30, upto=3.0)
        await fleet.wait("try", count=3)
        for name in fleet.processes:  # until one is frozen with jobs in hand
            owner = fleet.owner(name)
            fleet.freeze(name)
            if await scene.jobs.find_one({"lease.owner": owner}) is not None:
                break
            fleet.thaw(name)
        try:
            await fleet.wait("takeback", taken=owner)
        finally:
            fleet.thaw(name)
        await fleet.wait("lease.registered", runner=name, count=2)
        run, _ = await scene.check(**CROWDED)
        assert any(one.outcome == "lost" for life in run.jobs.values() for one in life.attempts.values())


@pytest.mark.timeout(300)
async def test_eight_processes_and_a_server_that_is_away_for_five_seconds(own_server: Server, tmp_path):
    count = 80 if own_server.program.sort == "python" else 2_000
    async with Scene(own_server.uri, "app.jobs", tmp_path, settings=SETTINGS) as scene:
        await runners(scene)
        await scene.put(count)
        await scene.fleet.wait("try", count=count // 10)
        with scene.fault("kill", "server"):
            own_server.kill()
            away = boot()
            with suppress(TimeoutError):
                async with asyncio.timeout(5):
                    while boot() - away < 5:
                        scene.fleet.changed.clear()
                        await scene.fleet.changed.wait()
            own_server.start()
        await scene.check(**CROWDED)
        assert len(await scene.documents()) == count


@pytest.mark.timeout(300)
async def test_eight_processes_whose_stream_history_is_lost(
    uri, namespace, tmp_path, python_server, failpoint
):
    count = 80 if python_server else 3_000
    async with Scene(uri, namespace, tmp_path, settings=SETTINGS) as scene:
        await runners(scene)
        await scene.put(count // 2)
        await scene.fleet.wait("try", count=10)
        with scene.fault("286", "fleet"):
            # enough for each, though some get several, and a stream that another is to follow gets its own
            failpoint({"times": 40}, "streamjobs/runner", ["getMore"], errorCode=286)
            await scene.put(count // 2)
            await scene.fleet.wait("stream.state", state="gap", count=8)
        await scene.check(**CROWDED)
        assert len(await scene.documents()) == count


@pytest.mark.timeout(300)
async def test_eight_processes_whose_collection_is_dropped_and_made_again(
    uri, namespace, tmp_path, python_server
):
    count = 30 if python_server else 200
    async with Scene(uri, namespace, tmp_path, settings=SETTINGS) as scene:
        await runners(scene)
        await scene.put(2 * count, upto=0.5)
        await scene.fleet.wait("try", count=10)
        with scene.fault("drop", "fleet"):
            await scene.drop()
            await scene.put(count)
            await scene.fleet.wait("lease.registered", count=16)
            await scene.fleet.wait("indexes.missing", count=8)
            await scene.queue.create_indexes()  # as the event says
        await scene.put(count)
        await scene.check(**CROWDED)
        assert len(await scene.documents()) == 2 * count


async def test_two_processes_stopped_by_sigterm_put_back_what_they_held(uri, namespace, tmp_path):
    async with Scene(uri, namespace, tmp_path, settings=SETTINGS) as scene:
        await runners(scene, 4)
        fleet = scene.fleet
        await scene.put(40, upto=2)
        await fleet.wait("try", count=3)
        for name in ("r0", "r1"):
            fleet.term(name)
        for name in ("r0", "r1"):
            assert await asyncio.wait_for(fleet.processes[name].wait(), 20) == 0
        await scene.check(**CROWDED)
        assert not fleet.of("takeback")
