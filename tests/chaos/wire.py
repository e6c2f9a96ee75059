"""Breaking what is between clients and the server: its failpoints, and the proxy."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from pymongo import AsyncMongoClient
from pymongo.errors import PyMongoError

from streamjobs.embedded import Server
from tests.chaos.schedule import FAILPOINT, SERVER, Fault
from tests.fleet import Scene
from tests.proxy import Answer, Cut, Delay, Duplicate, Hold, LoseReply, Proxy

PUT = "streamjobs/put"
_WRITES = ["update", "findAndModify"]
_SILENCE = 11.0  # seconds after which a command that got no answer is given up, and a little
_FEW = 3  # replies at most that are lost without a word, each of which costs a runner that long
_CODES: dict[str, dict[str, Any]] = {
    "close": {"closeConnection": True},
    "history-lost": {"errorCode": 286},
    "conflict": {"errorCode": 112},
    "shutdown": {"errorCode": 91},
    "concern": {"writeConcernError": {"code": 64, "errmsg": "waiting for replication timed out"}},
}
#: What a stream may get: history lost, fatal, an event too large, a cursor that is gone, no privilege.
_STREAM_ERRORS = (286, 280, 10334, 43, 13)


class Wire:
    """The wire to a server of our own.

    Args:
        polled: whether clients poll the server, so that a failpoint may say that it shuts down (it says so without
            the topologyVersion by which the others learn that it is well); else the proxy says it.

    """

    def __init__(self, scene: Scene, server: Server, proxy: Proxy, *, polled: bool) -> None:
        self._scene = scene
        self._proxy = proxy
        self._polled = polled
        self._admin: Any = AsyncMongoClient(server.uri, appname="chaos")

    async def close(self) -> None:
        await self._admin.close()

    async def inject(self, fault: Fault) -> None:
        """Break it, wait, mend it."""
        if fault.sort in FAILPOINT and (self._polled or fault.sort != "shutdown"):
            await self._failpoint(fault)
        elif fault.sort in SERVER:
            await self._election(fault)
        elif fault.sort == "hole":
            await self._hole(fault)
        elif fault.sort == "drop":
            with self._scene.fault(fault.sort, fault.on):
                self._proxy.drop(_app(fault.on))
        else:
            await self._rule(fault)

    async def _failpoint(self, fault: Fault) -> None:
        role, commands = _strike(fault)
        app = PUT if fault.on == "producers" else f"streamjobs/{role}/{fault.on}"
        data = {"appName": app, "failCommands": commands, **_CODES[fault.sort]}
        with self._scene.fault(fault.sort, fault.on):
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
            self._scene.log.note("unarmed", mode=mode, error=str(error)[:200])

    async def _election(self, fault: Fault) -> None:
        """The primary steps down; for an election it takes its time, and may crash or cut the streams too."""
        with self._scene.fault(fault.sort, "server"):
            crash, streams = fault.dice < 0.3, fault.dice > 0.7
            self._proxy.step_down(fault.lasts, crash=crash and fault.lasts > 0, streams=streams)
            await asyncio.sleep(fault.lasts)

    async def _hole(self, fault: Fault) -> None:
        with self._scene.fault(fault.sort, fault.on):
            with self._proxy.black_hole(_app(fault.on)):
                await asyncio.sleep(fault.lasts)

    async def _rule(self, fault: Fault) -> None:
        """A rule of the proxy's for a while; whoever got no answer at all waits for it for long."""
        role, commands = _strike(fault)
        action: Any
        app, where, times = _app(fault.on, role), None, None
        match fault.sort:
            case "lost-reply":
                action = LoseReply()
            case "silence":
                action, times = LoseReply(silent=True), _FEW
            case "delayed-claim":
                action, where = Hold(fault.lasts, drop=True), _is_claim
            case "delay":
                action = Delay(fault.dice, reply=fault.dice > 0.5)
            case "cut":
                action, commands = Cut(after=0.1 * fault.dice), ["getMore"]
            case "stream-error":
                code = _STREAM_ERRORS[int(fault.dice * len(_STREAM_ERRORS))]
                action, commands, app = Answer(code), ["getMore", "aggregate"], _app(fault.on, "runner")
            case "shutdown":
                action = Answer(91)
            case _:
                action = Duplicate()
        with self._scene.fault(fault.sort, fault.on):
            with self._proxy.fault(action, commands, app, where, times):
                await asyncio.sleep(fault.lasts)
            if fault.sort == "silence":
                await asyncio.sleep(_SILENCE)
            if isinstance(action, Hold):
                with suppress(TimeoutError):
                    await asyncio.to_thread(action.delivered.wait, fault.lasts)


def _strike(fault: Fault) -> tuple[str, list[str]]:
    """Which client of the victim, and which of its commands."""
    if fault.on == "producers":
        return "put", ["insert"]
    if fault.sort == "history-lost":
        return "runner", ["getMore"]
    if fault.sort == "delayed-claim":
        return "runner", _WRITES
    choices = [
        ("runner", _WRITES),
        ("runner", [*_WRITES, "find", "aggregate", "getMore"]),
        ("beat", ["update"]),
    ]
    return choices[int(fault.dice * len(choices))]


def _app(on: str, role: str | None = None) -> Callable[[str | None], bool]:
    """The clients of a victim, by the names that they give."""

    def meant(app: str | None) -> bool:
        if app is None or not app.startswith("streamjobs/"):
            return False
        if on == "producers":
            return app == PUT
        _, what, *name = app.split("/")
        return bool(name) and on in ("fleet", name[0]) and role in (None, what)

    return meant


def _is_claim(document: dict[str, Any]) -> bool:
    """Whether a write is a claim: the only ones that change several at once, or answer what they changed."""
    return "findAndModify" in document or any(one.get("multi") for one in document.get("updates", []))
