"""One client's connection through the proxy, and what happens to each of its requests."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from tests.proxy import wire
from tests.proxy.faults import Pass, Request, Rule
from tests.proxy.members import error, is_write
from tests.proxy.wire import Message

if TYPE_CHECKING:
    from tests.proxy.front import Front

T = TypeVar("T")


class GoneError(Exception):
    """The client, or the server, has gone, or the connection was dropped."""


class StruckError(Exception):
    """A rule has struck what the server was at."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule


class Upstream:
    """A connection to the server; replies are told apart by the request that they name."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, lost: Callable[[], None]
    ) -> None:
        self._writer = writer
        self._lost = lost
        self._asked: dict[int, asyncio.Future[Message]] = {}
        self.closed = False
        self._task = asyncio.create_task(self._read(reader))

    def send(self, message: Message) -> asyncio.Future[Message]:
        """Send a request; its reply to come."""
        if self.closed:
            raise GoneError
        future = self._asked[message.id] = asyncio.get_running_loop().create_future()
        self._writer.write(message.raw)
        return future

    def close(self) -> None:
        """Close it, after what was sent has left."""
        self.closed = True
        self._task.cancel()
        self._writer.close()
        for future in self._asked.values():
            future.cancel()

    async def _read(self, reader: asyncio.StreamReader) -> None:
        while (message := await wire.read(reader)) is not None:
            future = self._asked.pop(message.reply_to, None)
            if future is not None and not future.done():
                future.set_result(message)
        if not self.closed:
            self.close()
            self._lost()


class Connection:
    """Serves one client's requests, one after the other, as a server does."""

    def __init__(
        self, front: Front, member: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.front = front
        self.member = member
        self.app: str | None = None
        self.current: Request | None = None  # what it is at
        self._reader = reader
        self._writer = writer
        self._upstream: Upstream | None = None
        self._gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._interrupt: asyncio.Future[Rule] = asyncio.get_running_loop().create_future()
        self._inbox: asyncio.Queue[Message | None] = asyncio.Queue()

    async def serve(self) -> None:
        """Until either side goes."""
        reading = asyncio.create_task(self._read())
        try:
            while (message := await self._inbox.get()) is not None:
                await self._one(message)
        except (GoneError, OSError):
            with suppress(GoneError, StruckError):
                await self.passable()  # the end of a connection does not come through a hole either
        finally:
            reading.cancel()
            self.drop()

    def drop(self) -> None:
        """Close it."""
        if self._upstream is not None:
            self._upstream.close()
        self._writer.transport.abort()
        self._hang_up()

    def strike(self, rule: Rule) -> None:
        """Let a rule strike what is under way, if it is meant."""
        if self.current is not None and not self._interrupt.done() and rule.strikes(self.current):
            self.front.count(rule)
            self._interrupt.set_result(rule)

    async def wait(self, awaitable: Awaitable[T]) -> T:
        """Wait for something, unless the client goes or a rule strikes first."""
        task = asyncio.ensure_future(awaitable)
        try:
            await asyncio.wait({task, self._gone, self._interrupt}, return_when=asyncio.FIRST_COMPLETED)
            if self._interrupt.done():  # and if both have come: the rule has counted it
                raise StruckError(self._interrupt.result())
            if task.done():
                return task.result()
        except asyncio.CancelledError as cancelled:
            if not task.cancelled():
                raise
            raise GoneError from cancelled  # the server has gone
        finally:
            task.cancel()
        raise GoneError

    async def ask(self, message: Message) -> Message:
        """Have the server do it; its reply."""
        up = await self._connected()
        return await self.wait(up.send(message))

    async def write(self, message: Message) -> None:
        """Send a reply, once no hole swallows it."""
        await self.passable()
        self.current = None  # nothing strikes what has been answered
        with suppress(OSError):
            self._writer.write(message.raw)
            await self.wait(self._writer.drain())

    async def passable(self) -> None:
        """Wait while a hole swallows this client's traffic."""
        if self.front.swallows(self.app):
            await self.wait(self.front.until_passable(self))

    async def _one(self, message: Message) -> None:
        if message.name == "hello":
            self.app = ((message.document.get("client") or {}).get("application") or {}).get("name", self.app)
        self.current = Request(message, self.app)
        self._interrupt = asyncio.get_running_loop().create_future()
        exchange = Exchange(self, self.current)
        try:
            await self.passable()
            rule = None if exchange.refusal() is not None else self.front.rule_for(self.current)
            if rule is not None:
                await rule.action.apply(exchange)
            elif message.name == "hello":
                await self._hello(message)
            else:
                await Pass().apply(exchange)
        except StruckError as interrupted:
            if self._upstream is not None:  # what the server is at would hold up what comes next
                self._upstream.close()
                self._upstream = None
            self._interrupt = asyncio.get_running_loop().create_future()
            await interrupted.rule.action.apply(exchange)
        finally:
            self.current = None

    async def _hello(self, message: Message) -> None:
        """Answer for a member; an awaitable one when there is news, again and again if the client takes that."""
        members, asked = self.front.members, dict(message.document)
        known, wait_ms = asked.pop("topologyVersion", None), asked.pop("maxAwaitTimeMS", None)
        asked.pop("compression", None)
        legacy = "hello" not in asked
        if legacy:
            asked = {"hello": 1, **{key: one for key, one in asked.items() if key not in wire.HELLO}}
        asked.setdefault("$db", "admin")
        more = known is not None and bool(message.flags & wire.EXHAUST_ALLOWED)
        to = message.id
        while True:
            if known is not None:
                await self.wait(members.newer(self.member, known, float(wait_ms or 0) / 1000))
                await self.passable()
            said = (await self.ask(wire.request(asked))).document
            if said.get("ok"):
                said = members.hello(self.member, said, legacy=legacy)
            reply = message.reply(said, flags=wire.MORE_TO_COME if more else 0, to=to)
            await self.write(reply)
            if not more:
                return
            known, to = said.get("topologyVersion"), reply.id

    async def _connected(self) -> Upstream:
        if self._upstream is None:
            try:
                reader, writer = await self.front.connect()
            except OSError:
                self.front.server_lost()
                raise GoneError from None
            self._upstream = Upstream(reader, writer, self._server_lost)
        return self._upstream

    def _server_lost(self) -> None:
        self.front.server_lost()
        if not self.front.swallows(self.app):
            self.drop()

    async def _read(self) -> None:
        while (message := await wire.read(self._reader)) is not None:
            self._inbox.put_nowait(message)
        self._hang_up()

    def _hang_up(self) -> None:
        self._inbox.put_nowait(None)
        if not self._gone.done():
            self._gone.set_result(None)


class Exchange:
    """A request and its connection, as an action sees them."""

    def __init__(self, connection: Connection, request: Request) -> None:
        self._connection = connection
        self._front = connection.front
        self.request = request

    def refusal(self) -> Message | None:
        """What this member answers if it is not primary and must be."""
        members = self._front.members
        if members.primary == self._connection.member:
            return None
        name, document = self.request.name, self.request.document
        refused = members.refusal(self._connection.member, name, document)
        return None if refused is None else self.request.message.reply(refused)

    async def ask(self, message: Message | None = None, *, late: float = 0.0) -> Message:
        """Have the server do it, if this member is primary when it comes there; its reply.

        ``late``: so many seconds after it was done, as if it had waited for replication.
        """
        term = self._front.members.term, self._front.members.primary
        refused = self.refusal()
        if refused is not None:
            return refused
        reply = await self._connection.ask(message or self.request.message)
        if late:
            await self.wait(asyncio.sleep(late))
        if term == (self._front.members.term, self._front.members.primary):
            return reply
        return self._stepped_down(reply)

    async def ask_apart(self) -> Message:
        """The same over a connection of its own, whatever has become of the client's."""
        refused = self.refusal()
        if refused is not None:
            return refused
        up = Upstream(*await self._front.connect(), lambda: None)
        try:
            return await up.send(self.request.message)
        finally:
            up.close()

    async def reply(self, message: Message) -> None:
        """Answer the client."""
        await self._connection.write(message)

    async def wait(self, awaitable: Awaitable[T]) -> T:
        """Wait, unless the client goes."""
        return await self._connection.wait(awaitable)

    async def silence(self) -> None:
        """Answer nothing, until the client goes."""
        await self._connection.wait(asyncio.Event().wait())

    def later(self, doing: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """A task beside this exchange; it begins before anything else is awaited."""
        return self._front.spawn(doing)

    detached = later

    def drop(self) -> None:
        """Close the client's connection."""
        self._connection.drop()
        raise GoneError

    def changed(self) -> dict[str, Any]:
        """The member's topologyVersion after something changed for it."""
        self._front.members.bump(self._connection.member)
        return self._front.members.version(self._connection.member)

    def _stepped_down(self, reply: Message) -> Message:
        """A write that was under way at a step-down: done, and it can't be said whether by a majority."""
        name, document = self.request.name, self.request.document
        if not is_write(name, document) or not reply.document.get("ok"):
            return reply
        told = error(189, name, document, "the primary stepped down while waiting for replication")
        about = {"code": 189, "codeName": told["codeName"], "errmsg": told["errmsg"]}
        version = self._front.members.version(self._connection.member)
        out = {**reply.document, "writeConcernError": about, "topologyVersion": version}
        return self.request.message.reply({**out, "errorLabels": told.get("errorLabels", [])})
