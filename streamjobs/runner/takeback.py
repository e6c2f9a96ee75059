"""Taking back: jobs of runners that are gone, and one's own that one does not know of.

By state, not by event: whoever fenced may have died before it freed, and a claim that was in a socket may land
after a sweep. So each runner frees, again and again, whatever names an owner whose record is fenced or has been
missing for a lease; a fenced record goes only after two empty sweeps one lease apart.
"""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import Callable, Sequence
from typing import Any

import pymongo
from bson.errors import BSONError
from pymongo import UpdateOne
from pymongo.errors import BulkWriteError, PyMongoError, WriteError

from streamjobs import events, transitions
from streamjobs.clients import COMMAND_TIMEOUT
from streamjobs.clock import ServerClock, boot
from streamjobs.errors import UnreadableJob
from streamjobs.job import Job, date_ms
from streamjobs.runner.lease import Trust, fence, owner_of, record_id
from streamjobs.runner.outage import Outage
from streamjobs.runner.store import PASSING, Store
from streamjobs.runner.tasks import going
from streamjobs.settings import Settings
from streamjobs.transitions import Change, Claim

_LATE_MS = 50.0  # look this long after a lease's end, so that the server agrees that it is over
_SOON = 0.5
_EACH, _SPREAD = 0.02, 0.75  # seconds for each runner over which a fleet spreads its looks, and at most


class Sweeper:
    """Reads the runners' records when a lease may be over, when a runner comes, and at the fallback.

    Args:
        known: the tokens that this runner holds or may hold.
        seen: called with the records, each time that they were read.
        offer: called with the jobs that were put back.
        report: called with the ``_id`` of a held document that can't be put back, and why.

    """

    def __init__(
        self, store: Store, clock: ServerClock, trust: Trust, settings: Settings, runner: str,
        outage: Outage, known: Callable[[], set[str]], seen: Callable[[Sequence[dict[str, Any]]], None],
        offer: Callable[[Sequence[Job]], None], report: Callable[[Any, str], None],
    ) -> None:  # fmt: skip
        self._store = store
        self._clock = clock
        self._trust = trust
        self._settings = settings
        self._runner = runner
        self._outage = outage
        self._known = known
        self._seen = seen
        self._offer = offer
        self._report = report
        self._wake = asyncio.Event()
        self._full = True
        self._missing: dict[str, float] = {}
        self._empty: dict[str, float] = {}

    def wake(self, *, full: bool = False) -> None:
        """Read the records now; ``full`` also looks for jobs of unknown owners and for orphans."""
        self._full = self._full or full
        self._wake.set()

    async def run(self) -> None:
        """The loop."""
        while going():
            self._wake.clear()
            try:
                with pymongo.timeout(COMMAND_TIMEOUT):
                    wait = await self.sweep()
            except (PyMongoError, BSONError) as error:
                wait = 1.0
                self._outage.failed("takeback", error)
            else:
                self._outage.over("takeback")
            timer = asyncio.get_running_loop().call_later(wait, self._wake.set)
            try:
                await self._wake.wait()
            finally:
                timer.cancel()

    async def first(self) -> None:
        """Read the records before the stream opens, to know what to hear of; without an answer, of everything."""
        try:
            with pymongo.timeout(COMMAND_TIMEOUT):
                await self.look()
        except (PyMongoError, BSONError) as error:
            self._outage.failed("takeback", error)

    async def look(self) -> list[dict[str, Any]]:
        """Read the records."""
        records = await self._store.records()
        self._seen(records)
        return records

    async def sweep(self) -> float:
        """One look at the records; seconds until the next is needed."""
        if not self._trust.holds():
            return _SOON
        full = self._full
        records = await self.look()
        # one without a date says nothing of its lease: its jobs are freed as those without a record
        dated = [
            (owner_of(str(record["_id"])), ends, record)
            for record in records
            if str(record["_id"]).startswith(record_id(""))
            and (ends := date_ms(record.get("ends"))) is not None
        ]
        there = {owner for owner, _, _ in dated}
        self._empty = {owner: since for owner, since in self._empty.items() if owner in there}
        now = self._clock.now_ms()
        wait = self._settings.period
        fenced: list[str] = []
        for owner, ends, record in dated:
            if owner == self._trust.owner:
                continue
            if record.get("fenced") is not None:
                fenced.append(owner)
            elif ends + _LATE_MS > now:
                wait = min(wait, (ends + _LATE_MS - now) / 1000)
            elif await self._fence(owner):
                fenced.append(owner)
            else:
                wait = min(wait, _SOON)
        holding = await self._store.owners(fenced) if fenced else []
        for owner in fenced:
            await self._free_fenced(owner, holds=owner in holding)
        # not all at the same moment: who comes later finds it done, and what ends meanwhile is seen in one read
        wait += random.uniform(0, min(_EACH * len(dated), _SPREAD))  # noqa: S311 - only to spread
        if full:
            self._full = False
            await self._free_missing(there | {self._trust.owner})
            await self.release_orphans()
        return max(wait, 0.01)

    async def _fence(self, owner: str) -> bool:
        """Fence a record whose lease is over by the server's clock; whether it is."""
        if not self._trust.may_fence():
            return False
        guard = {"_id": record_id(owner), "fenced": None}
        return bool((await self._store.jobs.update_one(guard, fence())).modified_count)

    async def _free_fenced(self, owner: str, *, holds: bool) -> None:
        freed = await self._free(owner, "its lease is over") if holds else 0
        first = self._empty.setdefault(owner, boot())
        if freed:
            self._empty.pop(owner)
        elif boot() - first >= self._settings.lease:
            await self._store.jobs.delete_one({"_id": record_id(owner), "fenced": {"$ne": None}})
            self._empty.pop(owner)

    async def _free_missing(self, recorded: set[str]) -> None:
        """Free jobs of owners that have had no record for a lease."""
        now = boot()
        unknown = {owner for owner in await self._store.owners() if type(owner) is str} - recorded
        self._missing = {owner: self._missing.get(owner, now) for owner in unknown}
        for owner, since in self._missing.items():
            if now - since >= self._settings.lease and self._trust.may_fence():
                await self._free(owner, "it has no record")

    async def _free(self, owner: str, why: str) -> int:
        """Put an owner's jobs back, each with its try recorded as lost; how many."""
        total = 0
        while documents := await self._store.held_by(owner):
            claims = [claim for one in documents if (claim := self._claim_of(one)) is not None]
            done = await self._put_back(
                claims, [transitions.lose(claim, f"{claim.runner}: {why}") for claim in claims]
            )
            total += done
            if not done:
                break
        if total:
            events.emit(
                "takeback", runner=self._runner, owner=self._trust.owner, taken=owner, count=total, reason=why
            )
        return total

    async def release_orphans(self) -> int:
        """Release jobs that name this owner with a token that it neither held before the read nor holds now."""
        owner, before = self._trust.owner, self._known()
        documents = await self._store.held_by(owner)
        known = before | self._known()
        claims: list[Claim] = []
        changes: list[Change] = []
        for document in documents:
            claim = self._claim_of(document)
            if claim is not None and claim.token not in known and owner == self._trust.owner:
                whole = "retries" in document
                why = "its runner did not know that it had it"
                change = (
                    transitions.release(claim, why)
                    if whole
                    else transitions.fail(claim, "it can't be decoded")
                )
                changes.append(change)
                claims.append(claim)
        done = await self._put_back(claims, changes)
        if done:
            events.emit("orphans.released", runner=self._runner, owner=owner, count=done)
        return done

    async def _put_back(self, claims: Sequence[Claim], changes: Sequence[Change]) -> int:
        """Write the end of each claim and offer the jobs, also after an error, since some may have been written."""
        try:
            return await self._write(claims, changes)
        finally:
            self._offer([claim.job for claim in claims])

    async def _write(self, claims: Sequence[Claim], changes: Sequence[Change]) -> int:
        """Write the end of each claim; how many were written. One that the server refuses holds up no other."""
        if not changes:
            return 0
        writes: list[Any] = [UpdateOne(*change) for change in changes]
        try:
            return (await self._store.jobs.bulk_write(writes, ordered=False)).modified_count
        except BulkWriteError as error:
            details: Any = error.details
            wrong: list[Any] = details.get("writeErrors", [])
            if details.get("writeConcernErrors") or any(one.get("code") in PASSING for one in wrong):
                raise  # it passes: all of it again, and what was written matches no more
        done: int = details.get("nModified", 0)
        for one in wrong:
            place: int = one["index"]
            done += await self._overflow(claims[place], str(one.get("errmsg"))[:1000])
        return done

    async def _overflow(self, claim: Claim, message: str) -> int:
        """End a job that has no room for its try with a short one; what the server refuses even so is reported."""
        job = claim.job
        try:
            done = (await self._store.jobs.update_one(*transitions.overflow(claim))).modified_count
        except WriteError as error:
            self._report(job.id, f"held, and the server refuses to free it: {error}"[:500])
            return 0
        events.emit(
            "outcome.overflow", job=job.id, kind=job.kind, number=job.number, runner=self._runner,
            owner=self._trust.owner, message=message,
        )  # fmt: skip
        return done

    def _claim_of(self, document: dict[str, Any]) -> Claim | None:
        """What the transitions need, from a job read without its data."""
        found: Any = document.get("lease")
        lease: Any = found if isinstance(found, dict) else {}  # pyright: ignore[reportUnknownVariableType]
        token = lease.get("token")
        try:
            job = Job.from_document({**document, "data": {}})
        except UnreadableJob as error:  # a claim takes only what can be a job: somebody has changed it since
            self._report(document.get("_id"), f"held, and {error.problem}")
            return None
        if not isinstance(token, str):
            self._report(job.id, "its lease has no token: if its runner died, force a retry (--force)")
            return None
        nonce = secrets.randbits(31)
        return Claim(job, token, lease.get("claimed"), str(lease.get("owner")), self._trust.owner, nonce)
