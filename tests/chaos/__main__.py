"""``python -m tests.chaos --seconds N --seed S [--uri URI]``: exit code 1 at a breach."""

from __future__ import annotations

import argparse
import asyncio
import secrets
import sys
from pathlib import Path

from tests import promises
from tests.chaos.run import chaos
from tests.mutations import MUTATIONS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument(
        "--seed", type=int, default=secrets.randbits(31), help="of faults and puts; by default random"
    )
    parser.add_argument("--uri", help="a server that is not ours: only faults that need no control of it")
    parser.add_argument("--runners", type=int, default=4, help="runner processes")
    parser.add_argument("--rate", type=float, help="jobs a second; by default 8, on the Python server 4")
    parser.add_argument("--live", type=float, help="seconds that a due job may wait; by default 1.5, there 3")
    parser.add_argument("--folder", type=Path, help="keep the history and the server's data here")
    parser.add_argument(
        "--mutation", choices=MUTATIONS, help="switch a guard of the runners off, to see it missed"
    )
    given = parser.parse_args()
    print(f"chaos: seed {given.seed}", flush=True)
    if given.folder is not None:
        given.folder.mkdir(parents=True, exist_ok=True)
    result = asyncio.run(
        chaos(
            given.seconds, given.seed, uri=given.uri, runners=given.runners, rate=given.rate, folder=given.folder,
            live=given.live, mutation=given.mutation,
        )
    )  # fmt: skip
    if result.verdict.breaches:
        print(promises.report(result.run, result.verdict))
    print(result.line)
    return 1 if result.verdict.breaches else 0


if __name__ == "__main__":
    sys.exit(main())
