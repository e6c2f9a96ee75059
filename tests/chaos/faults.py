"""Breaking things, and mending them: one function for each sort of fault."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from bson import ObjectId
from pymongo import AsyncMongoClient
from pymongo.errors import PyMongoError

from streamjobs.embedded import Server
from streamjobs.job import ASAP, RAW_CODEC
from tests.chaos.schedule import Fault
from tests.fleet import Scene

_EXIT = 15.0  # seconds that a runner gets to stop in order before it is killed
_RUNNER, _BEAT, _PUT = "streamjobs/runner", "streamjobs/beat", "streamjobs/put"
_WRITES = ["update", "findAndModify"]
#: By sort: whom it strikes (by appName), which commands, and what they get. Put's errors are those of a server
#: that goes away; a conflict is what an insert outside a transaction never meets.
_FAILPOINTS: dict[str, list[tuple[str, list[str], dict[str, Any]]]] = {
    "close": [
        (_RUNNER, [*_WRITES, "find", "getMore", "aggregate"], {"closeConnection": True}),
        (_RUNNER, _WRITES, {"closeConnection": True}),
        (_BEAT, ["update"], {"closeConnection": True}),
        (_PUT, ["insert"], {"closeConnection": True}),
    ],
    "history-lost": [(_RUNNER, ["getMore"], {"errorCode": 286})],
    "conflict": [(_RUNNER, _WRITES, {"errorCode": 112})],
    "shutdown": [
        (app, commands, {"errorCode": 91})
        for app, commands in ((_RUNNER, _WRITES), (_BEAT, ["update"]), (_PUT, ["insert"]))
    ],
    "concern": [
        (app, commands, {"writeConcernError": {"code": 64, "errmsg": "waiting for replication timed out"}})
        for app, commands in ((_RUNNER, _WRITES), (_BEAT, ["update"]), (_PUT, ["insert"]))
    ],
}


class Faults:
    """Injects what the schedule says.

    Args:
        server: a server of our own; None where only the processes and the collection are ours.
        settings: the runners' settings.

    """

    def __init__(self, scene: Scene, server: Server | None) -> None:
        self.scene = scene
        self.server = server
        self.done: Counter[str] = Counter()
        self.down: set[str] = set()  # runners that a fault has stopped and will start again
        self._dropped: list[Any] = []
        self._admin: Any = None if server is None else AsyncMongoClient(server.uri, appname="chaos")

    async def inject(self, fault: Fault) -> None:
        """Break it, wait, mend it."""
        name = "_failpoint" if fault.sort in _FAILPOINTS else "_" + fault.sort.replace("-", "_")
        await getattr(self, name)(fault)
        self.done[fault.sort] += 1

    async def close(self) -> None:
        if self._admin is not None:
            await self._admin.close()

    async def _kill(self, fault: Fault) -> None:
        await self._without(fault, kill=True)

    async def _term(self, fault: Fault) -> None:
        await self._without(fault, kill=False)

    async def _without(self, fault: Fault, *, kill: bool) -> None:
        """End a runner, and start it again after a while."""
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
        await fleet.launch(name)

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
        with self.scene.fault(fault.sort, "server"):
            self.server.kill()
            try:
                await asyncio.sleep(fault.lasts)
            finally:
                await asyncio.to_thread(self.server.start)

    async def _server_freeze(self, fault: Fault) -> None:
        with self.scene.fault(fault.sort, "server"):
            self.server.pause()
            try:
                await asyncio.sleep(fault.lasts)
            finally:
                self.server.resume()

    async def _failpoint(self, fault: Fault) -> None:
        choices = _FAILPOINTS[fault.sort]
        app, commands, what = choices[int(fault.dice * len(choices))]
        data = {"appName": app, "failCommands": commands, **what}
        with self.scene.fault(fault.sort, "producers" if app == _PUT else "fleet"):
            try:
                await self._arm("alwaysOn", data)
                await asyncio.sleep(fault.lasts)
            finally:
                await self._arm("off", {})

    async def _arm(self, mode: str, data: dict[str, Any]) -> None:
        """Set the failpoint; a server that was killed meanwhile has forgotten it."""
        try:
            async with asyncio.timeout(15):
                await self._admin.admin.command("configureFailPoint", "failCommand", mode=mode, data=data)
        except (PyMongoError, TimeoutError) as error:
            self.scene.log.note("unarmed", mode=mode, error=str(error)[:200])

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
