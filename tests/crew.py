"""Several runners in this process, each with its own stream, for the tests of slots."""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from typing import Any
from unittest import mock

from bson import Int64, ObjectId

from streamjobs import ASAP, Queue
from streamjobs.runner.slots import COUNT, HANDFUL

#: A fallback that no test waits for, and leases that outlive the test.
CALM = {"interval": 60, "lease": 30, "beat": 0.5, "margin": 0.5, "concurrency": 4, "stop_deadline": 5}


def document(kind: str = "mail", **more: Any) -> dict[str, Any]:
    return {
        "_id": ObjectId(), "status": 1, "tries": [], "created": datetime.now(UTC), "runat": ASAP, "data": {},
        "retries": 3, "retryinterval": Int64(0), "kind": kind, **more,
    }  # fmt: skip


def in_slot(slot: int) -> ObjectId:
    return ObjectId(ObjectId().binary[:4] + secrets.token_bytes(7) + bytes([slot]))


class Crew:
    """Runners of one queue in this process, each with its own stream, and what each was told."""

    def __init__(self, queue: Queue, stack: AsyncExitStack) -> None:
        self._queue = queue
        self._stack = stack
        self.runners: list[Any] = []
        self.told: Counter[Any] = Counter()

    async def come(self, **settings: Any) -> Any:
        runner = await self._stack.enter_async_context(
            self._queue.running(f"w{len(self.runners)}", **{**CALM, **settings})
        )
        inner = runner._stream._change

        def count(change: dict[str, Any]) -> None:
            self.told[str(change["documentKey"]["_id"])] += 1
            inner(change)

        runner._stream._change = count
        self.runners.append(runner)
        return runner

    async def agreed(self) -> None:
        """Wait until every slot has one holder and one watcher, in the runners' own eyes, and filters say so."""
        live = [one for one in self.runners if not one._stopper.asked.is_set()]

        def done() -> bool:
            shares = [one._fleet._shares["mail"] for one in live]
            if len(live) <= HANDFUL:
                return all(share.holds is None for share in shares)
            return all(
                sum(len(share.holds or ()) for share in shares) == COUNT == sum(len(part) for part in parts)
                and frozenset().union(*parts) == frozenset(range(COUNT))
                for parts in ([share.holds or () for share in shares], [share.watches for share in shares])
            )

        async with asyncio.timeout(60):
            while not done():
                await asyncio.sleep(0.02)

    async def settled(self) -> None:
        """The same, and nobody listens any more to what it has lost."""
        await self.agreed()
        async with asyncio.timeout(60):
            for one in self.runners:
                while not one._stopper.asked.is_set() and _wider(one):
                    await asyncio.sleep(0.02)

    async def read(self) -> None:
        """Nobody has a page to read that began before the test's jobs, and would find them."""
        async with asyncio.timeout(60):
            for one in self.runners:
                ranges = [each for kind in one._backlog._ranges.values() for each in kind]
                while any(each.unread or each.reading for each in ranges):
                    await asyncio.sleep(0.02)

    async def noticed(self, id_: Any) -> None:
        """Wait until two runners were told of a job."""
        async with asyncio.timeout(30):
            while self.told[str(id_)] < 2:
                await asyncio.sleep(0.01)

    def of(self, slot: int) -> tuple[Any, Any]:
        """The holder and the watcher of a slot."""
        holder = next(one for one in self.runners if slot in one._fleet._shares["mail"].holds)
        return holder, next(one for one in self.runners if slot in one._fleet._shares["mail"].watches)


def _wider(runner: Any) -> bool:
    mine = runner._fleet._shares["mail"].heard
    (_, slots), *_ = runner._fleet._filter
    if runner._stream.state != "live" or len(runner._stream._readers) > 1:
        return True
    return (slots is None) != (mine is None) or (slots is not None and len(slots) != len(mine))


@asynccontextmanager
async def crew(queue: Queue, count: int, **settings: Any):
    async with AsyncExitStack() as stack:
        # the second read after a stream has begun: at once, so that none finds a test's jobs
        stack.enter_context(mock.patch("streamjobs.runner.runner._UNDER_WAY", 0.0))
        one = Crew(queue, stack)
        await asyncio.gather(*(one.come(**settings) for _ in range(count)))
        await one.settled()
        await one.read()
        yield one


def stop_for_good(runner: Any) -> None:
    """As if its process had been killed: nothing more is heard, read, claimed or said, and its lease runs on."""
    runner._stream._change = lambda change: None
    runner._claimer.stop()
    runner._waker.restart_next = lambda: None
    runner._fleet._waker = type("Nobody", (), {"offer": lambda *_: None, "restart": lambda *_: None})()
