"""The rows as a chart: a bar for each ratio, its spread, and a line where the raw driver is."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from benchmarks.rows import LESS, MORE, Row

FORMATS = (".svg", ".png", ".pdf")
COLOURS = {LESS: "#4c72b0", MORE: "#55a868"}


def check(parser: argparse.ArgumentParser, path: Path) -> None:
    """Refuse at once what could not be drawn after minutes of work."""
    if path.suffix not in FORMATS:
        parser.error(f"--chart: give a file that ends in {', '.join(FORMATS)} (got {path})")
    if importlib.util.find_spec("matplotlib") is None:
        parser.error("--chart needs matplotlib: pip install 'streamjobs[bench]'")


def draw(rows: Sequence[Row], path: Path, title: str) -> None:
    """Write the chart; only rows that are ratios to something are in it."""
    import matplotlib as mpl  # noqa: PLC0415 - an extra, and slow to import
    from matplotlib.figure import Figure  # noqa: PLC0415

    mpl.rcParams["svg.hashsalt"] = "streamjobs"  # the same rows give the same file
    shown = [row for row in rows if row.unit.startswith("times")][::-1]
    figure = Figure(figsize=(9, 1.2 + 0.36 * len(shown)), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(shown):
        better = LESS if LESS in row.unit else MORE
        spread = [[max(0.0, row.ratio - row.low)], [max(0.0, row.high - row.ratio)]]
        axes.barh(
            place, row.ratio, color=COLOURS[better], xerr=spread, ecolor="#444444", capsize=3, label=better
        )
        axes.annotate(f" {row.ratio:.2f}", (max(row.high, row.ratio), place), va="center", fontsize=9)
    names = [f"{row.name}\n{row.unit.removesuffix(f', {LESS}').removesuffix(f', {MORE}')}" for row in shown]
    axes.set_yticks(range(len(shown)), names, fontsize=7)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xlim(0, 1.12 * max([1.0, *(row.high for row in shown)]))
    axes.set_xlabel(
        f"ratio; the line is what it is compared with\n{rows[0].server if rows else ''}", fontsize=8
    )
    axes.set_title(title)
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axes.legend(unique.values(), unique.keys(), fontsize=8, loc="lower right")
    metadata = {"Date": None} if path.suffix == ".svg" else None
    figure.savefig(path, metadata=metadata)
