"""Run benchmarks: ``python -m benchmarks [pickup] [drain] [herd] [killed] [--json FILE] [--uri URI]``.

Without a URI a server is started as for the tests (``STREAMJOBS_SERVER=rust|python|mongod`` chooses one).
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pymongo import MongoClient
from rich.console import Console
from rich.table import Table

from benchmarks import drain, herd, pickup
from streamjobs.embedded import temporary

NAMES = {"pickup": pickup.run, "drain": drain.run, "herd": herd.run, "killed": herd.killed}


@contextmanager
def server(uri: str | None) -> Iterator[tuple[str, str]]:
    """A URI and what answers there."""
    if uri:
        yield uri, "given"
    else:
        with temporary() as one:
            yield one.uri, one.program.sort


async def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; all by default")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument(
        "--uri", default=os.environ.get("STREAMJOBS_URI"), help="a server; one is started by default"
    )
    options = parser.parse_args()
    unknown = set(options.names) - set(NAMES)
    if unknown:
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    rows = []
    databases: list[str] = []

    def fresh() -> str:
        databases.append(f"bench_{secrets.token_hex(4)}")
        return f"{databases[-1]}.jobs"

    with server(options.uri) as (uri, sort), MongoClient(uri) as client:
        label = f"{sort} {client.server_info().get('version')}"
        for name in options.names or NAMES:
            rows += [dataclasses.replace(row, server=label) for row in await NAMES[name](uri, fresh)]
            for database in databases:
                client.drop_database(database)
            databases.clear()
    table = Table("name", "ratio", "low", "high", "unit", "server", "caveat")
    for row in rows:
        table.add_row(
            row.name,
            f"{row.ratio:.2f}",
            f"{row.low:.2f}",
            f"{row.high:.2f}",
            row.unit,
            row.server,
            row.caveat,
        )
    Console(width=None if os.isatty(1) else 160).print(table)
    if options.json:
        fields = ("name", "ratio", "low", "high", "unit", "server", "caveat")
        options.json.write_text(
            json.dumps([{key: getattr(row, key) for key in fields} for row in rows], indent=2) + "\n"
        )


if __name__ == "__main__":
    asyncio.run(main())
