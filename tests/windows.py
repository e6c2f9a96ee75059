"""Windows of time as sorted lists of (from, until) that do not touch, in seconds of the boot clock."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable

Window = tuple[float, float]
FOREVER = float("inf")


def merged(windows: Iterable[Window]) -> list[Window]:
    """The union of any windows."""
    out: list[Window] = []
    for since, until in sorted(one for one in windows if one[0] < one[1]):
        if out and since <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], until))
        else:
            out.append((since, until))
    return out


def without(windows: list[Window], holes: list[Window]) -> list[Window]:
    """What is in the windows and in none of the holes; both merged."""
    out: list[Window] = []
    for since, until in windows:
        at = since
        for begin, end in holes[max(0, bisect_right(holes, (since, since)) - 1) :]:
            if begin >= until:
                break
            if end > at:
                if begin > at:
                    out.append((at, begin))
                at = max(at, end)
        if at < until:
            out.append((at, until))
    return out


def longest(windows: list[Window], since: float, until: float) -> float:
    """The longest unbroken part of merged windows between two moments, in seconds."""
    best = 0.0
    for begin, end in windows[max(0, bisect_right(windows, (since, FOREVER)) - 1) :]:
        if begin >= until:
            break
        best = max(best, min(end, until) - max(begin, since))
    return best


def inside(windows: list[Window], moment: float) -> bool:
    """Whether a moment is in one of them."""
    place = bisect_right(windows, (moment, FOREVER)) - 1
    return place >= 0 and windows[place][0] <= moment < windows[place][1]


def touched(windows: list[Window], since: float, until: float) -> bool:
    """Whether any of them has a moment in common with this span."""
    return any(begin <= until and end >= since for begin, end in windows)


def crowded(spans: Iterable[Window], least: int) -> list[Window]:
    """When at least so many of the spans were under way at once."""
    moments = sorted([(since, 1) for since, _ in spans] + [(until, -1) for _, until in spans])
    out: list[Window] = []
    count, began = 0, 0.0
    for at, step in moments:
        count += step
        if step == 1 and count == least:
            began = at
        elif step == -1 and count == least - 1:
            out.append((began, at))
    return merged(out)
