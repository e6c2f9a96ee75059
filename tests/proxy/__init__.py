"""A proxy in front of one server that looks like a replica set of three, for tests that break the wire.

It speaks MongoDB's framing, runs in a thread with a loop of its own, so that asynchronous and synchronous clients
and other processes can use it, and everything that no rule means passes through::

    with Proxy(server.uri) as proxy:
        rule = proxy.fault(LoseReply(), commands=("update",), app="streamjobs/runner", times=1)
        ...                     # clients connect to proxy.uri
        rule.wait()             # or: await rule.hit()
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Collection, Coroutine
from typing import Any, TypeVar

from pymongo.uri_parser import parse_uri

from tests.proxy.faults import Action, Answer, App, Cut, Delay, Drop, Duplicate, Hold, Hole, LoseReply, Rule
from tests.proxy.front import Front
from tests.proxy.members import SET_NAME

__all__ = ["Answer", "Cut", "Delay", "Drop", "Duplicate", "Hold", "Hole", "LoseReply", "Proxy", "Rule"]

T = TypeVar("T")
_CALL = 10.0


class Proxy:
    """A proxy for one server; its methods may be called from any thread.

    The server may be killed and started again meanwhile: its clients see what they would see of it.

    Args:
        upstream: the server's URI; its first address counts, and there is no TLS and no compression.

    """

    def __init__(self, upstream: str) -> None:
        host, port = parse_uri(upstream, warn=False)["nodelist"][0]
        self._front = Front(host, port or 27017)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)

    def __enter__(self) -> Proxy:
        self._thread.start()
        self._call(self._front.open())
        return self

    def __exit__(self, *_: object) -> None:
        self._call(self._front.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_CALL)
        self._loop.close()

    @property
    def uri(self) -> str:
        """The three members' addresses."""
        return f"mongodb://{','.join(self.addresses)}/?replicaSet={SET_NAME}"

    @property
    def addresses(self) -> list[str]:
        """The members' addresses."""
        return list(self._front.members.addresses)

    @property
    def primary(self) -> str | None:
        """The primary's address; None while there is none."""
        index = self._front.members.primary
        return None if index is None else self.addresses[index]

    @property
    def counts(self) -> Counter[str]:
        """How often each sort of fault has struck."""
        return Counter(self._front.counts)

    def fault(
        self,
        action: Action,
        commands: Collection[str] | None = None,
        app: App = None,
        where: Callable[[dict[str, Any]], bool] | None = None,
        times: int | None = None,
        *,
        in_flight: bool = False,
    ) -> Rule:
        """Let something happen to requests: see :class:`Rule`; the first rule that means a request strikes it.

        ``in_flight``: also to what the server is at just now, for :class:`Answer` and :class:`Drop`.
        """
        rule = Rule(action, commands, app, where, times)
        self._call(self._front.add(rule, in_flight))
        return rule

    def busy(self, command: str, app: App = None) -> int:
        """At how many requests of this sort the server, or a rule, is now."""
        return self._call(self._front.busy(Rule(Drop(), (command,), app)))

    def drop(self, app: App = None) -> int:
        """Close the connections of these clients now; how many."""
        return self._call(self._front.drop(Rule(Drop(), app=app)))

    def black_hole(self, app: App = None) -> Hole:
        """Answer nothing to these clients, until ``end()`` of what is returned; a context manager too."""
        hole = Hole(app, lambda one: self._call(self._front.heal(one)))
        self._call(self._front.swallow(hole))
        return hole

    def step_down(
        self, seconds: float = 0.0, *, to: int | None = None, crash: bool = False, streams: bool = False
    ) -> None:
        """The primary steps down; the next member (or ``to``) is elected after so many seconds without one.

        Reads and streams go on, as mongod's do, and writes under way are answered with a write concern error;
        with ``streams``, a ``getMore`` under way is interrupted; with ``crash``, the member drops its connections
        and refuses new ones until the election is over.
        """
        self._call(self._front.step_down(seconds, to, crash, streams))

    def _call(self, doing: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(doing, self._loop).result(_CALL)
