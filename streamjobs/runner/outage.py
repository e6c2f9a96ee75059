"""One word when the runner's commands begin to fail, and one when all of them succeed again."""

from __future__ import annotations

from collections.abc import Callable

from streamjobs import events


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
