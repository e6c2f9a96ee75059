"""Runner processes for the tests, with the history that they, the producers and the collection write."""

from __future__ import annotations

import asyncio
import json
import signal
from collections import defaultdict
from collections.abc import Generator
from contextlib import AsyncExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from bson import ObjectId
from pymongo import AsyncMongoClient
from pymongo.errors import OperationFailure, PyMongoError

from streamjobs import PutUnknown, Queue
from streamjobs.clients import MAJORITY
from streamjobs.clock import boot
from streamjobs.job import ASAP_MS, MS_CODEC, Job, date_ms
from tests import promises, worker
from tests.conftest import check_event
from tests.forks import Fork, ready
from tests.history import Log, Run, read
from tests.sight import Limits

_STALL = 0.25  # seconds that the driver's loop may be late before the history says so
_SLOW = 0.1  # seconds that a write may take before it does
_PROBE = 0.3  # seconds between two such writes
_AGAIN = 0.2  # seconds before a put without an answer is repeated
_CLOCK = 5.0  # seconds between two looks at the server's clock


class Fleet:
    """Runner processes and their events. Options are the worker's."""

    def __init__(self, uri: str, namespace: str, folder: Path, **options: Any) -> None:
        self.uri, self.namespace, self.options = uri, namespace, options
        self.log = Log(folder / "history")
        self.processes: dict[str, Fork] = {}
        self.events: list[dict[str, Any]] = []
        self.noise: list[str] = []
        self.changed = asyncio.Event()
        self._all: list[Fork] = []
        self._readers: list[asyncio.Task[None]] = []
        ready()

    async def start(self, *names: str, **options: Any) -> None:
        """Start runners, and wait until they run."""
        for name in names:
            self.launch(name, **options)
        for name in names:
            await self.wait("runner.started", pid=self.processes[name].pid)

    def launch(self, name: str, **options: Any) -> None:
        """Start one without waiting."""
        process = Fork(
            worker.main, self.uri, self.namespace, name, str(self.log.path), {**self.options, **options}
        )
        self.processes[name] = process
        self._all.append(process)
        self._readers.append(asyncio.create_task(self._read(process)))

    async def _read(self, process: Fork) -> None:
        async for line in await process.lines():
            try:
                event = json.loads(line)
            except ValueError:
                self.noise.append(line.decode())
                continue
            self.events.append(event)
            self.log.note("event", **event)
            self.changed.set()
        self.log.note("exit", pid=process.pid, code=await process.wait())
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
        """Wait for so many events."""
        try:
            async with asyncio.timeout(seconds):
                while len(found := self.of(name, **match)) < count:
                    self.changed.clear()
                    await self.changed.wait()
        except TimeoutError:
            last = [one for one in self.events if one["event"] not in ("try", "claim")][-40:]
            raise AssertionError(f"no {name} {match}: {last} {self.noise[-20:]}") from None
        return found

    def owner(self, name: str) -> str:
        """The present id of a runner in leases."""
        return self.of("lease.registered", runner=name)[-1]["owner"]

    def pid(self, name: str) -> int:
        return self.processes[name].pid

    def running(self, name: str) -> bool:
        process = self.processes.get(name)
        return process is not None and process.running

    def kill(self, name: str) -> None:
        self.processes[name].kill()
        self.log.note("death", pid=self.pid(name), runner=name)

    def freeze(self, name: str) -> None:
        self.log.note("freeze", pid=self.pid(name), runner=name)
        self.processes[name].send_signal(signal.SIGSTOP)

    def thaw(self, name: str) -> None:
        self.processes[name].send_signal(signal.SIGCONT)
        self.log.note("thaw", pid=self.pid(name), runner=name)

    def term(self, name: str) -> None:
        self.processes[name].send_signal(signal.SIGTERM)
        self.log.note("term", pid=self.pid(name), runner=name)

    async def stop(self, seconds: float = 20) -> None:
        """End all runners in order."""
        for name in self.processes:
            if self.running(name):
                self.term(name)
        try:
            async with asyncio.timeout(seconds):
                for process in self._all:
                    await process.wait()
        finally:
            for process in self._all:
                if process.running:
                    self.log.note("death", pid=process.pid, runner="")
                    process.kill()
            if self._readers:
                await asyncio.wait(self._readers)

    def check_events(self) -> None:
        """Each sort of event is as the catalogue says, and nobody printed a traceback."""
        for event in {(one["event"], one["level"], tuple(one)): one for one in self.events}.values():
            own = ("event", "level", "timestamp", "at", "pid" if event["event"] != "runner.started" else "at")
            check_event(
                event["event"], event["level"], {key: one for key, one in event.items() if key not in own}
            )
        assert not [line for line in self.noise if "Traceback" in line], self.noise


class Scene:
    """A fleet and its collection: puts, looks on, and has the history judged.

    Args:
        uri: what the runners get.
        direct: what the driver gets, where that differs.

    """

    def __init__(
        self, uri: str, namespace: str, folder: Path, *, direct: str | None = None, **options: Any
    ) -> None:
        self.queue = Queue(uri, namespace)
        self.fleet = Fleet(uri, namespace, folder, **options)
        self.log = self.fleet.log
        self._database, _, self._name = namespace.partition(".")
        self.client: Any = AsyncMongoClient(direct or uri, tz_aware=True, appname="history")
        self.jobs = self.client[self._database][self._name]
        self._plain = self.jobs.with_options(codec_options=MS_CODEC)
        self._looking: list[asyncio.Task[None]] = []
        self._watching = asyncio.Event()
        self._holds: dict[str, list[str]] = defaultdict(list)
        self._put = self._faults = 0

    async def __aenter__(self) -> Scene:
        await self.queue.create_indexes()
        await self.note_clock()
        self._looking = [
            asyncio.create_task(one()) for one in (self._watch, self._clock, self._lag, self._probe)
        ]
        await self._watching.wait()
        return self

    async def __aexit__(self, *_: object) -> None:
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self.client.close)
            stack.push_async_callback(self.queue.close)
            stack.push_async_callback(self.fleet.stop)
            for task in self._looking:
                task.cancel()
            await asyncio.wait(self._looking)
        self.log.close()

    def draft(self, kind: str, data: dict[str, Any], **options: Any) -> Job:
        """A job to put, and its first record."""
        self._put += 1
        job = self.queue.job(kind, {**data, "n": self._put}, **options)
        interval = -(-job.retryinterval // 1_000_000) / 1000
        about = {"job": job.id, "kind": kind, "retries": job.retries, "interval": interval, "n": self._put}
        self.log.note("put", **about)
        return job

    def acknowledged(self, jobs: list[Job]) -> None:
        for job in jobs:
            runat = date_ms(job.runat)
            self.log.note("ack", job=job.id, runat=None if runat == ASAP_MS else runat)

    async def put(self, count: int, **data: Any) -> list[ObjectId]:
        """Jobs of the kinds once, many and flaky."""
        kinds = ("once", "many", "flaky", "many")
        retries = {"once": 0, "many": 20, "flaky": 20}
        names = [kinds[n % 4] for n in range(count)]
        jobs = [self.draft(one, data, retries=retries[one], retry_interval=0.05) for one in names]
        self.acknowledged(await self.queue.put_many(jobs))
        return [job.id for job in jobs]

    async def put_one(self, kind: str, data: dict[str, Any] | None = None, **options: Any) -> Job:
        job = await self.queue.put(self.draft(kind, data or {}, **options))
        self.acknowledged([job])
        return job

    async def put_until_acknowledged(self, jobs: list[Job]) -> None:
        """As PutUnknown says: again, until there is an answer."""
        while True:
            try:
                self.acknowledged(await self.queue.put_many(jobs))
                return
            except PutUnknown as error:
                jobs = error.jobs
                await asyncio.sleep(_AGAIN)
            except Exception as error:
                for job in jobs:
                    self.log.note("refused", job=job.id, error=f"{type(error).__name__}: {error}"[:500])
                return

    async def held(self, job: Job, count: int = 1, seconds: float = 20) -> None:
        """Wait until a job has been claimed so many times."""
        async with asyncio.timeout(seconds):
            while len(self._holds[str(job.id)]) < count:
                self.fleet.changed.clear()
                await self.fleet.changed.wait()

    @contextmanager
    def fault(self, sort: str, on: str) -> Generator[None, None, None]:
        """Note what is broken meanwhile, and for whom: server, fleet, producers or a runner's name."""
        self._faults += 1
        number = self._faults
        self.log.note("fault", id=number, sort=sort, on=on)
        try:
            yield
        finally:
            self.log.note("healed", id=number)

    async def drop(self) -> None:
        """Drop the collection."""
        await self.jobs.drop()
        self.log.note("dropped")

    async def documents(self) -> list[dict[str, Any]]:
        return await self.jobs.find({"kind": {"$type": "string"}}).to_list()

    async def finished(self, seconds: float = 150) -> bool:
        """Until nothing is left to run. Looks again when events have come, or after a second of quiet."""
        fleet, deadline = self.fleet, boot() + seconds
        todo = {"kind": {"$type": "string"}, "status": {"$in": [1, 2, 3]}, "data.n": {"$gt": 0}}
        while boot() < deadline:
            with suppress(PyMongoError):
                if await self.jobs.find_one(todo, {"_id": 1}) is None:
                    return True
            fleet.changed.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(1):
                    await fleet.changed.wait()
        return False

    async def judge(self, **limits: Any) -> tuple[Run, promises.Verdict]:
        """Write the documents down, and check the whole history."""
        await self.note_clock()
        self.log.note("over")
        async for document in self._plain.find({"data.n": {"$gt": 0}}):
            tries = [_dated(one) for one in document["tries"]]
            about = {key: document.get(key) for key in ("status", "retries")}
            lease = document.get("lease")
            self.log.note(
                "document", job=document["_id"], tries=tries, lease=lease and _dated(lease),
                n=document["data"]["n"], **about,
            )  # fmt: skip
        run = Run(read(self.log.path))
        settings = self.fleet.options["settings"]
        known = {name: settings[name] for name in ("lease", "beat", "margin", "interval")}
        return run, promises.check(run, Limits(slots=settings["concurrency"], **{**known, **limits}))

    async def check(self, seconds: float = 150, **limits: Any) -> tuple[Run, promises.Verdict]:
        """All has ended, and no promise was broken."""
        finished = await self.finished(seconds)
        run, verdict = await self.judge(**limits)
        assert not verdict.breaches, promises.report(run, verdict)
        assert finished, f"not finished: {self.fleet.events[-5:]} {self.fleet.noise[-20:]}"
        self.fleet.check_events()
        return run, verdict

    async def note_clock(self) -> None:
        """A sample of the server's clock, half a round trip old."""
        sent = boot()
        hello = await self.client.admin.command("hello")
        trip = boot() - sent
        self.log.note("clock", server=hello["localTime"].timestamp() * 1000 + trip * 500, trip=trip)

    async def _clock(self) -> None:
        while True:
            await asyncio.sleep(_CLOCK)
            with suppress(PyMongoError):
                async with asyncio.timeout(1):
                    await self.note_clock()

    async def _lag(self) -> None:
        """Say when this machine was too busy to turn this loop, since then it was so for the runners too."""
        while True:
            asleep = boot()
            await asyncio.sleep(0.05)
            late = boot() - asleep - 0.05
            if late > _STALL:
                self.log.note("stall", seconds=late)

    async def _probe(self) -> None:
        """Say when the server was slow for everybody: what takes some round trips can't be in time then."""
        probe = self.client[self._database].get_collection("probe", write_concern=MAJORITY)
        while True:
            sent = boot()
            with suppress(PyMongoError):
                await probe.update_one({"_id": 0}, {"$inc": {"n": 1}}, upsert=True)
            took = boot() - sent
            if took > _SLOW:
                self.log.note("stall", seconds=took)
            await asyncio.sleep(_PROBE)

    async def _watch(self) -> None:
        """Note each claim that the stream tells of: also of one whose runner never learns of it."""
        change, token = "updateDescription.updatedFields", None
        lease = {"$ifNull": [f"${change}.lease", "$fullDocument.lease"]}
        told = {"documentKey": 1, "operationType": 1, "lease": lease, "updateDescription.removedFields": 1}
        stages = [{"$match": {"operationType": {"$in": ["update", "replace"]}}}, {"$project": told}]
        while True:
            try:
                async with await self._plain.watch(
                    stages, max_await_time_ms=1000, resume_after=token
                ) as stream:
                    self._watching.set()
                    while stream.alive:
                        one = await stream.try_next()
                        token = stream.resume_token or token
                        if one is None:
                            await asyncio.sleep(0)
                        else:
                            self._note_change(one)
                    token = None
            except PyMongoError as error:
                if isinstance(error, OperationFailure):
                    token = None
            finally:
                if token is None:
                    self.log.note("gap")
                await asyncio.sleep(0.2)

    def _note_change(self, change: dict[str, Any]) -> None:
        job, lease = change["documentKey"]["_id"], change.get("lease")
        if isinstance(lease, dict) and "token" in lease:
            about = {key: lease[key] for key in ("token", "owner")}
            self.log.note("held", job=job, claimed=date_ms(lease["claimed"]), **about)
            self._holds[str(job)].append(lease["token"])
            self.fleet.changed.set()
            return
        removed = (change.get("updateDescription") or {}).get("removedFields") or []
        if "lease" in removed or (change["operationType"] == "replace" and lease is None):
            self.log.note("freed", job=job)


def _dated(document: dict[str, Any]) -> dict[str, Any]:
    """Dates as plain milliseconds."""
    out = dict(document)
    for key in ("when", "claimed", "started", "back"):
        if key in out:
            out[key] = date_ms(out[key])
    return out
