"""Claims whose replies tell of trouble."""

from __future__ import annotations

import asyncio

from streamjobs import Queue
from tests.proxy import Answer


async def test_a_claim_that_a_stepdown_keeps_from_a_majority_runs_once_and_its_runner_goes_on(
    proxied, namespace, seen, driver_litter
):
    ran = asyncio.Event()
    async with Queue(proxied.uri, namespace) as queue:
        await queue.create_indexes()

        @queue.handler("mail")
        async def mail(job) -> None:
            ran.set()

        async with queue.running("r1"):
            # what mongod answers to a write that is under way: done, with a writeConcernError and its labels
            told = Answer(91, write_concern=True)
            with proxied.fault(told, commands=("findAndModify",), app="streamjobs/runner", times=1):
                await queue.put("mail")
                await asyncio.wait_for(ran.wait(), 20)
            await seen.wait("try", outcome="success")
        assert len(seen.of("try")) == 1
        assert not seen.of("runner.failed")
