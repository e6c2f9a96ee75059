"""How a runner behaves: checked once, together, when it is made."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self, TypedDict

from streamjobs.errors import BadArgument, ConfigError, meant

_NAME = 190  # characters of a default name: a host's may be longer than a name may


class Choices(TypedDict, total=False):
    """The arguments of :class:`Settings`, for editors and type checkers: what each means is said there."""

    concurrency: int
    interval: float
    stop_deadline: float
    lease: float
    beat: float
    margin: float
    max_block: float
    poll: float | None
    stream_wait: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """A runner's settings; all times in seconds.

    Attributes:
        concurrency: jobs that it holds and runs at the same time.
        interval: the fallback's period: how late a job can be whatever was missed.
        stop_deadline: how long running handlers may go on after stop was asked.
        lease: how long after its last renewal a silent runner's jobs stay its own.
        beat: time between renewals.
        margin: how much earlier than the lease's end a runner stops trusting it: a bound on the difference
            between the clocks of the replica set's members.
        max_block: how long a handler may block the event loop before the runner's health turns bad.
        poll: None to listen to the change stream; a number to query that often instead, where streams can't be had.
        stream_wait: longest wait of one read of the stream.

    """

    concurrency: int = 10
    interval: float = 30.0
    stop_deadline: float = 30.0
    lease: float = 30.0
    beat: float = 5.0
    margin: float = 2.0
    max_block: float = 60.0
    poll: float | None = None
    stream_wait: float = 10.0

    def __post_init__(self) -> None:
        if (
            not isinstance(self.concurrency, int)
            or isinstance(self.concurrency, bool)
            or not 1 <= self.concurrency <= 10_000
        ):
            raise BadArgument("concurrency", self.concurrency, "give a whole number from 1 to 10000")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "concurrency" or (field.name == "poll" and value is None):
                continue
            good = isinstance(value, (int, float)) and not isinstance(value, bool)
            least = 0.0 if field.name in ("stop_deadline", "margin") else 0.01
            if not good or not least <= value <= 86_400:
                raise BadArgument(field.name, value, f"give seconds from {least} to 86400")
        if self.lease + 1e-9 < 3 * self.beat + self.margin:  # 3 * 0.2 + 0.1 is a little over 0.7
            raise ConfigError(
                f"lease ({self.lease} s) must be at least three beats and the margin "
                f"({3 * self.beat + self.margin} s): one late renewal must lose nothing"
            )

    @classmethod
    def of(cls, choices: Mapping[str, Any]) -> Self:
        """Settings from keyword arguments.

        Raises:
            BadArgument: there is none of that name.

        """
        names = [field.name for field in fields(cls)]
        for name, value in choices.items():
            if name not in names:
                raise BadArgument(name, value, f"{meant(name, names)}there are {', '.join(names)}")
        return cls(**choices)

    @property
    def period(self) -> float:
        """Seconds between two full reads of each kind: interval, or poll where that was chosen."""
        return self.interval if self.poll is None else self.poll


def default_name() -> str:
    """What a runner is called that was given no name: host and process."""
    return f"{socket.gethostname()}-{os.getpid()}"[-_NAME:]
