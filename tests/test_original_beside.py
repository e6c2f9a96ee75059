"""The original's runners and ours on one collection: each job done, none by two, tries that both can read."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from contextlib import ExitStack
from datetime import datetime
from typing import Any

import pytest
from pymongo import MongoClient

from streamjobs import Job, Queue, Status
from streamjobs.events import subscribe
from tests.documents import plain
from tests.original_loop import NINE, OriginalRunner, new, put
from tests.transition_model import Held

ENDED = ("success", "failed")


class History:
    """What was called, by whom, and what has ended; of both sorts of runners."""

    def __init__(self, count: int) -> None:
        self._lock = threading.Lock()
        self._loop = asyncio.get_running_loop()
        self._count = count
        self._now: set[Any] = set()
        self._ended: set[Any] = set()
        self.calls: Counter[Any] = Counter()
        self.by: Counter[str] = Counter()
        self.breaches: list[str] = []
        self.all_ended = asyncio.Event()
        self.theirs_began = asyncio.Event()

    def begin(self, id_: Any, who: str) -> int:
        """A function is called; the number of the call."""
        with self._lock:
            if id_ in self._now:
                self.breaches.append(f"{id_} was called by {who} while another had it")
            if id_ in self._ended:
                self.breaches.append(f"{id_} was called by {who} after its end")
            self._now.add(id_)
            self.calls[id_] += 1
            self.by[who] += 1
            if who == "theirs":
                self._loop.call_soon_threadsafe(self.theirs_began.set)
            return self.calls[id_]

    def leave(self, id_: Any) -> None:
        """Its function returns."""
        with self._lock:
            self._now.discard(id_)

    def end(self, id_: Any) -> None:
        """Its end is in the collection."""
        with self._lock:
            self._ended.add(id_)
            if len(self._ended) == self._count:
                self._loop.call_soon_threadsafe(self.all_ended.set)

    def listen(self, name: str, _level: str, fields: dict[str, Any]) -> None:
        """Our events."""
        if name == "try" and fields["status"] in ENDED:
            self.end(str(fields["job"]))

    def finished(self, job: dict[str, Any]) -> None:
        """Their rewrites."""
        if job["status"] in (Status.SUCCESS, Status.FAILED):
            self.end(str(job["_id"]))


def error_of(data: dict[str, Any], call: int) -> str | None:
    """How the nth call of a job's function ends."""
    return f"call {call}" if call <= data["fails"] else None


def fails_of(number: int) -> tuple[int, int]:
    """Of a job: how often its function fails, and its retries."""
    if number % 10 == 0:
        return 99, 3
    return (2, 5) if number % 4 == 0 else (0, number % 2)


async def test_two_of_theirs_and_two_of_ours_do_each_job_once(
    queue: Queue, raw: Any, uri: str, namespace: str, python_server: bool
):
    count = 240 if python_server else 2_000
    history = History(count)

    @queue.handler("mail")
    async def mail(job: Job) -> None:
        call = history.begin(str(job.id), "ours")
        await asyncio.sleep(0)  # a turn of the loop, in which another could come
        history.leave(str(job.id))
        if (text := error_of(job.data, call)) is not None:
            raise ValueError(text)

    def theirs(job: dict[str, Any]) -> str | None:
        call = history.begin(str(job["_id"]), "theirs")
        history.leave(str(job["_id"]))
        return error_of(job["data"], call)

    mine = [queue.job("mail", {"n": n, "fails": fails_of(n)[0]}, retries=fails_of(n)[1], retry_interval=0.001)
            for n in range(0, count, 2)]  # fmt: skip
    await queue.put_many(mine)
    await asyncio.to_thread(
        put, raw, [new("mail", {"n": n, "fails": fails_of(n)[0]}, retries=fails_of(n)[1], retryinterval_ms=1)
                   for n in range(1, count, 2)]
    )  # fmt: skip
    originals = [
        OriginalRunner(f"go-{n}", uri, namespace, "mail", theirs, history.finished, 0.05) for n in range(2)
    ]
    with subscribe(history.listen), ExitStack() as stack:
        for one in originals:
            one.start()
            stack.callback(one.stop)
        await history.theirs_began.wait()
        async with queue.running("ours-1", concurrency=4), queue.running("ours-2", concurrency=4):
            async with asyncio.timeout(90):
                await history.all_ended.wait()
            await asyncio.to_thread(stack.close)
    assert history.breaches == []
    assert min(history.by["ours"], history.by["theirs"]) > 0
    held_to_account(list(raw.find({"kind": "mail"})), history, count)


def held_to_account(documents: list[dict[str, Any]], history: History, count: int) -> None:
    """Each job has ended as its function did, with a try for each call, which both can read."""
    assert len(documents) == count
    for document in documents:
        fails, retries = document["data"]["fails"], fails_of(document["data"]["n"])[1]
        good, calls = fails < max(1, retries), min(fails + 1, max(1, retries))
        tries = document["tries"]
        assert history.calls[str(document["_id"])] == len(tries) == calls
        assert document["status"] == (Status.SUCCESS if good else Status.FAILED)
        for number, entry in enumerate(tries, 1):
            assert list(entry)[:2] == ["runner", "when"]
            assert isinstance(entry["when"], datetime)
            assert entry.get("err") == error_of(document["data"], number)
        assert set(document) == set(NINE)
        ours = Job.from_document(document)
        assert [one.err for one in ours.history] == [one.get("err") for one in tries]
        assert ours.retries == retries - sum("err" in one for one in tries)


async def test_a_failed_job_without_retries_goes_round_with_theirs_and_ends_with_ours(
    queue, raw, uri, namespace, seen
):
    """Their defect: 0 becomes -1, which is never 0; ours takes 0 and below for the end."""
    put(raw, [job := new("mail", {})])
    one = OriginalRunner("go", uri, namespace, "mail", lambda job: "no")
    with MongoClient(uri, tz_aware=True) as client:
        database, _, name = namespace.partition(".")
        for count in (1, 2, 3):
            one.poll(client[database][name])
            after = raw.find_one()
            assert (after["status"], after["retries"], len(after["tries"])) == (3, -count, count)

    @queue.handler("mail")
    def mail(job: Job) -> None:
        raise ValueError("nor here")

    async with queue.running("ours"):
        await seen.wait("try", job=job["_id"], status="failed")
    after = raw.find_one()
    assert (after["status"], after["retries"]) == (Status.FAILED, -4)
    assert [entry["err"] for entry in after["tries"]] == ["no", "no", "no", "nor here"]


@pytest.mark.parametrize("outcome", ["failure", "snoozed", "lost", "retried"])
def test_what_ours_put_back_theirs_takes_and_rewrites_to_nine_fields(outcome, raw, uri, namespace):
    if outcome == "retried":
        raw.insert_one(before := plain(kind="mail", status=5, retries=0))
        queue = Queue(uri, namespace)
        queue.sync.retry(before["_id"])
        queue.sync.close()
        tries = 0
    else:
        Held(raw, plain(kind="mail", retries=3)).finish(outcome, delay=0)
        tries = 1
    assert "wake" in raw.find_one()
    one = OriginalRunner("go", uri, namespace, "mail", lambda job: None)
    one.poll(raw)
    after = raw.find_one()
    assert list(after) == list(NINE)
    assert (after["status"], len(after["tries"])) == (Status.SUCCESS, tries + 1)
    assert Job.from_document(after).number == tries + 2
