"""What every benchmark is given: a server, fresh collections, how much to do, and whom to tell."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from pymongo import AsyncMongoClient

from benchmarks.rows import Row

Run = Callable[["Bench"], Awaitable[list[Row]]]


@dataclass
class Bench:
    """One run of benchmarks.

    Attributes:
        uri: the server.
        short: whether this is the form for CI: fewer rounds, smaller counts.
        seconds: how long an idle runner is watched.
        waiting: how many jobs wait in the large collection.
        finished: how many have ended in another.
        due: how many are due at once in a third.
        step: called after each part of a round, with what comes next.

    """

    uri: str
    short: bool = False
    seconds: float = 30.0
    waiting: int = 100_000
    finished: int = 100_000
    due: int = 20_000
    step: Callable[[str], None] = lambda _what: None
    databases: list[str] = field(default_factory=list)

    @property
    def rounds(self) -> int:
        """How many rounds; a row is the median of them."""
        return 3 if self.short else 5

    def of(self, full: int, short: int) -> int:
        """A count."""
        return short if self.short else full

    def fresh(self) -> str:
        """A collection that is not there yet; dropped after the benchmark."""
        self.databases.append(f"bench_{secrets.token_hex(4)}")
        return f"{self.databases[-1]}.jobs"

    def raw(self, namespace: str) -> tuple[AsyncMongoClient[Any], Any]:
        """A client as its own code would have it, and the collection."""
        database, _, name = namespace.partition(".")
        client: AsyncMongoClient[Any] = AsyncMongoClient(self.uri, tz_aware=True, w="majority")
        return client, client[database][name]
