"""What a benchmark says: a ratio with its spread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Row:
    """One figure: the median ratio of the rounds, the least and the greatest."""

    name: str
    ratio: float
    low: float
    high: float
    unit: str
    caveat: str
    server: str = ""

    @classmethod
    def of(cls, name: str, pairs: Sequence[float], unit: str, caveat: str) -> Row:
        return cls(
            name, round(percentile(pairs, 0.5), 3), round(min(pairs), 3), round(max(pairs), 3), unit, caveat
        )


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which this share of them lies (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, round(share * len(ordered) + 0.5) - 1))]
