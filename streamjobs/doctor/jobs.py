"""Checks of the runners and of the jobs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from bson.datetime_ms import DatetimeMS

from streamjobs.doctor.finding import Finding, Level, Runner, Subject, listed, since
from streamjobs.job import RUNNABLE, Status, date_ms, problem_of

_KINDS = 200
_OWNERS = 1_000
_COUNT = 1_000  # documents that are counted at most
_HOUR_MS = 3_600_000
_LOST = 3  # lost tries within an hour from which their share counts
_SHARE = 0.01
_START = "streamjobs run MODULE:NAME"


def runners(subject: Subject) -> list[Finding]:
    """Who is alive, what they serve, and whose lease has ended."""
    records = subject.runners()
    alive, over = [one for one in records if one.alive], [one for one in records if not one.alive]
    found: list[Finding] = []
    if alive:
        text = f"{len(alive):,} alive: {listed([_about(one) for one in alive])}"
        versions = sorted({one.version for one in alive})
        if len(versions) > 1:
            text += f"; versions {', '.join(versions)}"
        found.append(Finding("runners", Level.OK, text))
    else:
        found.append(
            Finding("runners", Level.WARN, "none is alive: nothing runs, nothing is taken back", _START)
        )
    return [*found, _expired(over, len(alive))]


def unserved(subject: Subject) -> list[Finding]:
    """Kinds with due jobs that no live runner serves."""
    name = "unserved kinds"
    if not subject.indexed("kind", "status", "runat"):
        return [_not_seen(name, subject)]
    kinds, more = _kinds(subject)
    served = {kind for one in subject.alive() for kind in one.kinds}
    now = subject.server.now_ms()
    looked = f"the first {_KINDS} kinds of more" if more else f"{len(kinds)} kinds"
    alone: list[str] = []
    for kind in kinds:
        count, oldest = (0, None) if kind in served else _due(subject, kind, now)
        if count:
            late = "" if oldest is None else f", the first for {since(max(0, now - oldest))}"
            alone.append(f"{kind!r} ({_number(count)} due{late})")
    if not alone:
        return [Finding(name, Level.OK, f"none with due jobs among {looked}")]
    text = f"{len(alone)} of {looked} have due jobs and no live runner: {listed(alone)}"
    fix = f"run their handlers: {_START}; runners of the Go package leave no record and may have them"
    return [Finding(name, Level.WARN, text, fix)]


def held(subject: Subject) -> list[Finding]:
    """Jobs that are working and whose holder is not known to be alive."""
    return [*_strangers(subject), *_without_lease(subject)]


def unreadable(subject: Subject) -> list[Finding]:
    """Documents that can't be jobs."""
    name, sample = "unreadable", subject.sample
    why: Counter[str] = Counter()
    ids: list[Any] = []
    for row in sample.rows:
        problem = problem_of(row)
        if problem is not None:
            why[problem] += 1
            ids.append(row.get("_id"))
    if sample.broken:
        why["its BSON can't be decoded"] += len(sample.broken)
        ids += sample.broken
    if not ids:
        return [Finding(name, Level.OK, f"none in {sample}")]
    reasons = "; ".join(f"{reason} ({count:,})" for reason, count in why.most_common(5))
    text = f"{len(ids):,} in {sample} can't be jobs: {reasons}; _id {listed([repr(one) for one in ids])}"
    fix = "mend or delete them by _id: runners leave them alone (event job.unreadable)"
    return [Finding(name, Level.WARN, text, fix)]


def losses(subject: Subject) -> list[Finding]:
    """Tries of the last hour that were lost, against all."""
    name, sample, now = "lost tries", subject.sample, subject.server.now_ms()
    recent = [entry for row in sample.rows for entry in _tries(row) if _within_hour(entry, now)]
    total, lost = len(recent), sum(entry.get("outcome") == "lost" for entry in recent)
    text = f"{lost:,} of {total:,} tries that ended within the hour, in {sample}"
    if lost < _LOST or lost < _SHARE * total:
        return [Finding(name, Level.OK, text)]
    fix = "runners die, freeze or lose the server: look for takeback, lease.untrusted and lease.lost among the events"
    return [Finding(name, Level.WARN, text, fix)]


def _expired(over: Sequence[Runner], alive: int) -> Finding:
    """Leases that ended with nobody's clean stop; a few of them are being seen to where a runner is alive."""
    name = "expired leases"
    if not over:
        return Finding(name, Level.OK, "none")
    text = f"{len(over):,} runners ended without a clean stop: {listed([f'{one.name} ({one.owner})' for one in over])}"
    if alive and len(over) < _LOST:
        return Finding(name, Level.OK, f"{text}; their jobs are being taken back")
    fix = "look why they ended: killed for memory, frozen, or cut off from the server"
    return Finding(name, Level.WARN, text, fix if alive else f"{_START} takes their jobs back; {fix}")


def _not_seen(name: str, subject: Subject) -> Finding:
    why = "without its index that would read the whole collection"
    return Finding(
        name, Level.SKIP, f"not looked at: {why if subject.index_information else 'no collection'}"
    )


def _strangers(subject: Subject) -> list[Finding]:
    """Jobs whose lease names an owner that is not alive."""
    name = "held by unknown"
    if not subject.indexed("lease.owner"):
        return [_not_seen(name, subject)]
    jobs = subject.jobs
    # owners first, records after, and the jobs once more: a runner that stops meanwhile is no stranger
    owners = [
        one for one in jobs.distinct("lease.owner", {"lease.owner": {"$gt": ""}}) if isinstance(one, str)
    ]
    alive = {one.owner for one in subject.alive()}
    strange = [one for one in owners if one not in alive][:_OWNERS]
    counts = {one: jobs.count_documents({"lease.owner": one}, limit=_COUNT) for one in strange}
    counts = {owner: count for owner, count in counts.items() if count}
    if not counts:
        return [
            Finding(
                name, Level.OK, f"none: {len(owners):,} owners hold jobs, all alive" if owners else "none"
            )
        ]
    told = listed([f"{owner} ({_number(count)})" for owner, count in counts.items()])
    text = f"jobs of {len(counts):,} owners without a live record: {told}"
    fix = "wait for a lease (30 s) and a second: a live runner takes them back; if they stay, look for takeback events"
    if not alive:
        fix = f"start a runner, which takes them back: {_START}"
    return [Finding(name, Level.WARN, text, fix)]


def _without_lease(subject: Subject) -> list[Finding]:
    """Working jobs that nobody is named for."""
    name = "held without lease"
    if not subject.indexed("kind", "status", "runat"):
        return [_not_seen(name, subject)]
    count = 0
    some: list[Any] = []
    for kind in _kinds(subject)[0]:
        query = {"kind": kind, "status": int(Status.WORKING), "lease.owner": {"$not": {"$type": "string"}}}
        ids = [one["_id"] for one in subject.jobs.find(query, {"_id": 1}).limit(_COUNT)]
        count += len(ids)
        some += ids
    if not count:
        return [Finding(name, Level.OK, "none")]
    text = f"{_number(count)} working without a lease: {listed([str(one) for one in some])}"
    fix = f"a runner of the Go package has them, or died with them; if it died: streamjobs retry {some[0]} --force"
    return [Finding(name, Level.WARN, text, fix)]


def _kinds(subject: Subject) -> tuple[list[str], bool]:
    """The kinds that there are, and whether there are more; from the index, which is not read as a whole."""
    found = [one for one in subject.jobs.distinct("kind", {"kind": {"$gte": ""}}) if isinstance(one, str)]
    return sorted(found)[:_KINDS], len(found) > _KINDS


def _due(subject: Subject, kind: str, now: float) -> tuple[int, int | None]:
    """How many jobs of a kind are due, and since when (ms)."""
    count = 0
    since_when: list[int] = []
    for status in RUNNABLE:
        query = {"kind": kind, "status": int(status), "runat": {"$lte": DatetimeMS(round(now))}}
        count += subject.jobs.count_documents(query, limit=_COUNT)
        first = subject.jobs.find_one(query, {"runat": 1, "created": 1}, sort=[("runat", 1), ("created", 1)])
        if first is not None:
            dates = [date_ms(first.get("runat")), date_ms(first.get("created"))]
            since_when += [max(one for one in dates if one is not None)]
    return min(count, _COUNT), min(since_when, default=None)


def _about(one: Runner) -> str:
    return f"{one.name} ({one.slots} slots: {_words(one.kinds)})"


def _words(kinds: Sequence[str]) -> str:
    return listed(kinds) if kinds else "no kinds"


def _number(count: int) -> str:
    return f"{_COUNT:,} or more" if count >= _COUNT else f"{count:,}"


def _tries(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    tries: Any = row.get("tries")
    return [one for one in tries if isinstance(one, Mapping)] if isinstance(tries, list) else []  # pyright: ignore[reportUnknownVariableType]


def _within_hour(entry: Mapping[str, Any], now: float) -> bool:
    when = date_ms(entry.get("when"))
    return when is not None and now - when < _HOUR_MS
