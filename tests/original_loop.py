"""The loop of the Go package's runner, as its source has it, for tests in which both share a collection."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

from bson import Int64, ObjectId
from pymongo import MongoClient, ReturnDocument

NEW, WORKING, WAITING, SUCCESS, FAILED = 1, 2, 3, 4, 5
NINE = ("_id", "status", "tries", "created", "runat", "data", "retries", "retryinterval", "kind")
ZERO = datetime(1, 1, 1, tzinfo=UTC)

#: Takes a job's nine fields; None is success, a text is the error with which the try failed.
JobFunc = Callable[[dict[str, Any]], str | None]


def new(kind: str, data: dict[str, Any], *, retries: int = 0, retryinterval_ms: int = 0) -> dict[str, Any]:
    """What the original's ``New`` makes."""
    return {
        "_id": ObjectId(), "status": NEW, "tries": [], "created": datetime.now(UTC), "runat": ZERO, "data": data,
        "retries": retries, "retryinterval": Int64(retryinterval_ms * 1_000_000), "kind": kind,
    }  # fmt: skip


def put(collection: Any, jobs: Iterable[dict[str, Any]]) -> None:
    """Its ``Put``: one insert of all."""
    collection.insert_many(list(jobs))


class OriginalRunner(threading.Thread):
    """Polls, claims one after the other, calls the function, rewrites the document.

    Args:
        name: as it writes it in tries.
        uri: the server.
        namespace: ``database.collection``.
        kind: what it takes.
        fn: what it calls.
        finished: told each job that it has rewritten.
        interval: seconds between two polls; the original's are 0.5.

    """

    def __init__(
        self, name: str, uri: str, namespace: str, kind: str, fn: JobFunc,
        finished: Callable[[dict[str, Any]], None] = lambda job: None, interval: float = 0.5,
    ) -> None:  # fmt: skip
        super().__init__(name=name, daemon=True)
        self._uri = uri
        self._namespace = namespace
        self._kind = kind
        self._fn = fn
        self._finished = finished
        self._interval = interval
        self._stopping = threading.Event()
        self.error: BaseException | None = None

    def stop(self) -> None:
        """Ask it to stop, and wait until it has; raises what stopped it."""
        self._stopping.set()
        self.join(60)
        assert not self.is_alive()
        if self.error is not None:
            raise self.error

    def run(self) -> None:
        database, _, name = self._namespace.partition(".")
        try:
            with MongoClient(self._uri, tz_aware=True) as client:
                collection = client[database][name]
                while not self._stopping.is_set():
                    self.poll(collection)
                    self._stopping.wait(self._interval)
        except Exception as error:  # any error of the database stops it
            self.error = error

    def poll(self, collection: Any) -> None:
        """One look for jobs, each of which is claimed and run."""
        due = {
            "kind": self._kind, "status": {"$in": [NEW, WAITING]}, "runat": {"$lte": datetime.now(UTC)},
        }  # fmt: skip
        for found in collection.find(due, {"_id": 1}).sort("created", 1):
            if self._stopping.is_set():
                return
            job = self._claim(collection, found["_id"])
            if job is not None:
                self._work(collection, job)

    def _claim(self, collection: Any, id_: Any) -> dict[str, Any] | None:
        """No match: another runner has it."""
        found = collection.find_one_and_update(
            {"_id": id_, "status": {"$in": [NEW, WAITING]}},
            {"$set": {"status": WORKING}},
            return_document=ReturnDocument.AFTER,
        )
        return None if found is None else decoded(found)

    def _work(self, collection: Any, job: dict[str, Any]) -> None:
        ended = after(job, self.name, self._fn(job), datetime.now(UTC))
        collection.replace_one({"_id": job["_id"]}, ended)
        self._finished(ended)


def after(job: dict[str, Any], runner: str, err: str | None, now: datetime) -> dict[str, Any]:
    """What it rewrites a claimed job to."""
    entry = {"runner": runner, "when": now} | ({} if err is None else {"err": err})
    ended = {**job, "status": SUCCESS, "tries": [*job["tries"], entry]}
    if err is not None:
        ended["runat"] = now + timedelta(microseconds=job["retryinterval"] / 1000)
        ended["retries"] = job["retries"] - 1
        ended["status"] = FAILED if ended["retries"] == 0 else WAITING  # its defect: from 0 it goes to -1
    return ended


def decoded(document: dict[str, Any]) -> dict[str, Any]:
    """What its structs keep of a document: nine fields, and three of a try."""
    job = {"tries": [], **{key: document[key] for key in NINE if key in document}}
    job = {key: job[key] for key in NINE}
    job["retryinterval"] = Int64(job["retryinterval"])
    job["tries"] = three(job["tries"] or [])
    for entry in job["tries"]:
        assert isinstance(entry["runner"], str)
        assert isinstance(entry.get("when", ZERO), datetime)
        assert isinstance(entry.get("err", ""), str)
    return job


def three(tries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each try the fields that it knows."""
    return [{key: entry[key] for key in ("runner", "when", "err") if key in entry} for entry in tries]
