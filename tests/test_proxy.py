"""The proxy of the tests: each fault, seen by the driver, asynchronous and synchronous."""

from __future__ import annotations

import asyncio
from unittest.mock import Mock

import pytest
from pymongo import AsyncMongoClient, MongoClient
from pymongo.errors import (
    AutoReconnect,
    NetworkTimeout,
    OperationFailure,
    PyMongoError,
    ServerSelectionTimeoutError,
    WriteConcernError,
)
from pymongo.write_concern import WriteConcern

from streamjobs.clock import boot
from tests.proxy import Answer, Cut, Delay, Drop, Duplicate, Hold, LoseReply, Proxy, wire
from tests.proxy.connection import Connection, StruckError
from tests.proxy.driver import Driver, insert, streaming, update
from tests.proxy.faults import Request, Rule

DURABLE = WriteConcern("majority", j=True)


async def test_clients_see_a_replica_set_of_three_and_everything_passes_through(proxied, drive, raw):
    driver = drive()
    many = [{"_id": n, "text": "x" * 1000} for n in range(5_000)]
    await driver.do(lambda jobs: jobs.insert_many(many))
    assert raw.count_documents({}) == 5_000
    hello = await driver.do(lambda jobs: jobs.database.client.admin.command("hello"))
    assert len(hello["hosts"]) == 3
    assert hello["me"] == hello["primary"] == proxied.primary
    assert (hello["setName"], hello["isWritablePrimary"]) == ("rs0", True)
    description = driver.client.topology_description
    assert description.topology_type_name == "ReplicaSetWithPrimary"
    assert len(description.server_descriptions()) == 3
    assert not proxied.counts


async def test_secondaries_read_and_do_not_write(proxied, drive, raw):
    driver = drive(readPreference="secondary")
    raw.insert_one({"_id": 1})
    assert await driver.do(lambda jobs: jobs.find_one({"_id": 1})) == {"_id": 1}


async def test_a_secondary_refuses_what_only_a_primary_does(proxied):
    for host, port in (address.split(":") for address in proxied.addresses[1:]):
        reader, writer = await asyncio.open_connection(host, int(port))
        for command, code in (
            ({"insert": "two", "documents": [{}]}, 10107),
            ({"find": "two"}, 13435),
            ({"aggregate": "two", "pipeline": [{"$out": "three"}], "cursor": {}}, 10107),
            ({"find": "two", "$readPreference": {"mode": "primaryPreferred"}}, None),
        ):
            writer.write(wire.request({**command, "$db": "one"}).raw)
            answer = (await wire.read(reader)).document
            assert answer.get("code") == code, command
            assert code is None or answer["topologyVersion"]["counter"] == 1
        writer.close()
        await writer.wait_closed()


async def test_a_rule_is_chosen_by_command_application_predicate_and_times(proxied, drive, raw):
    mine, other = drive(retryWrites=False), drive(appname="other", retryWrites=False)
    rule = proxied.fault(
        Drop(), commands=("insert",), app="mine", where=lambda one: one["documents"][0]["_id"] == 2, times=1
    )
    await mine.do(insert(1))  # not this document
    await other.do(insert(2))  # not this application
    raw.delete_one({"_id": 2})
    await mine.do(lambda jobs: jobs.find_one({"_id": 2}))  # not this command
    assert not rule.struck.is_set()
    with pytest.raises(AutoReconnect):
        await mine.do(insert(2))
    await rule.hit()
    rule.wait()
    await mine.do(insert(2))  # not a second time
    assert (rule.count, rule.over, proxied.counts) == (1, True, {"Drop": 1})


async def test_a_removed_rule_strikes_no_more(proxied, drive):
    driver = drive(retryWrites=False)
    with proxied.fault(Drop(), commands=("insert",)), pytest.raises(AutoReconnect):
        await driver.do(insert(1))
    await driver.do(insert(1))


async def test_a_dropped_request_is_not_carried_out_and_a_retry_is(proxied, drive, raw):
    driver, plain = drive(), drive(retryWrites=False)
    proxied.fault(Drop(), commands=("insert",), times=2)
    with pytest.raises(AutoReconnect):
        await plain.do(insert(1))
    assert raw.find_one({"_id": 1}) is None
    await driver.do(insert(1))
    assert proxied.counts["Drop"] == 2
    assert raw.find_one({"_id": 1})


async def test_all_connections_of_an_application_are_dropped_at_once(proxied, drive):
    mine, other = drive(), drive(appname="other")
    await mine.do(insert(1))
    await other.do(insert(2))
    assert proxied.drop("mine") >= 2  # a pooled one, the monitors'
    await other.do(lambda jobs: jobs.find_one({"_id": 2}))
    await mine.do(lambda jobs: jobs.find_one({"_id": 1}))


async def test_a_lost_reply_is_of_a_command_that_was_carried_out(proxied, drive, raw):
    driver = drive()
    raw.insert_one({"_id": 1, "n": 0})
    proxied.fault(LoseReply(), commands=("update",), times=1)
    with pytest.raises(AutoReconnect):
        await driver.do(update)  # the driver never repeats an update_many
    assert raw.find_one({"_id": 1})["n"] == 1
    proxied.fault(LoseReply(), commands=("update",), times=1)
    result = await driver.do(lambda jobs: jobs.update_one({"_id": 1}, {"$inc": {"n": 1}}))
    assert (result.modified_count, raw.find_one({"_id": 1})["n"]) == (1, 2)  # repeated, and done once


async def test_a_reply_may_be_lost_without_a_word(proxied, drive, raw):
    driver = drive(timeoutMS=500)
    raw.insert_one({"_id": 1, "n": 0})
    await driver.do(lambda jobs: jobs.find_one())
    proxied.fault(LoseReply(silent=True), commands=("update",), times=1)
    with pytest.raises(NetworkTimeout):
        await driver.do(update)
    assert raw.find_one({"_id": 1})["n"] == 1


@pytest.mark.parametrize("reply", [False, True], ids=["request", "reply"])
async def test_a_delay(proxied, drive, raw, reply):
    driver = drive()
    await driver.do(lambda jobs: jobs.find_one())
    proxied.fault(Delay(0.4, reply=reply), commands=("insert",), times=1)
    began = boot()
    await driver.do(insert(1))
    assert boot() - began >= 0.4
    assert raw.find_one({"_id": 1})


async def test_a_duplicated_request_is_carried_out_twice_and_answered_once(proxied, drive, raw):
    driver = drive()
    raw.insert_one({"_id": 1, "n": 0})
    proxied.fault(Duplicate(), commands=("update",), times=2)
    assert (await driver.do(update)).modified_count == 1
    assert raw.find_one({"_id": 1})["n"] == 2
    # a retryable write is told apart by its number, so its copy does nothing
    await driver.do(lambda jobs: jobs.update_one({"_id": 1}, {"$inc": {"n": 1}}))
    assert raw.find_one({"_id": 1})["n"] == 3
    await driver.do(lambda jobs: jobs.find_one())  # replies are not mixed up afterwards


async def test_a_held_request_lands_after_its_client_has_given_up(proxied, drive, raw):
    driver = drive(timeoutMS=500)
    raw.insert_one({"_id": 1, "n": 0})
    await driver.do(lambda jobs: jobs.find_one())
    hold = Hold()
    rule = proxied.fault(hold, commands=("update",), times=1)
    with pytest.raises(NetworkTimeout):
        await driver.do(update)
    await driver.close()
    assert (rule.count, raw.find_one({"_id": 1})["n"]) == (1, 0)
    hold.release()
    assert await asyncio.to_thread(hold.delivered.wait, 10)
    assert raw.find_one({"_id": 1})["n"] == 1


async def test_a_held_request_may_drop_its_client_and_be_delivered_after_a_while(proxied, drive, raw):
    driver = drive()
    raw.insert_one({"_id": 1, "n": 0})
    hold = Hold(seconds=0.5, drop=True)
    proxied.fault(hold, commands=("update",), times=1)
    with pytest.raises(AutoReconnect):
        await driver.do(update)
    assert raw.find_one({"_id": 1})["n"] == 0
    assert await asyncio.to_thread(hold.delivered.wait, 10)
    assert raw.find_one({"_id": 1})["n"] == 1


async def test_a_held_request_whose_client_waits_is_answered(proxied, drive, raw):
    driver = drive()
    proxied.fault(Hold(seconds=0.3), commands=("insert",), times=1)
    await driver.do(insert(1))
    assert raw.find_one({"_id": 1})


@pytest.mark.parametrize("app", ["mine", None], ids=["one", "all"])
async def test_a_black_hole_swallows_old_connections_and_new_ones_until_it_ends(proxied, drive, app):
    driver, other = drive(timeoutMS=700), drive(appname="other", timeoutMS=700)
    await driver.do(insert(1))
    await other.do(insert(2))
    with proxied.black_hole(app):
        with pytest.raises(NetworkTimeout):
            await driver.do(insert(3))
        if app is None:
            with pytest.raises(PyMongoError):
                await other.do(insert(5))
        else:
            await other.do(insert(5))
        fresh = drive(timeoutMS=500, serverSelectionTimeoutMS=500)
        with pytest.raises(ServerSelectionTimeoutError):
            await fresh.do(insert(4))
    patient = drive()
    await patient.do(insert(6))
    found = {one["_id"] for one in await patient.do(lambda jobs: list_of(jobs.find()))}
    assert found == ({1, 2, 5, 6} if app else {1, 2, 6})


def list_of(cursor):
    return cursor.to_list()


async def test_what_a_black_hole_swallowed_is_done_when_it_ends_if_its_client_still_waits(
    proxied, drive, raw
):
    driver = drive()
    await driver.do(insert(1))
    hole = proxied.black_hole("mine")
    waiting = asyncio.create_task(driver.do(insert(2)))
    other = drive(appname="other")
    await other.do(insert(3))
    assert raw.find_one({"_id": 2}) is None
    hole.end()
    await waiting
    assert raw.find_one({"_id": 2})


async def test_a_stream_goes_on_after_its_get_more_was_cut(proxied, drive, raw):
    driver = drive()
    async with streaming(driver) as stream:
        rule = proxied.fault(Cut(), commands=("getMore",), times=2)
        waiting = asyncio.create_task(driver.next(stream))
        await rule.hit(2)
        raw.insert_one({"_id": 1})
        assert (await waiting)["documentKey"] == {"_id": 1}


async def test_a_get_more_under_way_is_dropped(proxied, drive, raw):
    driver = drive()
    async with streaming(driver) as stream:
        seen = proxied.fault(Delay(0), commands=("getMore",))
        waiting = asyncio.create_task(driver.next(stream))
        await seen.hit()
        seen.remove()
        await asyncio.to_thread(proxied.fault(Drop(), ("getMore",), times=1, in_flight=True).wait)
        raw.insert_one({"_id": 1})
        assert (await waiting)["documentKey"] == {"_id": 1}


async def test_a_rule_that_strikes_in_the_turn_of_the_reply_is_applied():
    """It has been counted by then, and would be lost."""
    connection = Connection(Mock(), 0, Mock(), Mock())
    reply = asyncio.get_running_loop().create_future()
    waiting = asyncio.create_task(connection.wait(reply))
    await asyncio.sleep(0)
    connection.current = Request(wire.request({"getMore": 1, "$db": "one"}), None)
    reply.set_result(None)
    connection.strike(rule := Rule(Drop(), ("getMore",), times=1))
    with pytest.raises(StruckError) as caught:
        await waiting
    assert (caught.value.rule, rule.count) == (rule, 1)


@pytest.mark.parametrize("code", [286, 280, 10334, 40573, 13])
@pytest.mark.parametrize("in_flight", [False, True], ids=["next", "under-way"])
async def test_a_code_is_answered_to_a_stream(proxied, drive, code, in_flight):
    driver = drive()
    async with streaming(driver) as stream:
        seen = proxied.fault(Delay(0), commands=("getMore",))
        waiting = asyncio.create_task(driver.next(stream))
        await seen.hit()
        rule = proxied.fault(Answer(code), commands=("getMore", "aggregate"), times=1, in_flight=in_flight)
        if not in_flight:
            seen.remove()
            await driver.do(insert(1))  # the getMore under way brings this
            await waiting
            waiting = asyncio.create_task(driver.next(stream))
        with pytest.raises(OperationFailure) as caught:
            await waiting
        seen.remove()
        assert (caught.value.code, rule.count) == (code, 1)
        assert caught.value.has_error_label("NonResumableChangeStreamError") == (code in (286, 280))
        assert not caught.value.has_error_label("ResumableChangeStreamError")
    proxied.fault(Answer(code), commands=("aggregate",), times=1)
    with pytest.raises(OperationFailure) as caught:
        await driver.stream()
    assert caught.value.code == code


async def test_a_resumable_code_is_labelled_and_resumed_from(proxied, drive, raw):
    driver = drive()
    async with streaming(driver) as stream:
        rule = proxied.fault(Answer(11602), commands=("getMore",), times=2)
        waiting = asyncio.create_task(driver.next(stream))
        await rule.hit(2)
        raw.insert_one({"_id": 1})
        assert (await waiting)["documentKey"] == {"_id": 1}


async def test_an_error_may_come_although_the_write_was_done(proxied, drive, raw):
    driver = drive()
    raw.insert_one({"_id": 1, "n": 0})
    proxied.fault(Answer(50, carried_out=True), commands=("update",), times=1)
    with pytest.raises(OperationFailure) as caught:
        await driver.do(update)
    assert (caught.value.code, raw.find_one({"_id": 1})["n"]) == (50, 1)
    proxied.fault(Answer(64, write_concern=True), commands=("update",), times=1)
    with pytest.raises(WriteConcernError):
        await driver.do(lambda jobs: jobs.update_one({"_id": 1}, {"$inc": {"n": 1}}))
    assert raw.find_one({"_id": 1})["n"] == 2


async def test_the_server_may_be_killed_and_started_again(own_server, namespace):
    with Proxy(own_server.uri) as proxy:
        for cls in (AsyncMongoClient, MongoClient):
            driver = Driver(cls, proxy.uri, namespace)
            one = {"name": cls.__name__}
            await driver.do(lambda jobs, one=one: jobs.with_options(write_concern=DURABLE).insert_one(one))
            own_server.kill()
            fresh = Driver(cls, proxy.uri, namespace, timeoutMS=500, serverSelectionTimeoutMS=500)
            with pytest.raises(ServerSelectionTimeoutError):
                await fresh.do(insert(1))
            await fresh.close()
            own_server.start()
            assert await driver.do(lambda jobs, one=one: jobs.find_one({"name": one["name"]}))
            await driver.close()
