"""What can be done to a request, and the rules that say to which.

An action's ``apply`` is the whole of what happens between a request and its reply; tests may bring their own.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from tests.proxy.members import STATE_CHANGE, error

if TYPE_CHECKING:
    from tests.proxy.connection import Exchange


class Action(Protocol):
    """What happens to a request."""

    async def apply(self, exchange: Exchange) -> None:
        """Answer the request, or do not."""
        ...


class Pass:
    """Nothing special."""

    async def apply(self, exchange: Exchange) -> None:
        await exchange.reply(await exchange.ask())


@dataclass
class Drop:
    """Close the connection; the request is not carried out (or, in flight, perhaps it is)."""

    async def apply(self, exchange: Exchange) -> None:
        exchange.drop()


@dataclass
class LoseReply:
    """Have the request carried out, and close the connection in place of the reply; ``silent``: say nothing."""

    silent: bool = False

    async def apply(self, exchange: Exchange) -> None:
        await exchange.ask()
        if self.silent:
            await exchange.silence()
        exchange.drop()


@dataclass
class Cut:
    """Pass the request on, and close the connection once the server is at it: for a ``getMore`` that waits."""

    after: float = 0.0

    async def apply(self, exchange: Exchange) -> None:
        asking = exchange.later(exchange.ask())
        await exchange.wait(asyncio.sleep(self.after))
        asking.cancel()
        exchange.drop()


@dataclass
class Delay:
    """Let the request (or, with ``reply``, its reply) come so many seconds late."""

    seconds: float
    reply: bool = False

    async def apply(self, exchange: Exchange) -> None:
        if not self.reply:
            await exchange.wait(asyncio.sleep(self.seconds))
        await exchange.reply(await exchange.ask(late=self.seconds if self.reply else 0.0))


@dataclass
class Duplicate:
    """Send the request twice; the second reply is swallowed."""

    async def apply(self, exchange: Exchange) -> None:
        first = exchange.later(exchange.ask())
        second = exchange.later(exchange.ask(exchange.request.message.again()))
        answer = await first
        await second
        await exchange.reply(answer)


@dataclass
class Hold:
    """Keep the request until :meth:`release`, or so many seconds, and then have it carried out.

    Also when its client has gone by then, as bytes in a socket would be; ``drop`` closes the client's connection
    at once, so that it looks for what it asked before that has landed.

    Attributes:
        delivered: set when a request that was kept has been carried out.

    """

    seconds: float | None = None
    drop: bool = False
    delivered: threading.Event = field(default_factory=threading.Event)
    _released: bool = False
    _waiting: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = field(default_factory=list)

    def release(self) -> None:
        """Deliver what was kept, and what comes from now on at once; from any thread."""
        self._released = True
        for loop, event in self._waiting:
            loop.call_soon_threadsafe(event.set)

    async def apply(self, exchange: Exchange) -> None:
        late = exchange.detached(self._deliver(exchange))
        if self.drop:
            exchange.drop()
        await exchange.reply(await exchange.wait(asyncio.shield(late)))

    async def _deliver(self, exchange: Exchange) -> Any:
        event = asyncio.Event()
        self._waiting.append((asyncio.get_running_loop(), event))
        if not self._released:
            try:
                async with asyncio.timeout(self.seconds):
                    await event.wait()
            except TimeoutError:
                pass
        answer = await exchange.ask_apart()
        self.delivered.set()
        return answer


@dataclass
class Answer:
    """Answer an error code in place of the server, with the labels and the topologyVersion that mongod gives.

    Args:
        code: the code.
        message: its text.
        carried_out: whether the server does it nevertheless.
        write_concern: whether it is an error of the write concern: the write is done, and not by a majority.

    """

    code: int
    message: str | None = None
    carried_out: bool = False
    write_concern: bool = False

    async def apply(self, exchange: Exchange) -> None:
        name, document = exchange.request.name, exchange.request.document
        done: Mapping[str, Any] = {}
        if self.carried_out or self.write_concern:
            done = (await exchange.ask()).document
        told = error(self.code, name, document, self.message)
        if self.code in STATE_CHANGE:
            told["topologyVersion"] = exchange.changed()
        if self.write_concern:
            about = {"code": self.code, "codeName": told["codeName"], "errmsg": told["errmsg"]}
            told = {**done, "writeConcernError": about, "errorLabels": told.get("errorLabels", [])}
        await exchange.reply(exchange.request.message.reply(told))


@dataclass(frozen=True)
class Request:
    """A request as rules see it."""

    message: Any
    app: str | None

    @property
    def name(self) -> str:
        """The command."""
        return self.message.name

    @property
    def document(self) -> dict[str, Any]:
        """The command document, with its sequences as arrays."""
        return self.message.document


#: Which clients, by application name: one, those of a predicate, or all.
App = str | Callable[[str | None], bool] | None


def means(app: App, name: str | None) -> bool:
    """Whether a client with this application name is meant."""
    if app is None:
        return True
    return app(name) if callable(app) else app == name


class Rule:
    """To which requests an action happens.

    Args:
        action: what happens.
        commands: their names; None is every one but ``hello``, which is struck only when named.
        app: the client's application name, or a predicate on it; None is everybody.
        where: a predicate on the command document.
        times: how often at most.

    Attributes:
        count: how often it has struck.
        struck: set at the first time.

    """

    def __init__(
        self,
        action: Action,
        commands: Collection[str] | None = None,
        app: App = None,
        where: Callable[[dict[str, Any]], bool] | None = None,
        times: int | None = None,
    ) -> None:
        self.action = action
        self.commands = None if commands is None else frozenset(commands)
        self.app = app
        self.where = where
        self.times = times
        self.count = 0
        self.struck = threading.Event()
        self._over = False
        self._lock = threading.Lock()
        self._awaited: list[tuple[int, Future[None]]] = []

    def strikes(self, request: Request) -> bool:
        """Whether it does, which is counted."""
        if not self.meant(request):
            return False
        with self._lock:
            if self.over:
                return False
            self.count += 1
            for count, future in self._awaited:
                if self.count >= count and not future.done():
                    future.set_result(None)
        self.struck.set()
        return True

    @property
    def over(self) -> bool:
        """Whether it strikes no more."""
        return self._over or (self.times is not None and self.count >= self.times)

    def remove(self) -> None:
        """Strike no more."""
        with self._lock:
            self._over = True

    def __enter__(self) -> Rule:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def wait(self, count: int = 1, timeout: float = 30.0) -> None:
        """Wait until it has struck so often."""
        self._reached(count).result(timeout)

    async def hit(self, count: int = 1, timeout: float = 30.0) -> None:
        """The same in an event loop."""
        await asyncio.wait_for(asyncio.wrap_future(self._reached(count)), timeout)

    def _reached(self, count: int) -> Future[None]:
        future: Future[None] = Future()
        with self._lock:
            if self.count >= count:
                future.set_result(None)
            else:
                self._awaited.append((count, future))
        return future

    def meant(self, request: Request) -> bool:
        """Whether it is a rule for this request."""
        if request.name == "hello" if self.commands is None else request.name not in self.commands:
            return False
        return means(self.app, request.app) and (self.where is None or self.where(request.document))


class Hole:
    """A partition: connections are accepted, and nothing is answered, until it ends.

    What was swallowed meanwhile is carried out when it ends if its client is still there, as TCP would have it.
    """

    def __init__(self, app: App, end: Callable[[Hole], None]) -> None:
        self.app = app
        self._end = end

    def covers(self, app: str | None) -> bool:
        """Whether a client with this application name is behind it."""
        return means(self.app, app)

    def end(self) -> None:
        """Let everything through again."""
        self._end(self)

    def __enter__(self) -> Hole:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
