"""The proxy's inside, in a loop of its own: listeners, connections, rules, holes, the replica set."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from tests.proxy.connection import Connection, GoneError, StruckError
from tests.proxy.faults import Answer, Hole, Request, Rule, means
from tests.proxy.members import Members

T = TypeVar("T")
_MEMBERS = 3
_LOOK = 0.02  # seconds between looks whether the server is back


class Front:
    """Everything that lives in the proxy's loop; its methods are for that loop only."""

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self._listeners: list[asyncio.Server | None] = []
        self._ports: list[int] = []
        self._crashed: set[int] = set()
        self._connections: set[Connection] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._away: asyncio.Task[None] | None = None
        self._passable = asyncio.Event()
        self._closing = False
        self.rules: list[Rule] = []
        self.holes: list[Hole] = []
        self.counts: Counter[str] = Counter()

    async def open(self) -> None:
        """Listen."""
        for index in range(_MEMBERS):
            listener = await self._listen(index, 0)
            self._listeners.append(listener)
            self._ports.append(listener.sockets[0].getsockname()[1])
        self.members = Members([f"127.0.0.1:{port}" for port in self._ports])

    async def close(self) -> None:
        """Drop everything."""
        self._closing = True
        for index in range(_MEMBERS):
            self._deafen(index)
        for connection in list(self._connections):
            connection.drop()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A new connection to the server."""
        return await asyncio.open_connection(self._host, self._port)

    def spawn(self, doing: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """A task that ends with the proxy."""
        task = asyncio.create_task(doing)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def rule_for(self, request: Request) -> Rule | None:
        """The first rule that strikes."""
        for rule in self.rules:
            if rule.strikes(request):
                self.count(rule)
                return rule
        return None

    def count(self, rule: Rule) -> None:
        """It has struck."""
        self.counts[type(rule.action).__name__] += 1

    async def add(self, rule: Rule, in_flight: bool) -> None:
        """A rule from now on; ``in_flight``: also for what the server is at."""
        self.rules = [one for one in self.rules if not one.over] + [rule]
        if in_flight:
            for connection in list(self._connections):
                connection.strike(rule)

    async def busy(self, rule: Rule) -> int:
        """How many requests that a rule means are under way."""
        return sum(one.current is not None and rule.meant(one.current) for one in self._connections)

    async def drop(self, rule: Rule) -> int:
        """Close the connections of the clients that a rule means; how many."""
        hit = [one for one in self._connections if means(rule.app, one.app)]
        for one in hit:
            one.drop()
        self.counts["Drop"] += len(hit)
        return len(hit)

    # --- partitions

    async def swallow(self, hole: Hole) -> None:
        """Let a hole swallow."""
        self.counts["Hole"] += 1
        self.holes.append(hole)

    async def heal(self, hole: Hole) -> None:
        """End a hole."""
        with suppress(ValueError):
            self.holes.remove(hole)
        passable, self._passable = self._passable, asyncio.Event()
        passable.set()

    def swallows(self, app: str | None) -> bool:
        """Whether a client's traffic is swallowed."""
        return any(hole.covers(app) for hole in self.holes)

    async def until_passable(self, connection: Connection) -> None:
        """Wait until it is not."""
        while self.swallows(connection.app):
            await self._passable.wait()

    # --- the replica set

    async def step_down(self, seconds: float, to: int | None, crash: bool, streams: bool) -> None:
        """The primary steps down; another is elected after so many seconds."""
        self.counts["StepDown"] += 1
        old = self.members.last if self.members.primary is None else self.members.primary
        self.members.step_down()
        if crash:
            self._crashed.add(old)
            self._deafen(old)
            for connection in [one for one in self._connections if one.member == old]:
                connection.drop()
        elif streams:
            cut = Rule(Answer(11602, "operation was interrupted"), ("getMore",))
            for connection in [one for one in self._connections if one.member == old]:
                connection.strike(cut)
        elected = (old + 1) % _MEMBERS if to is None else to
        if seconds > 0:
            self.spawn(self._elect_later(elected, seconds))
        else:
            await self._elect(elected)

    async def _elect_later(self, index: int, seconds: float) -> None:
        await asyncio.sleep(seconds)
        await self._elect(index)

    async def _elect(self, index: int) -> None:
        crashed, self._crashed = self._crashed, set()
        for one in crashed:
            await self._hear(one)
        self.members.elect(index)

    # --- the server

    def server_lost(self) -> None:
        """The server is not there: be not there either, until it is back."""
        if self._away is None and not self._closing:
            for index in range(_MEMBERS):
                self._deafen(index)
            self._away = self.spawn(self._until_back())

    async def _until_back(self) -> None:
        while True:
            with suppress(OSError):
                _, writer = await self.connect()
                writer.close()
                break
            await asyncio.sleep(_LOOK)
        self._away = None
        for index in range(_MEMBERS):
            if index not in self._crashed:
                await self._hear(index)

    async def _hear(self, index: int) -> None:
        if self._listeners[index] is None and self._away is None and not self._closing:
            self._listeners[index] = await self._listen(index, self._ports[index])

    def _deafen(self, index: int) -> None:
        listener, self._listeners[index] = self._listeners[index], None
        if listener is not None:
            listener.close()

    async def _listen(self, index: int, port: int) -> asyncio.Server:
        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connection = Connection(self, index, reader, writer)
            self._connections.add(connection)
            serving = self.spawn(connection.serve())
            serving.add_done_callback(lambda _: self._connections.discard(connection))

        return await asyncio.start_server(accept, "127.0.0.1", port)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, (GoneError, StruckError, OSError)):
            told = {"message": "a task of the proxy failed", "exception": error}
            asyncio.get_running_loop().call_exception_handler(told)
