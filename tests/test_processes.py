"""Eight runner processes, and what happens to their jobs when one dies, the server does, or history is lost."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections import defaultdict
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from bson import ObjectId
from pymongo import AsyncMongoClient
from pymongo.errors import PyMongoError

from streamjobs import Queue
from streamjobs.clock import boot
from streamjobs.embedded import Server
from tests.conftest import check_event

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
WORKER = Path(__file__).parent / "worker.py"


class Fleet:
    """Runner processes, their events, and the history that their handlers wrote."""

    def __init__(self, uri: str, namespace: str, folder: Path) -> None:
        self.uri, self.namespace, self.history = uri, namespace, folder / "history"
        self.processes: dict[str, asyncio.subprocess.Process] = {}
        self.events: list[dict[str, Any]] = []
        self.noise: list[str] = []
        self.changed = asyncio.Event()
        self.killed: dict[str, float] = {}
        self.frozen: dict[str, float] = {}
        self._readers: list[asyncio.Task[None]] = []
        self.history.touch()

    async def start(self, *names: str) -> None:
        for name in names:
            process = await asyncio.create_subprocess_exec(
                sys.executable, str(WORKER), self.uri, self.namespace, name, str(self.history), json.dumps(SETTINGS),
                stderr=asyncio.subprocess.PIPE,
            )  # fmt: skip
            self.processes[name] = process
            self._readers.append(asyncio.create_task(self._read(process)))
        for name in names:
            await self.wait("runner.started", runner=name)

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        async for line in process.stderr:
            try:
                event = json.loads(line)
            except ValueError:
                self.noise.append(line.decode())
                continue
            self.events.append(event)
            self.changed.set()

    def of(self, name: str, **match: Any) -> list[dict[str, Any]]:
        return [
            one
            for one in self.events
            if one["event"] == name and all(one.get(k) == v for k, v in match.items())
        ]

    async def wait(
        self, name: str, count: int = 1, seconds: float = 30, **match: Any
    ) -> list[dict[str, Any]]:
        try:
            async with asyncio.timeout(seconds):
                while len(found := self.of(name, **match)) < count:
                    self.changed.clear()
                    await self.changed.wait()
        except TimeoutError:
            last = [one for one in self.events if one["event"] not in ("try", "claim")][-40:]
            raise AssertionError(f"no {name} {match}: {last} {self.noise[-20:]}") from None
        return found

    def kill(self, name: str) -> None:
        self.processes[name].kill()
        self.killed[name] = boot()

    async def finished(self, jobs: Any, seconds: float = 150) -> None:
        """Until nothing is left to run. Looks again when events have come, or after a second of quiet."""
        deadline = boot() + seconds
        while boot() < deadline:
            with suppress(PyMongoError):
                left = await jobs.count_documents({"kind": {"$type": "string"}, "status": {"$in": [1, 2, 3]}})
                if left == 0:
                    return
            self.changed.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(1):
                    await self.changed.wait()
        states = await (await jobs.aggregate([{"$group": {"_id": "$status", "n": {"$sum": 1}}}])).to_list()
        raise AssertionError(f"not finished: {states}; {self.events[-5:]} {self.noise[-20:]}")

    async def stop(self) -> None:
        for process in self.processes.values():
            if process.returncode is None:
                process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(20):
                for process in self.processes.values():
                    await process.wait()
        finally:
            for process in self.processes.values():
                if process.returncode is None:
                    process.kill()
            await asyncio.wait(self._readers)

    def tries(self) -> dict[str, list[dict[str, Any]]]:
        """What the handlers wrote, by job: runner, start, and end (None where the process was killed)."""
        out: dict[str, list[dict[str, Any]]] = defaultdict(list)
        open_: dict[tuple[str, int, str], dict[str, Any]] = {}
        for line in self.history.read_text().splitlines():
            one = json.loads(line)
            key = (one["job"], one["number"], one["runner"])
            if one["what"] == "start":
                open_[key] = {"runner": one["runner"], "start": one["at"], "end": None}
                out[one["job"]].append(open_[key])
            else:
                open_[key]["end"] = one["at"]
        return out

    def check(self, documents: list[dict[str, Any]]) -> None:
        """Nothing lost, nothing held by two at once, nothing that may start once started twice."""
        tries = self.tries()
        for document in documents:
            runs = sorted(tries[str(document["_id"])], key=lambda one: one["start"])
            if document["kind"] == "once":
                assert len(runs) <= 1, (document, runs)
                assert document["status"] in (4, 5), document
                if document["status"] == 5:
                    assert document["tries"][-1]["outcome"] in ("lost", "interrupted"), document
            else:
                assert document["status"] == 4, document
                assert len(runs) >= 1
            for before, after in zip(runs, runs[1:], strict=False):
                # a frozen process runs on until its loop's first turn; what it held was free long before
                ended = self.frozen.get(before["runner"]) or before["end"] or self.killed[before["runner"]]
                assert ended <= after["start"], (document, runs)
            assert "lease" not in document
        for event in {(one["event"], one["level"], tuple(one)): one for one in self.events}.values():
            told = {key: value for key, value in event.items() if key not in ("event", "level", "timestamp")}
            check_event(event["event"], event["level"], told)
        assert not [line for line in self.noise if "Traceback" in line], self.noise


class Scene:
    """A fleet of eight and its collection."""

    def __init__(self, uri: str, namespace: str, folder: Path) -> None:
        self.queue = Queue(uri, namespace)
        self.fleet = Fleet(uri, namespace, folder)
        database, _, name = namespace.partition(".")
        self.client = AsyncMongoClient(uri, tz_aware=True)
        self.jobs = self.client[database][name]

    async def __aenter__(self) -> Scene:
        await self.queue.create_indexes()
        await self.fleet.start(*(f"r{n}" for n in range(8)))
        return self

    async def __aexit__(self, *_: object) -> None:
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self.client.close)
            stack.push_async_callback(self.queue.close)
            await self.fleet.stop()

    async def put(self, count: int, **data: Any) -> list[ObjectId]:
        kinds = ("once", "many", "flaky", "many")
        retries = {"once": 0, "many": 20, "flaky": 20}
        kind = [kinds[n % 4] for n in range(count)]
        jobs = [self.queue.job(one, data, retries=retries[one], retry_interval=0.05) for one in kind]
        return [job.id for job in await self.queue.put_many(jobs)]

    async def documents(self) -> list[dict[str, Any]]:
        return await self.jobs.find({"kind": {"$type": "string"}}).to_list()


@pytest.mark.timeout(300)
async def test_eight_processes_one_killed_with_9_under_load(uri, namespace, tmp_path, python_server):
    count = 600 if python_server else 5_000
    async with Scene(uri, namespace, tmp_path) as scene:
        fleet = scene.fleet
        await scene.put(60, seconds=2.0)
        await scene.put(count)
        await fleet.wait("try", count=20)
        for name in ("r3", "r4", "r5"):  # until one dies with jobs in hand
            owner = fleet.of("lease.registered", runner=name)[0]["owner"]
            fleet.kill(name)
            record = await scene.jobs.find_one({"_id": f"runner:{owner}"})
            if held := await scene.jobs.distinct("_id", {"lease.owner": owner}):
                break
        await fleet.wait("takeback", taken=owner, seconds=LEASE + 20)
        await fleet.finished(scene.jobs)
        documents = await scene.documents()
        assert len(documents) == count + 60
        fleet.check(documents)
        lost = [
            one
            for doc in documents
            if doc["_id"] in held
            for one in doc["tries"]
            if one.get("outcome") == "lost"
        ]
        assert len(lost) == len(held) > 0
        for one in lost:
            assert 0 <= (one["when"] - record["ends"]).total_seconds() <= 1.0


@pytest.mark.timeout(300)
async def test_a_frozen_process_finds_its_jobs_taken_and_records_nothing_of_them(uri, namespace, tmp_path):
    async with Scene(uri, namespace, tmp_path) as scene:
        fleet = scene.fleet
        await scene.put(60, seconds=3.0)
        await fleet.wait("try", count=3)
        owner = fleet.of("lease.registered", runner="r2")[0]["owner"]
        fleet.processes["r2"].send_signal(signal.SIGSTOP)
        fleet.frozen["r2"] = boot()
        try:
            await fleet.wait("takeback", taken=owner)
        finally:
            fleet.processes["r2"].send_signal(signal.SIGCONT)
        await fleet.wait("lease.registered", runner="r2", count=2)
        await fleet.finished(scene.jobs)
        documents = await scene.documents()
        fleet.check(documents)
        lost = [one for doc in documents for one in doc["tries"] if one.get("outcome") == "lost"]
        assert lost


@pytest.mark.timeout(300)
async def test_eight_processes_and_a_server_that_is_away_for_five_seconds(own_server: Server, tmp_path):
    count = 400 if own_server.program.sort == "python" else 2_000
    async with Scene(own_server.uri, "app.jobs", tmp_path) as scene:
        await scene.put(count)
        await scene.fleet.wait("try", count=count // 10)
        own_server.kill()
        away = boot()
        with suppress(TimeoutError):
            async with asyncio.timeout(5):
                while boot() - away < 5:
                    scene.fleet.changed.clear()
                    await scene.fleet.changed.wait()
        own_server.start()
        await scene.fleet.finished(scene.jobs)
        documents = await scene.documents()
        assert len(documents) == count
        scene.fleet.check(documents)


@pytest.mark.timeout(300)
async def test_eight_processes_whose_stream_history_is_lost(
    uri, namespace, tmp_path, python_server, failpoint
):
    count = 300 if python_server else 3_000
    async with Scene(uri, namespace, tmp_path) as scene:
        await scene.put(count // 2)
        await scene.fleet.wait("try", count=10)
        failpoint({"times": 16}, "streamjobs/runner", ["getMore"], errorCode=286)
        await scene.put(count // 2)
        await scene.fleet.wait("stream.state", state="gap", count=8)
        await scene.fleet.finished(scene.jobs)
        documents = await scene.documents()
        assert len(documents) == count
        scene.fleet.check(documents)


@pytest.mark.timeout(300)
async def test_eight_processes_whose_collection_is_dropped_and_made_again(uri, namespace, tmp_path):
    async with Scene(uri, namespace, tmp_path) as scene:
        await scene.put(100, seconds=0.5)
        await scene.fleet.wait("try", count=10)
        await scene.jobs.drop()
        await scene.put(200)
        await scene.fleet.wait("lease.registered", count=16)
        await scene.fleet.wait("indexes.missing", count=8)
        await scene.queue.create_indexes()  # as the event says
        await scene.put(200)
        await scene.fleet.finished(scene.jobs)
        documents = await scene.documents()
        assert len(documents) == 400
        scene.fleet.check(documents)


async def test_two_processes_stopped_by_sigterm_put_back_what_they_held(uri, namespace, tmp_path):
    async with Scene(uri, namespace, tmp_path) as scene:
        fleet = scene.fleet
        await scene.put(80, seconds=2)
        await fleet.wait("claim", count=0)
        await fleet.wait("try", count=3)
        for name in ("r0", "r1"):
            fleet.processes[name].send_signal(signal.SIGTERM)
        for name in ("r0", "r1"):
            assert await asyncio.wait_for(fleet.processes[name].wait(), 20) == 0
        await fleet.finished(scene.jobs)
        fleet.check(await scene.documents())
        assert not fleet.of("takeback")
