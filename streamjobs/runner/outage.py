"""When the runner's commands fail: one word at the beginning and one at the end, and how soon they are repeated."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from pymongo.errors import ExecutionTimeout

from streamjobs import events

_FIRST, _LONGEST = 0.05, 1.0  # seconds between two attempts
#: Seconds after which what was not sent is tried again.
SOON = 0.05


class Outage:
    """Which roles of a runner can't reach the server.

    Args:
        who: the runner's fields of each event.

    """

    def __init__(self, who: Callable[[], dict[str, str]]) -> None:
        self._who = who
        self._roles: set[str] = set()

    def failed(self, role: str, error: BaseException) -> None:
        """A command of this role failed; it is repeated."""
        if not self._roles:
            events.emit("server.away", **self._who(), **events.about(error))
        self._roles.add(role)

    def over(self, role: str) -> None:
        """A command of this role succeeded."""
        if role in self._roles:
            self._roles.discard(role)
            if not self._roles:
                events.emit("server.back", **self._who())


def unsent(error: BaseException | None) -> bool:
    """Whether the driver refused to send a command, since it takes the server to be slower than the time left.

    So it is for a second after a partition: all that it has measured by then are the answers that were held up.
    """
    return isinstance(error, ExecutionTimeout) and "would exceed time limit" in str(error)


class Pause:
    """How long a role waits before it repeats what has failed: from 0.05 s, doubled up to a second.

    It stays short where nothing was sent, which the server does not feel.
    """

    def __init__(self) -> None:
        self._seconds = _FIRST
        self._over = asyncio.Event()

    async def wait(self, error: BaseException | None) -> None:
        """Wait after this error."""
        seconds = SOON
        if not unsent(error):
            seconds, self._seconds = self._seconds, min(2 * self._seconds, _LONGEST)
        self._over.clear()
        timer = asyncio.get_running_loop().call_later(seconds, self._over.set)
        try:
            await self._over.wait()
        finally:
            timer.cancel()

    def cut(self) -> None:
        """End a wait: the server has answered somebody."""
        self._over.set()

    def succeeded(self) -> None:
        """Begin anew with the shortest."""
        self._seconds = _FIRST
