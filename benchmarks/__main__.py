"""Run benchmarks: ``python -m benchmarks [NAME...] [--json FILE] [--chart FILE]``.

Without a URI a server is started as for the tests (``STREAMJOBS_SERVER=rust|python|mongod`` chooses one).
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pymongo
from pymongo import MongoClient
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks import backlog, chart, drain, herd, idle, killed, local, others, pickup, processes, put
from benchmarks.bench import Bench, Run
from benchmarks.rows import FIELDS, Row
from streamjobs import __version__
from streamjobs.embedded import temporary

NAMES: dict[str, Run] = {
    "pickup": pickup.run,
    "local": local.run,
    "drain": drain.run,
    "drain_single": drain.run_single,
    "drain_once": drain.run_once,
    "drain_sync": drain.run_sync,
    "put": put.run,
    "put_many": put.run_many,
    "idle": idle.run,
    "processes": processes.run,
    "herd": herd.run,
    "killed": killed.run,
    "backlog": backlog.run,
    "compare": others.run,
}
#: What CI runs; the others take too long, or too many cores, to be judged there.
SHORT = ("pickup", "local", "drain", "drain_single", "put", "put_many")
#: The same on the Python server, which takes minutes to drain thousands of jobs.
SHORT_SLOW = ("pickup", "local", "put", "put_many")
RECORDED = Path(__file__).with_name("recorded.json")


@contextmanager
def server(uri: str | None) -> Iterator[tuple[str, str]]:
    """A URI and what answers there."""
    if uri:
        yield uri, "given"
    else:
        with temporary() as one:
            yield one.uri, one.program.sort


def options() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; all by default")
    add("--json", type=Path, help="write the rows to this file")
    add("--chart", type=Path, help="draw the ratios into this file (svg, png, pdf); needs the extra 'bench'")
    add("--uri", default=os.environ.get("STREAMJOBS_URI"), help="a server; one is started by default")
    add("--seconds", type=float, default=30.0, help="how long an idle runner is watched (30)")
    add("--waiting", type=int, default=100_000, help="how many jobs wait in the large collection (100000)")
    add("--finished", type=int, default=100_000, help="how many have ended in another (100000)")
    add("--due", type=int, default=20_000, help="how many are due at once in a third (20000)")
    add("--short", action="store_true", help="quicker, and fails if a ratio is worse than the recorded one")
    add("--record", action="store_true", help="with --short: write the ratios down instead")
    told = parser.parse_args()
    unknown = set(told.names) - set(NAMES)
    if unknown:
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    if told.record and not told.short:
        parser.error("--record writes down what --short compares with: give both")
    if told.chart is not None:
        chart.check(parser, told.chart)
    return told


def names(told: argparse.Namespace, sort: str) -> Sequence[str]:
    """What to run on such a server."""
    if told.names or not told.short:
        return told.names or list(NAMES)
    return SHORT_SLOW if sort == "python" else SHORT


async def measure(told: argparse.Namespace) -> tuple[list[Row], str]:
    """Run them; the rows, and the sort of server."""
    columns = (
        TextColumn("{task.fields[name]}"),
        BarColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
    )
    rows: list[Row] = []
    with (
        server(told.uri) as (uri, sort),
        MongoClient(uri) as client,
        Progress(*columns, console=Console(stderr=True), transient=True) as progress,
    ):
        version = client.server_info().get("version")
        label = f"{sort} {version}, pymongo {pymongo.version}, Python {platform.python_version()}, {os.cpu_count()} cores"
        task = progress.add_task("", total=len(names(told, sort)), name="")

        def step(what: str) -> None:
            progress.update(task, description=what)

        bench = Bench(uri, told.short, told.seconds, told.waiting, told.finished, told.due, step)
        for name in names(told, sort):
            progress.update(task, name=name, description="")
            rows += [dataclasses.replace(row, server=label) for row in await NAMES[name](bench)]
            for database in bench.databases:
                client.drop_database(database)
            bench.databases.clear()
            progress.advance(task)
    return rows, sort


def show(rows: Sequence[Row]) -> None:
    """The table."""
    table = Table("name", "ratio", "low", "high", "unit", "caveat", caption=rows[0].server if rows else None)
    for row in rows:
        table.add_row(row.name, f"{row.ratio:.2f}", f"{row.low:.2f}", f"{row.high:.2f}", row.unit, row.caveat)
    Console(width=None if os.isatty(1) else 160).print(table)


def judge(rows: Sequence[Row], sort: str) -> int:
    """Hold rows against the recorded ones of this sort of server; the exit code."""
    recorded = {one["name"]: Row(**one) for one in json.loads(RECORDED.read_text("utf-8")).get(sort, [])}
    # a p99 of sixty samples is the worst of them: chance
    judged = [row for row in rows if not row.name.endswith("_p99")]
    worse = [why for row in judged if row.name in recorded and (why := row.worse_than(recorded[row.name]))]
    for row in rows:
        if row.name not in recorded:
            print(f"not recorded for {sort}: {row.name}", file=sys.stderr)
    for why in worse:
        print(f"worse: {why}", file=sys.stderr)
    return 1 if worse else 0


def record(rows: Sequence[Row], sort: str) -> None:
    """Write rows down for a sort of server, beside what is there of others."""
    there = json.loads(RECORDED.read_text("utf-8")) if RECORDED.exists() else {}
    mine = {one["name"]: one for one in there.get(sort, [])} | {row.name: as_json(row) for row in rows}
    RECORDED.write_text(json.dumps({**there, sort: list(mine.values())}, indent=2) + "\n", "utf-8")


def as_json(row: Row) -> dict[str, object]:
    """A row of the file."""
    return {key: getattr(row, key) for key in FIELDS}


def main() -> int:
    """The command."""
    told = options()
    rows, sort = asyncio.run(measure(told))
    show(rows)
    if told.json:
        told.json.write_text(json.dumps([as_json(row) for row in rows], indent=2) + "\n", "utf-8")
    if told.chart:
        chart.draw(rows, told.chart, f"streamjobs {__version__}")
    if told.record:
        record(rows, sort)
        return 0
    return judge(rows, sort) if told.short else 0


if __name__ == "__main__":
    sys.exit(main())
