"""A sweeper on a real server, with runners' records and clocks that a test moves, beside what it should do."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from streamjobs.clock import ServerClock, boot
from streamjobs.runner.lease import Trust, fence, in_ms, record_id
from streamjobs.runner.outage import Outage
from streamjobs.runner.store import Store
from streamjobs.runner.takeback import Sweeper
from streamjobs.settings import Settings
from tests.documents import server_now

ME = "me"
HOURS = timedelta(hours=1)
SETTINGS = Settings()


@dataclass
class Record:
    """A runner's record: whether its lease is over by the server's clock (by an hour), whether it is fenced."""

    over: bool
    fenced: bool = False


class Fleet:
    """Records of runners, and the sweeper of one of them.

    Args:
        raw: the collection.
        loop: runs what is asynchronous.
        store: the collection as a runner sees it, on that loop.

    """

    def __init__(self, raw: Any, loop: asyncio.Runner, store: Store) -> None:
        self.raw = raw
        self.loop = loop
        self.boot = 1_000.0
        self.records: dict[str, Record] = {}
        self.known: set[str] = set()
        self.offered: list[Any] = []
        self.trust = Trust(SETTINGS)
        self.clock = ServerClock()
        self.ahead = 0
        self._missing: dict[str, float] = {}
        self._empty: dict[str, float] = {}
        self._full = True
        self.sweeper = Sweeper(
            store, self.clock, self.trust, SETTINGS, "w",
            Outage(dict), lambda: set(self.known), lambda records: None, self.offered.extend, lambda id_, why: None,
        )  # fmt: skip
        self.estimate(0)
        self.register(ME)

    def boot_now(self) -> float:
        """Stands in for the boot clock: it moves when a rule moves it."""
        return self.boot

    def estimate(self, hours: int) -> None:
        """Have the sweeper's idea of the server's clock be so wrong."""
        self.ahead = hours
        now, moment = boot(), server_now(self.raw) + hours * HOURS
        self.clock.observe(now, now, moment.timestamp() * 1000)

    def register(self, owner: str) -> None:
        """A runner registers; its lease ends in an hour."""
        self._record(owner, HOURS)
        self.records[owner] = Record(over=False)

    def end(self, owner: str) -> None:
        """A runner registered, and its lease has ended an hour ago."""
        self._record(owner, -HOURS)
        self.records[owner] = Record(over=True)

    def renew(self, owner: str) -> None:
        """A beat, as its thread sends it: of no effect once the record is fenced or gone."""
        guard = {"_id": record_id(owner), "control": "runner", "fenced": None}
        matched = self.raw.update_one(guard, [{"$set": {"ends": in_ms(3_600_000)}}]).matched_count
        record = self.records.get(owner)
        assert matched == (record is not None and not record.fenced)
        if matched:
            self.records[owner].over = False

    def fence(self, owner: str) -> None:
        """Somebody tries to fence it: of effect only when its lease is over by the server's clock."""
        self.raw.update_one({"_id": record_id(owner), "fenced": None}, fence())
        record = self.records.get(owner)
        if record is not None:
            record.fenced = record.fenced or record.over

    def leave(self, owner: str) -> None:
        """Its record goes, as at a clean stop, whatever it held."""
        self.raw.delete_one({"_id": record_id(owner)})
        self.records.pop(owner, None)

    def sweep(self, jobs: Mapping[Any, Mapping[str, Any]], *, full: bool) -> dict[Any, tuple[str, str]]:
        """Sweep; by job what must have become of it: its outcome and why."""
        if full:
            self._full = True
            self.sweeper.wake(full=True)
        expected = self._expected({id_: one["lease"] for id_, one in jobs.items() if "lease" in one})
        self.offered.clear()
        assert self.loop.run(self.sweeper.sweep()) > 0
        assert {one.id for one in self.offered} == set(expected)
        stored = {one["_id"]: "fenced" in one for one in self.raw.find({"control": "runner"})}
        assert stored == {record_id(owner): one.fenced for owner, one in self.records.items()}
        return expected

    def _record(self, owner: str, ends_in: timedelta) -> None:
        record = {"control": "runner", "name": owner, "ends": server_now(self.raw) + ends_in}
        self.raw.replace_one({"_id": record_id(owner)}, record, upsert=True)

    def _expected(self, leases: dict[Any, Mapping[str, Any]]) -> dict[Any, tuple[str, str]]:
        out: dict[Any, tuple[str, str]] = {}
        if not self.trust.holds():
            return out

        def free(owner: str, why: str) -> int:
            mine = [id_ for id_, one in leases.items() if one["owner"] == owner and id_ not in out]
            out.update((id_, ("lost", why)) for id_ in mine)
            return len(mine)

        there = set(self.records)
        self._empty = {owner: since for owner, since in self._empty.items() if owner in there}
        for owner in there - {ME}:
            record = self.records[owner]
            looks_over = self.ahead > 0 or (record.over and self.ahead == 0)
            if not record.fenced and looks_over and self.trust.may_fence():
                record.fenced = record.over
            if not record.fenced:
                continue
            since = self._empty.setdefault(owner, self.boot)
            if free(owner, "its lease is over"):
                self._empty.pop(owner)
            elif self.boot - since >= SETTINGS.lease:
                self._empty.pop(owner)
                self.records.pop(owner)
        if self._full:
            self._full = False
            unknown = {one["owner"] for id_, one in leases.items() if id_ not in out} - there
            self._missing = {owner: self._missing.get(owner, self.boot) for owner in unknown}
            for owner, since in self._missing.items():
                if self.boot - since >= SETTINGS.lease and self.trust.may_fence():
                    free(owner, "it has no record")
            for id_, one in leases.items():
                if one["owner"] == ME and one["token"] not in self.known:
                    out[id_] = ("released", "its runner did not know that it had it")
        return out
