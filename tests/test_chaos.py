"""Chaos: its schedule, its command, a minute of it on a server of its own, and a moment on the one that is there."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from tests import promises
from tests.chaos import __main__ as command
from tests.chaos.run import SETTINGS, Result, chaos
from tests.chaos.schedule import ALL, ANYWHERE, RUNNER, _group, schedule
from tests.history import Run
from tests.sight import Breach

ROOT = Path(__file__).parent.parent
RUNNERS = ["r0", "r1", "r2", "r3"]
MINUTE, SEED = 60, 20


def plan(seed, seconds=1800, sorts=ALL):
    return schedule(seed, seconds, RUNNERS, sorts, SETTINGS["lease"])


def test_the_seed_alone_decides_the_schedule():
    assert plan(7) == plan(7)
    assert plan(7) != plan(8)


@pytest.mark.parametrize("seed", range(5))
def test_each_sort_comes_and_each_victim_has_one_fault_at_a_time(seed):
    faults = plan(seed)
    assert {one.sort for one in faults} == set(ALL)
    assert [one.at for one in faults] == sorted(one.at for one in faults)
    over: dict[str, float] = defaultdict(float)
    for one in faults:
        group = one.on if one.sort in RUNNER else _group(one.sort)
        assert over[group] <= one.at
        over[group] = one.at + one.lasts


def test_freezes_are_shorter_and_longer_than_the_lease():
    for one in plan(3):
        if one.sort == "freeze-short":
            assert one.lasts < SETTINGS["lease"]
        if one.sort == "freeze-long":
            assert one.lasts > SETTINGS["lease"]


def test_a_server_that_is_not_ours_is_left_alone():
    assert {one.sort for one in plan(3, sorts=ANYWHERE)} == set(ANYWHERE)


def test_a_minute_of_it_has_most_sorts_of_faults():
    assert len({one.sort for one in plan(SEED, MINUTE)}) >= len(ALL) * 2 // 3


def test_a_breach_is_exit_code_1_and_the_line_is_the_last(monkeypatch, capsys):
    verdict = promises.Verdict([Breach(1, "two holders", None, "both")], Counter({"frozen": 2}))
    result = Result(7, 60, "rust", Run([]), verdict, Counter({"kill": 3, "hole": 1}), 2.0)

    async def run(*_args, **_named):
        return result

    monkeypatch.setattr(command, "chaos", run)
    monkeypatch.setattr(sys, "argv", ["chaos", "--seed", "7"])
    assert command.main() == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "chaos: seed 7"
    assert "BREACH of promise 1, two holders" in lines[1]
    assert lines[-1] == (
        "chaos: seed 7, 60 s on rust, drained in 2 s: 0 jobs, 0 claims, 4 faults (hole 1, kill 3), counted apart: "
        "frozen 2, 1 breaches"
    )


@pytest.mark.timeout(120)
async def test_a_few_seconds_on_a_server_that_is_there(uri):
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.chaos", "--seconds", "8", "--seed", "5", "--uri", uri, "--rate", "4", "--runners", "2",
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    out, _ = await process.communicate()
    lines = out.decode().splitlines()
    assert process.returncode == 0, out.decode()
    assert re.fullmatch(
        r"chaos: seed 5, 8 s on a given server, .* \d+ jobs, .* faults \(.+\), .* 0 breaches", lines[-1]
    )


@pytest.mark.timeout(300)
async def test_a_minute_of_chaos_breaks_no_promise(tmp_path, driver_litter):
    result = await chaos(MINUTE, SEED, folder=tmp_path)
    assert not result.verdict.breaches, promises.report(result.run, result.verdict) + result.line
    assert result.faults.total() >= 10
