"""What a role asks of others without knowing which they are."""

from __future__ import annotations

from typing import Protocol

from streamjobs.runner.backlog import Candidate


class Listening(Protocol):
    """What the fleet asks of the stream."""

    state: str

    async def reopen(self, *, quietly: bool) -> None:
        """Open it again with what :meth:`Fleet.heard` says."""
        ...


class Taking(Protocol):
    """What it asks of whoever takes candidates in."""

    def offer(self, candidate: Candidate) -> None:
        """Try to claim it."""
        ...

    def restart(self, kind: str) -> None:
        """Read what is due of a kind."""
        ...


class Reading(Protocol):
    """What it asks of whoever reads the records."""

    def wake(self) -> None:
        """Read them now."""
        ...
