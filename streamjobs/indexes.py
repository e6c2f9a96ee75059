"""The indexes, declared in one place. Made by an explicit step, never by a runner."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Index:
    """An index: its name, keys with directions, what it is for, and options of createIndexes."""

    name: str
    keys: tuple[tuple[str, int], ...]
    serves: str
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])


INDEXES = (
    Index(
        "due",
        (("kind", 1), ("status", 1), ("runat", 1), ("created", 1), ("_id", 1)),
        "finding what is due, listing and counting by kind and status",
    ),
    Index("owner", (("lease.owner", 1),), "taking back what a lost runner held", {"sparse": True}),
    Index("control", (("control", 1),), "the runners' own records", {"sparse": True}),
)


def command(namespace: str) -> str:
    """The command that makes the indexes of ``database.collection``, as a message may show it."""
    return f"streamjobs indexes --create --collection {namespace}"


def missing(existing: Mapping[str, Mapping[str, Any]]) -> list[Index]:
    """The declared indexes that ``index_information()`` does not show, compared by their keys."""
    there = {
        tuple((str(key), int(way)) for key, way in info["key"]) for info in existing.values() if _plain(info)
    }
    return [index for index in INDEXES if index.keys not in there]


def _plain(info: Mapping[str, Any]) -> bool:
    # text and geo indexes have directions that are no numbers
    return all(isinstance(way, (int, float)) for _, way in info["key"])
