"""The replica set that clients see: three members, one of them primary, or none while an election goes on.

Each member has a ``topologyVersion`` that grows with whatever changes for it, so that clients whose monitors
wait in an awaitable ``hello`` learn of a step-down at once, as mongod's do. Only for the proxy's own loop.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from bson.int64 import Int64
from bson.objectid import ObjectId

#: The set's name in its members' ``hello``.
SET_NAME = "rs0"

_WRITES = frozenset({
    "insert", "update", "delete", "findAndModify", "bulkWrite", "commitTransaction", "abortTransaction", "create",
    "createIndexes", "drop", "dropDatabase", "dropIndexes", "renameCollection", "collMod",
})  # fmt: skip
_READS = frozenset({"find", "aggregate", "count", "distinct", "listCollections", "listIndexes"})

#: Codes by which a server says that it is not, or not for long, a primary.
STATE_CHANGE = {
    91: "ShutdownInProgress", 189: "PrimarySteppedDown", 10107: "NotWritablePrimary",
    11600: "InterruptedAtShutdown", 11602: "InterruptedDueToReplStateChange",
    13435: "NotPrimaryNoSecondaryOk", 13436: "NotPrimaryOrSecondary",
}  # fmt: skip
_NAMES = {
    **STATE_CHANGE, 6: "HostUnreachable", 7: "HostNotFound", 13: "Unauthorized", 43: "CursorNotFound",
    50: "MaxTimeMSExpired", 89: "NetworkTimeout", 112: "WriteConflict", 262: "ExceededTimeLimit",
    280: "ChangeStreamFatalError", 286: "ChangeStreamHistoryLost", 9001: "SocketException",
    10334: "BSONObjectTooLarge", 40573: "Location40573",
}  # fmt: skip
_RETRYABLE = frozenset({*STATE_CHANGE, 6, 7, 89, 262, 9001})
_RESUMABLE = frozenset({*STATE_CHANGE, 6, 7, 43, 63, 89, 133, 150, 234, 262, 9001, 13388})
_NOT_RESUMABLE = frozenset({280, 286})


def is_write(name: str, document: Mapping[str, Any]) -> bool:
    """Whether only a primary may do it."""
    if name == "aggregate":
        stages = document.get("pipeline") or [{}]
        return bool({"$out", "$merge"} & set(stages[-1]))
    return name in _WRITES


def labels(code: int, name: str, document: Mapping[str, Any]) -> list[str]:
    """The error labels that mongod gives to this code in answer to this command."""
    found: list[str] = []
    if code in _RETRYABLE and ("txnNumber" in document or name in ("commitTransaction", "abortTransaction")):
        found.append("RetryableWriteError")
    if name in ("aggregate", "getMore"):
        found += ["ResumableChangeStreamError"] if code in _RESUMABLE else []
        found += ["NonResumableChangeStreamError"] if code in _NOT_RESUMABLE else []
    return found


def error(
    code: int, name: str, document: Mapping[str, Any], message: str | None = None, **more: Any
) -> dict[str, Any]:
    """A reply that says that a command failed."""
    named = _NAMES.get(code, f"Location{code}")
    out = {"ok": 0.0, "errmsg": message or f"{named} (by the proxy)", "code": code, "codeName": named, **more}
    told = labels(code, name, document)
    return {**out, "errorLabels": told} if told else out


class Members:
    """Who is primary, and since which term."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self.addresses = list(addresses)
        self.primary: int | None = 0
        self.last = 0  # who was, or is, primary last
        self.term = 1
        self._counters = [1] * len(self.addresses)
        self._process = ObjectId()
        self._changed = asyncio.Event()

    def step_down(self) -> None:
        """The primary is one no more."""
        if self.primary is not None:
            self.last, self.primary = self.primary, None
            self._tell()

    def elect(self, index: int) -> None:
        """A member becomes primary."""
        self.primary = self.last = index
        self.term += 1
        self._tell()

    def bump(self, index: int) -> None:
        """Something changed for this member."""
        self._counters[index] += 1
        self._wake()

    def version(self, index: int, process: ObjectId | None = None) -> dict[str, Any]:
        """A member's ``topologyVersion``; a server process that is new is a member process that is new."""
        self._process = process or self._process
        digest = hashlib.sha256(self._process.binary + bytes([index])).digest()
        return {"processId": ObjectId(digest[:12]), "counter": Int64(self._counters[index])}

    async def newer(self, index: int, known: Mapping[str, Any], seconds: float) -> None:
        """Wait until a member has another version than this, but no longer than so many seconds."""
        try:
            async with asyncio.timeout(seconds):
                while dict(known) == self.version(index):
                    await self._changed.wait()
        except TimeoutError:
            pass

    def hello(self, index: int, said: Mapping[str, Any], *, legacy: bool) -> dict[str, Any]:
        """What a member says, made of what the server said."""
        dropped = {"passives", "arbiters", "compression", "primary", "electionId", "msg", "ismaster"}
        out = {key: value for key, value in said.items() if key not in dropped}
        able = bool(said.get("isWritablePrimary", said.get("ismaster")))
        writable = index == self.primary and able
        process = (said.get("topologyVersion") or {}).get("processId")
        out |= {
            "hosts": self.addresses, "setName": SET_NAME, "setVersion": 1, "me": self.addresses[index],
            "isWritablePrimary": writable, "secondary": not writable, "helloOk": True,
            "topologyVersion": self.version(index, process),
        }  # fmt: skip
        if legacy:
            out["ismaster"] = writable
        if self.primary is not None and able:
            out["primary"] = self.addresses[self.primary]
        if writable:
            out["electionId"] = ObjectId(b"\x7f\xff\xff\xff" + self.term.to_bytes(8, "big"))
        return out

    def refusal(self, index: int, name: str, document: Mapping[str, Any]) -> dict[str, Any] | None:
        """What a member that is not primary answers to what only a primary does; None where it may do it."""
        if index == self.primary:
            return None
        if is_write(name, document):
            return error(10107, name, document, "not primary", topologyVersion=self.version(index))
        mode = (document.get("$readPreference") or {}).get("mode", "primary")
        # in a transaction the first statement chose the member, which is none now
        if name in _READS and (mode == "primary" or "txnNumber" in document):
            text = "not primary and secondaryOk=false"
            return error(13435, name, document, text, topologyVersion=self.version(index))
        return None

    def _tell(self) -> None:
        for index in range(len(self.addresses)):
            self._counters[index] += 1
        self._wake()

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
