"""Breaking processes and the server, and mending them; what happens on the wire is in ``wire.py``."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from bson import ObjectId
from pymongo.errors import PyMongoError

from streamjobs.embedded import Server
from streamjobs.job import ASAP, RAW_CODEC
from tests.chaos.schedule import Fault
from tests.chaos.wire import Wire
from tests.fleet import Scene

_EXIT = 15.0  # seconds that a runner gets to stop in order before it is killed


class Faults:
    """Injects what the schedule says.

    Args:
        server: a server of our own, and the wire to it; None where only the processes and the collection are ours.

    """

    def __init__(self, scene: Scene, server: Server | None, wire: Wire | None) -> None:
        self.scene = scene
        self.server = server
        self.wire = wire
        self.done: Counter[str] = Counter()
        self.down: set[str] = set()  # runners that shall not be started again yet
        self._dropped: list[Any] = []
        self._server = asyncio.Lock()  # a slow machine may need longer to start it than was planned

    async def inject(self, fault: Fault) -> None:
        """Break it, wait, mend it."""
        mine = getattr(self, "_" + fault.sort.replace("-", "_"), None)
        await (self.wire.inject if mine is None else mine)(fault)
        self.done[fault.sort] += 1

    async def _kill(self, fault: Fault) -> None:
        await self._without(fault, kill=True)

    async def _term(self, fault: Fault) -> None:
        await self._without(fault, kill=False)

    async def _without(self, fault: Fault, *, kill: bool) -> None:
        """End a runner, and let it be started again after a while."""
        fleet, name = self.scene.fleet, fault.on
        if not fleet.running(name):
            return
        self.down.add(name)
        try:
            if kill:
                fleet.kill(name)
            else:
                fleet.term(name)
                with suppress(TimeoutError):
                    async with asyncio.timeout(_EXIT):
                        await fleet.processes[name].wait()
                if fleet.running(name):
                    fleet.kill(name)
            await asyncio.sleep(fault.lasts)
        finally:
            self.down.discard(name)

    async def _freeze_short(self, fault: Fault) -> None:
        fleet, name = self.scene.fleet, fault.on
        if fleet.running(name):
            process = fleet.processes[name]
            fleet.freeze(name)
            try:
                await asyncio.sleep(fault.lasts)
            finally:
                if fleet.processes[name] is process:
                    fleet.thaw(name)

    _freeze_long = _freeze_short

    async def _server_kill(self, fault: Fault) -> None:
        async with self._server:
            await self._down(fault)

    async def _down(self, fault: Fault) -> None:
        with self.scene.fault(fault.sort, "server"):
            self.server.kill()
            try:
                await asyncio.sleep(fault.lasts)
            finally:
                await asyncio.to_thread(self.server.start)

    async def _server_freeze(self, fault: Fault) -> None:
        async with self._server:
            with self.scene.fault(fault.sort, "server"):
                self.server.pause()
                try:
                    await asyncio.sleep(fault.lasts)
                finally:
                    self.server.resume()

    async def _garbage_in(self, number: int) -> None:
        plain = {
            "status": 1,
            "kind": "many",
            "runat": ASAP,
            "data": {},
            "created": datetime.now(UTC),
            "retries": 1,
        }
        bad: list[dict[str, Any]] = [
            {**plain, "status": "1"},
            {**plain, "status": [1, 2]},
            {**plain, "kind": ["many"]},
            {**plain, "kind": None},
            {**plain, "runat": "soon"},
            {**plain, "runat": None},
            {**plain, "data": "text"},
            {**plain, "status": 2, "lease": "text"},
            {**plain, "status": 2, "lease": {"owner": "ghost"}},
            {**plain, "status": 77},
            {"_id": f"runner:garbage{number}", "control": "runner", "ends": "never"},
            {},
        ]
        for document in bad:
            document.setdefault("_id", ObjectId())
        raw = self.scene.jobs.with_options(codec_options=RAW_CODEC)
        await raw.insert_many(bad)
        self._dropped += await raw.find({"_id": {"$in": [one["_id"] for one in bad]}}).to_list()

    async def _garbage(self, fault: Fault) -> None:
        with suppress(PyMongoError):  # what was inserted without an answer is garbage all the same
            async with asyncio.timeout(10):
                await self._garbage_in(int(fault.at * 1000))

    async def inspect_garbage(self) -> None:
        """Note whether all of it is as it was."""
        raw = self.scene.jobs.with_options(codec_options=RAW_CODEC)
        for one in self._dropped:
            now = await raw.find_one({"_id": one["_id"]})
            self.scene.log.note("garbage", job=one["_id"], kept=now is not None and now.raw == one.raw)
