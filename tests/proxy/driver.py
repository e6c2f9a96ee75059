"""A driver's client through the proxy, asynchronous or synchronous, behind one form of call."""

from __future__ import annotations

import asyncio
import inspect
from concurrent.futures import ThreadPoolExecutor

from pymongo import AsyncMongoClient


class Driver:
    """Either client behind one form of call."""

    def __init__(self, cls, uri, namespace, **options):
        # no timeoutMS: the default server tells a repeated write from a new one by its maxTimeMS too
        self.client = cls(uri, **{"appname": "mine", **options})
        self._database, _, self._name = namespace.partition(".")
        self._threads = ThreadPoolExecutor(4)
        self._closed = False

    async def do(self, call):
        """``call(collection)``, awaited or in a thread."""
        collection = self.client[self._database][self._name]
        if isinstance(self.client, AsyncMongoClient):
            result = call(collection)
            return await result if inspect.isawaitable(result) else result
        return await asyncio.get_running_loop().run_in_executor(self._threads, call, collection)

    async def stream(self):
        return await self.do(lambda jobs: jobs.watch(max_await_time_ms=5_000))

    async def next(self, stream):
        return await self.do(lambda _: stream.next())

    async def close(self):
        if not self._closed:
            self._closed = True
            await self.do(lambda jobs: jobs.database.client.close())
            self._threads.shutdown(wait=False)


class streaming:  # noqa: N801 - reads as a verb
    def __init__(self, driver):
        self._driver = driver

    async def __aenter__(self):
        self._stream = await self._driver.stream()
        return self._stream

    async def __aexit__(self, *_):
        await self._driver.do(lambda _: self._stream.close())


def insert(id_):
    return lambda jobs: jobs.insert_one({"_id": id_})


def update(jobs):
    return jobs.update_many({"_id": 1}, {"$inc": {"n": 1}})
