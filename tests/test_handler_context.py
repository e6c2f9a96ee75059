"""The context variables that a handler sees: those of whoever started the runner, and its own."""

from __future__ import annotations

from contextvars import ContextVar

import pytest
from pymongo import AsyncMongoClient, MongoClient, monitoring

from tests.documents import plain

NOTE: ContextVar[str] = ContextVar("note", default="")


class Limits(monitoring.CommandListener):
    """The time limit of each command that a handler sends; None where it has none."""

    def __init__(self):
        self.told = []

    def started(self, event):
        if event.command_name == "find":
            self.told.append(event.command.get("maxTimeMS"))

    def succeeded(self, event): ...
    def failed(self, event): ...


@pytest.mark.parametrize("ahead", [False, True], ids=["in a free slot", "after another"])
@pytest.mark.parametrize("sort", ["async", "thread"])
async def test_a_handlers_own_commands_have_no_deadline_of_the_runners(sort, ahead, uri, queue, raw, seen):
    """Guard: the handler's context is not the claim loop's. A handler of over ten seconds could ask nothing else."""
    limits = Limits()

    async def work(job):
        async with AsyncMongoClient(uri, event_listeners=[limits]) as client:
            await client.other.things.find_one({"_id": 1})

    def work_in_thread(job):
        with MongoClient(uri, event_listeners=[limits]) as client:
            client.other.things.find_one({"_id": 1})

    queue.handler("mail")(work if sort == "async" else work_in_thread)
    raw.insert_many([plain(kind="mail", retries=5) for _ in range(4 if ahead else 1)])
    async with queue.running("w", concurrency=1):
        done = await seen.wait("try", count=4 if ahead else 1)
    assert {one["outcome"] for one in done} == {"success"}
    assert limits.told == [None] * len(done)


async def test_what_a_handler_sets_is_not_seen_by_the_next_and_what_the_program_set_is_by_all(
    queue, raw, seen
):
    """Guard: each has its own copy of the context in which the runner was started."""
    noted = []

    @queue.handler("mail")
    async def mail(job):
        noted.append(NOTE.get())
        NOTE.set(f"by {job.id}")

    NOTE.set("by the program")
    raw.insert_many([plain(kind="mail", retries=5) for _ in range(30)])
    async with queue.running("w", concurrency=2):
        await seen.wait("try", count=30)
    assert noted == ["by the program"] * 30
