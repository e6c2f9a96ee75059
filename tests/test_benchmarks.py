"""The benchmarks' own arithmetic, and that each raw loop does the work that it is compared for."""

import json
import subprocess
import sys

import pytest

from benchmarks import __main__ as command
from benchmarks import backlog, chart, drain, herd, idle, raw
from benchmarks.bench import Bench
from benchmarks.rows import LESS, MORE, Row, percentile


def row(ratio, low, high, unit=f"times raw, {LESS}", name="a"):
    return Row(name, ratio, low, high, unit, "caveat", "server")


def test_a_row_is_the_median_with_its_spread():
    assert Row.of("a", [3.0, 1.0, 2.0, 9.0, 2.5], "u", "c") == Row("a", 2.5, 1.0, 9.0, "u", "c")
    assert [percentile(range(1, 101), share) for share in (0.5, 0.99, 1.0, 0.0)] == [50, 99, 100, 1]


@pytest.mark.parametrize(
    ("ratio", "unit", "worse"),
    [
        (1.25, LESS, False), (1.5, LESS, False), (1.51, LESS, True), (0.1, LESS, False),
        (0.65, MORE, False), (0.63, MORE, True), (5.0, MORE, False), (99.0, "MB an hour", False),
    ],
)  # fmt: skip
def test_worse_is_a_quarter_beyond_the_worst_recorded_round(ratio, unit, worse):
    why = row(ratio, 0, 9, unit).worse_than(row(1.0, 0.8, 1.2, unit))
    assert (why is not None) == worse
    if worse:
        assert "recorded 1.00 (0.80 to 1.20)" in why


def test_what_is_recorded_is_judged_by_server_and_kept_beside_others(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "RECORDED", tmp_path / "recorded.json")
    command.record([row(1.0, 0.9, 1.1), row(2.0, 1.9, 2.1, name="b")], "rust")
    command.record([row(5.0, 4.9, 5.1)], "python")
    command.record([row(3.0, 2.9, 3.1, name="b")], "rust")
    told = json.loads((tmp_path / "recorded.json").read_text())
    assert [(one["name"], one["ratio"]) for one in told["rust"]] == [("a", 1.0), ("b", 3.0)]
    assert set(told["rust"][0]) == {"name", "ratio", "low", "high", "unit", "server", "caveat"}
    assert command.judge([row(1.3, 1, 2)], "rust") == 0
    assert command.judge([row(1.4, 1, 2)], "rust") == 1
    assert "worse: a: 1.40" in capsys.readouterr().err
    assert command.judge([row(1.4, 1, 2)], "python") == 0
    assert command.judge([row(1.4, 1, 2)], "mongod") == 0
    assert "not recorded for mongod: a" in capsys.readouterr().err


def test_every_short_benchmark_has_a_recorded_ratio():
    told = json.loads(command.RECORDED.read_text("utf-8"))
    assert set(command.SHORT_SLOW) <= set(command.SHORT) <= set(command.NAMES)
    for sort, short in (("rust", command.SHORT), ("python", command.SHORT_SLOW)):
        names = {one["name"] for one in told[sort]}
        for name in short:
            assert any(one.startswith(name) for one in names), (sort, name)


def test_the_chart_draws_only_ratios(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    rows = [
        row(1.5, 1, 2),
        row(0.5, 0.4, 0.6, f"times other, {MORE}"),
        row(0.0, 0.0, 0.02, name="nothing"),
        row(44.0, 1, 99, "MB an hour", name="memory"),
    ]
    for suffix in chart.FORMATS:
        path = tmp_path / f"chart{suffix}"
        chart.draw(rows, path, "title")
        assert path.stat().st_size > 1000
    text = (tmp_path / "chart.svg").read_text()
    assert "times other" in text
    assert "memory" not in text
    chart.draw(rows, tmp_path / "again.svg", "title")
    assert (tmp_path / "again.svg").read_text() == text
    chart.draw([], tmp_path / "empty.svg", "title")


def test_the_slope_of_memory():
    assert idle.slope([[0, 5], [10, 7], [20, 9]]) == pytest.approx(0.2)


def test_wrong_words_are_refused():
    for words, told in (
        (["nothing"], "no benchmark nothing"), (["--chart", "x.txt"], ".svg"), (["--record"], "--short"),
    ):  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks", *words], capture_output=True, text=True, check=False
        )
        assert done.returncode == 2
        assert told in done.stderr


@pytest.fixture
def bench(uri, client):
    return Bench(uri, short=True)


async def test_the_raw_loops_do_what_a_runner_does(bench, client, monkeypatch):
    monkeypatch.setattr(raw, "PAGE", 30)
    monkeypatch.setattr(raw, "BATCH", 20)
    for loop in (drain.raw_single, drain.raw_batches):
        assert await loop(bench, 100) > 0
    for namespace in bench.databases:
        found = await client[namespace].jobs.find({"kind": "bench"}).to_list()
        assert len(found) == 100
        for one in found:
            assert one["status"] == 4
            assert "token" not in one
            assert [entry["runner"] for entry in one["tries"]] == ["raw"]
        await client.drop_database(namespace)


async def test_a_benchmark_from_end_to_end(bench, client, monkeypatch):
    monkeypatch.setattr(Bench, "of", lambda self, full, short: 20)
    told = []
    bench.step = told.append
    for name in ("put", "put_many", "drain_single"):
        rows = await command.NAMES[name](bench)
        assert [one.name for one in rows] == ([name, f"{name}_events"] if name != "drain_single" else [name])
        for one in rows:
            assert 0 < one.low <= one.ratio <= one.high
    assert "put 3" in told
    for database in bench.databases:
        await client.drop_database(database)


async def test_raw_loops_that_share_the_ids_run_each_job_once(bench, client):
    jobs = [raw.document() for _ in range(20)]
    async with herd.fleet(bench, 6, 2, theirs=True) as fleet:
        await fleet.jobs.insert_many(jobs)
        told = [await fleet.next("job") for _ in jobs]
        await fleet.quiet()
        written = [
            len(one["tries"]) async for one in fleet.jobs.find({"_id": {"$in": [job["_id"] for job in jobs]}})
        ]
    assert written == [1] * len(jobs)
    ran = {line["job"]: line["runner"] for line in told}
    for job in jobs:
        number = ran[str(job["_id"])]
        assert job["_id"].binary[-1] in range(number * 256 // 6, (number + 1) * 256 // 6)
    for database in bench.databases:
        await client.drop_database(database)


async def test_a_backlog_is_measured_among_jobs_that_stay_as_they_are(bench, client, monkeypatch):
    monkeypatch.setattr(Bench, "rounds", 1)
    monkeypatch.setattr(backlog, "FEW", 5)
    monkeypatch.setattr(backlog, "THOUSAND", 10)
    for state in (backlog.WAITING, backlog.FINISHED):
        rows = await backlog.few_due(bench, "a", 30, state)
        assert [one.name for one in rows] == ["a_first", "a_job", "a_memory"]
        assert all(one.low > 0 for one in rows)
    left = []
    for database in bench.databases:
        left += [one["status"] async for one in client[database].jobs.find({"kind": "bench"})]
        await client.drop_database(database)
    assert sorted(left) == [1] * 40 + [4] * 40
