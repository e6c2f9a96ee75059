"""Producers, which put until each job is acknowledged, and an operator, who cancels and retries."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from contextlib import suppress
from typing import Any

from pymongo.errors import PyMongoError

from streamjobs import Job, JobState
from streamjobs.clock import boot
from tests.fleet import Scene

#: By kind: how often of a hundred, and the options of its put.
KINDS: dict[str, tuple[int, dict[str, Any]]] = {
    "once": (25, {"retries": 0}),
    "many": (25, {"retries": 20}),
    "flaky": (10, {"retries": 20, "retry_interval": 0.05}),
    "failing": (5, {"retries": 3, "retry_interval": 0.2}),
    "snoozing": (6, {"retries": 20}),
    "cancelling": (5, {"retries": 20}),
    "thread": (8, {"retries": 20}),
    "looking": (8, {"retries": 20}),
    "blocking": (3, {"retries": 20}),
    "stubborn": (5, {"retries": 20}),
}
_LONG = 0.1  # of the jobs take up to four seconds, so that they meet a fault
_MANY = 0.1  # of the calls put several
_DELAYED = 0.2  # of the jobs are due later
_MOST = 60  # jobs that have not ended, beyond which producers wait: a slow server shall not drown
_COUNT = 2.0  # seconds between two counts of them


class Load:
    """Puts so many jobs a second by a seed, until it is cancelled or told to end."""

    def __init__(self, scene: Scene, seed: int, rate: float, producers: int = 3) -> None:
        self._scene = scene
        self._seed = seed
        self._rate = rate / producers
        self._producers = producers
        self._delayed: deque[Job] = deque(maxlen=50)
        self._room = asyncio.Event()
        self._room.set()
        self.ended = asyncio.Event()

    async def run(self) -> None:
        """All of them; returns when each job that was begun is acknowledged."""
        async with asyncio.TaskGroup() as tasks:
            for number in range(self._producers):
                tasks.create_task(self._produce(random.Random(f"{self._seed} producer {number}")))
            tasks.create_task(self._operate(random.Random(f"{self._seed} operator")))
            tasks.create_task(self._count())

    async def _count(self) -> None:
        """Look how many jobs are left, kind by kind, since a server may count by scanning."""
        jobs, left = self._scene.jobs, 0
        while not self.ended.is_set():
            with suppress(PyMongoError):
                todo = [{"kind": kind, "status": status} for kind in KINDS for status in (1, 2, 3)]
                left = sum([await jobs.count_documents(one, limit=_MOST + 1) for one in todo])
            if left > _MOST:
                self._room.clear()
            else:
                self._room.set()
            await asyncio.sleep(_COUNT)
        self._room.set()

    async def _pause(self, dice: random.Random, rate: float) -> None:
        try:
            async with asyncio.timeout(dice.expovariate(rate)):
                await self.ended.wait()
        except TimeoutError:
            pass

    async def _produce(self, dice: random.Random) -> None:
        while not self.ended.is_set():
            count = dice.randint(2, 8) if dice.random() < _MANY else 1
            jobs = [self._draft(dice) for _ in range(count)]
            await self._scene.put_until_acknowledged(jobs)
            await self._pause(dice, self._rate / count)
            await self._room.wait()

    def _draft(self, dice: random.Random) -> Job:
        kind = dice.choices(list(KINDS), [often for often, _ in KINDS.values()])[0]
        upto = 4.0 if dice.random() < _LONG else 0.6
        options = dict(KINDS[kind][1])
        if dice.random() < _DELAYED:
            options["delay"] = dice.uniform(0.2, 5.0)
        job = self._scene.draft(kind, {"upto": upto}, **options)
        if options.get("delay", 0.0) > 2.5:
            self._delayed.append(job)
        return job

    async def _operate(self, dice: random.Random) -> None:
        """Cancel what is not due yet, retry what has failed for good."""
        queue, done = self._scene.queue, set[Any]()
        while not self.ended.is_set():
            await self._pause(dice, 1.0)
            if self._delayed and dice.random() < 0.5:
                job = self._delayed.popleft()
                await self._asked("cancel", job.id, queue.cancel(job.id, "chaos"))
                continue
            try:
                failed = await queue.list(kind="failing", status="failed", limit=10)
            except PyMongoError:
                continue
            todo = [job for job in failed if job.id not in done]
            if todo:
                done.add(todo[0].id)
                await self._asked("retry", todo[0].id, queue.retry(todo[0].id))

    async def _asked(self, what: str, id_: Any, call: Any) -> None:
        since = boot()
        try:
            await call
        except JobState as error:
            # too late, it runs or has ended; or done by a call that got no answer and was repeated
            if "it is cancelled" in str(error):
                self._scene.log.note("unsure", job=id_)
        except Exception:
            self._scene.log.note("unsure", job=id_)
        else:
            self._scene.log.note(what, job=id_, since=since)
