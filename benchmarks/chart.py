"""The rows as a chart: a bar from the line, where the raw driver is, to each ratio, and its spread."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from benchmarks.rows import LESS, MORE, Row

FORMATS = (".svg", ".png", ".pdf")
LEAST = 0.01  # what is less, or rounds to nothing, has no place on a logarithmic axis
OTHERS = "another system beside ours"
COLOURS = {LESS: "#4c72b0", MORE: "#55a868", OTHERS: "#999999"}


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
        better = next((one for one in (LESS, MORE) if one in row.unit), OTHERS)
        spread = [[max(0.0, row.ratio - max(row.low, LEAST))], [max(0.0, row.high - row.ratio)]]
        axes.barh(
            place, row.ratio - 1, left=1, xerr=spread, ecolor="#444444", capsize=3,
            color=COLOURS[better], label=better,
        )  # fmt: skip
        axes.annotate(f" {row.ratio:.2f}", (max(row.high, row.ratio), place), va="center", fontsize=9)
    names = [f"{row.name}\n{row.unit.removesuffix(f', {LESS}').removesuffix(f', {MORE}')}" for row in shown]
    axes.set_yticks(range(len(shown)), names, fontsize=7)
    axes.margins(y=0.01)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xscale("log")  # half and twice are equally far from the line
    axes.set_xlim(
        0.8 * min([1.0, *(max(row.low, LEAST) for row in shown)]),
        2.5 * max([1.0, *(row.high for row in shown)]),
    )
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.set_xlabel(
        f"ratio; the line is what it is compared with\n{rows[0].server if rows else ''}", fontsize=8
    )
    axes.set_title(title)
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axes.legend(unique.values(), unique.keys(), fontsize=8, loc="lower right")
    metadata = {"Date": None} if path.suffix == ".svg" else None
    figure.savefig(path, metadata=metadata)
