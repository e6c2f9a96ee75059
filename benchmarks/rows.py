"""What a benchmark says: a ratio with its spread, and how it compares with the recorded one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

LESS, MORE = "less is better", "more is better"
TOLERANCE = 1.25
FIELDS = ("name", "ratio", "low", "high", "unit", "server", "caveat")


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

    def worse_than(self, recorded: Row) -> str | None:
        """Why it is a regression: a quarter worse than the worst round that was recorded; None if it is none."""
        limit = recorded.high * TOLERANCE if LESS in self.unit else recorded.low / TOLERANCE
        worse = self.ratio > limit if LESS in self.unit else self.ratio < limit
        judged = LESS in self.unit or MORE in self.unit
        if not judged or not worse:
            return None
        return (
            f"{self.name}: {self.ratio:.2f} {self.unit}; recorded {recorded.ratio:.2f} "
            f"({recorded.low:.2f} to {recorded.high:.2f}), so {limit:.2f} is the limit"
        )


def latencies(
    name: str, theirs: Sequence[Sequence[float]], mine: Sequence[Sequence[float]], unit: str, caveat: str
) -> list[Row]:
    """``name_p50`` and ``name_p99`` of rounds of latencies in seconds."""
    rows = []
    for end, share in (("p50", 0.5), ("p99", 0.99)):
        pairs = [percentile(m, share) / percentile(t, share) for m, t in zip(mine, theirs, strict=True)]
        ms = percentile([percentile(m, share) for m in mine], 0.5) * 1000
        rows.append(Row.of(f"{name}_{end}", pairs, f"{unit}, {LESS}", f"ours {ms:.2f} ms{caveat}"))
    return rows


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which this share of them lies (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]
