"""What a bad handler, error, listener or job may do to the others: nothing."""

from __future__ import annotations

import logging
import subprocess
import sys
from datetime import timedelta

import pytest
import structlog

from streamjobs import Queue, subscribe

KILLER = """
import asyncio, os, sys
from streamjobs import Queue
jobs = Queue(sys.argv[1], sys.argv[2])

@jobs.handler("killer", retries=3)
async def killer(job):
    os._exit(9)

@jobs.handler("mail")
async def mail(job): ...

asyncio.run(jobs.run("w", concurrency=1, interval=0.5, lease=1.6, beat=0.4, margin=0.3))
"""


def test_a_job_that_kills_its_process_uses_up_its_attempts_spaced_and_ends_failed(uri, namespace, raw):
    """Three processes die with it, the fourth finds it failed and does what is left."""
    queue = Queue(uri, namespace)
    queue.sync.create_indexes()
    job = queue.sync.put("killer", retries=3)
    for _ in range(3):
        with subprocess.Popen([sys.executable, "-c", KILLER, uri, namespace]) as process:
            assert process.wait(60) == 9
    beside = [queue.sync.put("mail") for _ in range(3)]
    with subprocess.Popen(
        [sys.executable, "-c", KILLER, uri, namespace], stderr=subprocess.PIPE, text=True
    ) as last:
        with raw.watch(max_await_time_ms=500) as stream:
            for _ in range(240):
                if raw.find_one({"_id": job.id})["status"] == 5:
                    break
                stream.try_next()
        last.terminate()
        assert last.wait(60) == 0
    after = queue.sync.get(job.id)
    assert (after.state, [one.outcome for one in after.history]) == ("failed", ["lost"] * 3)
    assert after.history[2].claimed - after.history[1].when >= timedelta(seconds=1)
    assert [queue.sync.get(one.id).state for one in beside] == ["success"] * 3
    queue.sync.close()


class NoTextError(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")


class NumberTextError(Exception):
    def __str__(self) -> str:
        return 5  # type: ignore[return-value]  # noqa: PLE0307 - what is tried


class LeavingTextError(Exception):
    def __str__(self) -> str:
        raise SystemExit(3)


class OwnBase(BaseException): ...


def deep(n: int = 0) -> int:
    return deep(n + 1) + 1


def raising(error):
    def fail():
        raise error

    return fail


ERRORS = {
    "its text raises": raising(NoTextError()),
    "its text is a number": raising(NumberTextError()),
    "its text leaves": raising(LeavingTextError()),
    "a base exception": raising(OwnBase("own")),
    "exit": raising(SystemExit(1)),
    "interrupt": raising(KeyboardInterrupt()),
    "generator exit": raising(GeneratorExit()),
    "recursion": deep,
    "memory": raising(MemoryError()),
    "20 MB": raising(ValueError("x" * 20_000_000)),
    "20 MB of lines": raising(ValueError("x\n" * 10_000_000)),
    "surrogates": raising(ValueError("\ud800" * 9_000)),
    "broken unicode": raising(ValueError(b"\xff\xfe".decode("utf-8", "surrogateescape"))),
    "NUL": raising(ValueError("\0" * 9_000)),
    "a group": raising(ExceptionGroup("g", [ValueError("a"), NoTextError()])),
    "a long name": raising(type("x" * 100_000, (Exception,), {})("y")),
    "an argument without repr": raising(KeyError(NoTextError())),
}


@pytest.mark.parametrize("sync", [True, False], ids=["sync", "async"])
async def test_whatever_a_handler_raises_is_a_failed_try_cut_and_stored(sync, queue, raw, seen):
    if sync:

        def mail(name: str):
            ERRORS[name]()
    else:

        async def mail(name: str):
            ERRORS[name]()

    queue.handler("mail")(mail)
    queue.handler("good")(lambda job: None)
    async with queue.running("w", concurrency=4):
        bad = {name: await queue.put("mail", {"name": name}) for name in ERRORS}
        good = await queue.put_many([queue.job("good") for _ in range(5)])
        for name, job in bad.items():
            if name != "generator exit" or sync:
                await seen.wait("try", job=job.id, outcome="failure", status="failed")
        for job in good:
            await seen.wait("try", job=job.id, outcome="success")
    for name, job in bad.items():
        after = await queue.get(job.id)
        assert after.state == "failed", name
        (entry,) = after.history
        assert 0 < len(entry.err) <= 4_000, name
        assert len(entry.trace or "") <= 4_000, name
    assert not seen.of("runner.failed")


def bad_listener(error):
    def listen(*_):
        raise error

    return listen


@pytest.mark.parametrize("error", [RuntimeError("no"), SystemExit(1), NoTextError(), LeavingTextError()])
async def test_a_listener_that_raises_anything_harms_no_job_and_no_beat(error, queue, raw, seen, caplog):
    queue.handler("mail", retries=2)(lambda job: 1 / 0 if job.number == 1 else None)
    with subscribe(bad_listener(error)):
        async with queue.running("w", beat=0.05, lease=5):
            job = await queue.put("mail")
            await seen.wait("try", job=job.id, outcome="success")
    assert not seen.of("runner.failed")
    assert not seen.of("lease.lost")


class Broken:
    """A structlog wrapper that can't be made."""

    def __init__(self, *_):
        raise RuntimeError("broken")


def explode(*_):
    raise RuntimeError("broken")


@pytest.mark.parametrize(
    "settings",
    [
        {"processors": [explode]},
        {"wrapper_class": Broken},
        {"logger_factory": explode},
        {"context_class": explode},
    ],
    ids=lambda one: next(iter(one)),
)
async def test_a_structlog_configuration_that_raises_harms_no_job(settings, queue, raw, seen, caplog):
    structlog.configure(**settings)
    try:
        queue.handler("mail", retries=2)(lambda job: 1 / 0 if job.number == 1 else None)
        async with queue.running("w"):
            job = await queue.put("mail")
            await seen.wait("try", job=job.id, outcome="success")
    finally:
        structlog.reset_defaults()
    assert not seen.of("runner.failed")
    assert any(
        "could not be logged" in one.getMessage() for one in caplog.records if one.levelno == logging.WARNING
    )
