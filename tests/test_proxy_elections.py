"""The proxy of the tests: changes of primary, as the driver sees them."""

from __future__ import annotations

import asyncio

import pytest
from pymongo import MongoClient
from pymongo.errors import (
    AutoReconnect,
    NotPrimaryError,
    OperationFailure,
    ServerSelectionTimeoutError,
    WriteConcernError,
)

from streamjobs.clock import boot
from tests.proxy import Delay
from tests.proxy.driver import insert, streaming, update

NEVER = 600.0
"""Seconds without a primary: until the test elects one, so that a slow machine is not a late test."""


async def test_a_step_down_is_learnt_at_once_and_a_write_is_repeated_on_the_new_primary(proxied, drive, raw):
    driver = drive()
    await driver.do(insert(0))
    for n in range(1, 7):
        before = proxied.primary
        proxied.step_down()
        began = boot()
        await driver.do(insert(n))
        assert boot() - began < 2  # the driver's monitors wait up to 10 s for news
        assert proxied.primary != before
    assert raw.count_documents({}) == 7


async def test_without_a_primary_writes_wait_and_reads_of_secondaries_go_on(proxied, drive, raw):
    driver = drive()
    await driver.do(insert(1))
    proxied.step_down(NEVER)
    assert proxied.primary is None
    writing = asyncio.create_task(driver.do(insert(2)))
    secondary = drive(appname="reads", readPreference="secondaryPreferred")
    assert await secondary.do(lambda jobs: jobs.find_one({"_id": 1}))
    assert not writing.done()
    proxied.step_down()  # which elects one
    await writing
    assert raw.count_documents({}) == 2


async def test_an_unrepeated_write_is_told_that_the_primary_stepped_down(proxied, drive):
    driver = drive(retryWrites=False)
    await driver.do(insert(1))
    proxied.step_down()
    with pytest.raises((NotPrimaryError, OperationFailure)) as caught:
        for n in range(2, 1000):  # until the driver has heard: one that it sends to the old primary
            await driver.do(insert(n))
            proxied.step_down()
    assert caught.value.details["code"] == 10107
    assert caught.value.details["topologyVersion"]["counter"] >= 2
    assert not caught.value.has_error_label("RetryableWriteError")


async def test_a_write_under_way_at_a_step_down_is_done_once(proxied, drive, raw):
    driver, plain = drive(), drive(retryWrites=False, appname="plain")
    raw.insert_one({"_id": 1, "n": 0})
    await plain.do(lambda jobs: jobs.find_one())
    for one, many in ((driver, False), (plain, True)):
        rule = proxied.fault(Delay(1, reply=True), commands=("update",), times=1)
        doing = asyncio.create_task(
            one.do(update if many else lambda jobs: jobs.update_one({"_id": 1}, {"$inc": {"n": 1}}))
        )
        await rule.hit()
        proxied.step_down()
        if many:
            with pytest.raises((WriteConcernError, NotPrimaryError, AutoReconnect)):
                await doing
        else:
            assert (await doing).modified_count == 1
    assert raw.find_one({"_id": 1})["n"] == 2


async def test_a_stream_outlives_a_step_down_with_and_without_its_get_more(proxied, drive, raw):
    driver = drive()
    async with streaming(driver) as stream:
        for n, faults in enumerate([{}, {"streams": True}, {"crash": True, "seconds": 0.3}]):
            seen = proxied.fault(Delay(0), commands=("getMore",))
            waiting = asyncio.create_task(driver.next(stream))
            await seen.hit()
            seen.remove()
            proxied.step_down(**faults)
            raw.insert_one({"_id": n})
            assert (await waiting)["documentKey"] == {"_id": n}


async def test_a_crashed_primary_refuses_connections_until_the_election_is_over(proxied, drive, raw):
    driver = drive()
    await driver.do(insert(1))
    old = proxied.primary
    proxied.step_down(NEVER, crash=True)
    direct = MongoClient(f"mongodb://{old}", directConnection=True, serverSelectionTimeoutMS=100)
    with pytest.raises(ServerSelectionTimeoutError):
        direct.admin.command("ping")
    direct.close()
    proxied.step_down()  # which elects one
    await driver.do(insert(2))
    with MongoClient(f"mongodb://{old}", directConnection=True) as direct:
        assert direct.admin.command("hello")["secondary"]
