"""The history checker: what a run broke of promises 1, 2, 5 and 6, as plain functions over its model.

Four things are counted apart, since the promise names them: user code of a try that was lost runs on while the next
one runs, because it is a sync handler that does not look, one that swallows or outlasts its cancellation, or in a
process that was frozen, or whose loop was blocked, until its loop's first turn.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from tests.history import Attempt, Life, Process, Run
from tests.sight import MS, Breach, Limits, Sight, sights_of
from tests.story import ENDED, story
from tests.windows import FOREVER, Window, longest, merged, touched

_WAITED = 0.5  # seconds that a command may have waited on the server since its date
_SHOWN = 20  # breaches whose jobs' histories are printed


@dataclass(slots=True)
class Verdict:
    """All breaches, and what was counted apart."""

    breaches: list[Breach]
    apart: Counter[str]


def check(run: Run, limits: Limits) -> Verdict:
    """Judge a run."""
    sights = sights_of(run, limits)
    apart: Counter[str] = Counter()
    found: list[Breach] = []
    numbers: dict[object, set[str]] = defaultdict(set)
    for life in run.jobs.values():
        if life.document is not None:
            numbers[life.document.get("n")].add(life.job)
        found += _kept(life, limits)
        if life.document is None:
            continue
        found += _one_holder(run, life)
        found += _starts(life)
        found += _code(life, sights, apart)
        found += _taken(run, life, limits)
        found += _each_claim_one_try(life)
        found += _freed(run, life, sights, limits)
        found += story(run, life, sights, limits)
    for process in run.processes.values():
        if process.born < FOREVER and process.gone is not None and process.died is None and not process.asked:
            text = f"{process.runner} ({process.pid}) ended by itself at {process.gone}"
            found.append(Breach(8, "a runner ended", None, text))
    for number, jobs in numbers.items():
        if number is not None and len(jobs) > 1:
            found.append(
                Breach(5, "put twice", min(jobs), f"one put made {len(jobs)} documents: {sorted(jobs)}")
            )
    found += [
        Breach(5, "weak write", None, f"{one['command']} did not wait for a majority: {one}")
        for one in run.weak
    ]
    found += [
        Breach(5, "garbage touched", one["job"], "a document that can't be a job was changed")
        for one in run.garbage
        if not one["kept"]
    ]
    return Verdict(found, apart)


def report(run: Run, verdict: Verdict) -> str:
    """Each breach with its job's whole history before it, of the first some; lateness last, which comes in swarms."""
    lines: list[str] = []
    for place, breach in enumerate(sorted(verdict.breaches, key=lambda one: one.name == "late")):
        if breach.job is not None and place < _SHOWN:
            lines += [str(one) for one in run.of_job(breach.job)]
        lines.append(f"BREACH of promise {breach.promise}, {breach.name}, job {breach.job}: {breach.text}\n")
    return "\n".join(lines)


def _one_holder(run: Run, life: Life) -> Iterator[Breach]:
    """Promise 1: no two tries hold it at once, by the stream's order, and by the server's dates.

    A date is that of its command's beginning, which may have waited for another that began later.
    """
    for before, after in zip(life.told, life.told[1:], strict=False):
        missing = any(before["at"] <= gap <= after["at"] for gap in run.gaps)
        if before["what"] == after["what"] == "held" and before["token"] != after["token"] and not missing:
            text = f"{after['token']} claimed it while {before['token']} held it"
            yield Breach(1, "two holders", life.job, text)
    known = [one for one in life.attempts.values() if one.claimed_ms is not None]
    known.sort(key=lambda one: one.claimed_ms or 0.0)
    for before, after in zip(known, known[1:], strict=False):
        if (after.claimed_ms or 0.0) < before.when_ms - _WAITED * 1000:
            text = f"{after.token} claimed it at {after.claimed}, {before.token} held it until {before.when}"
            yield Breach(1, "two holders", life.job, text)


def _starts(life: Life) -> Iterator[Breach]:
    """Promise 1: each try starts once at most, and a job put without retries starts once."""
    for one in life.attempts.values():
        if len(one.starts) > 1:
            yield Breach(1, "a try started twice", life.job, f"{one.token} at {one.starts}")
    if life.put is None or life.put["retries"] > 1 or life.unsure:
        return
    again = len(life.retries) + sum(one.outcome == "snoozed" for one in life.attempts.values())
    starts = sum(len(one.starts) for one in life.attempts.values())
    if starts > 1 + again:
        yield Breach(1, "once started twice", life.job, f"{starts} starts, {again} of them asked for")


def _code(life: Life, sights: dict[int, Sight], apart: Counter[str]) -> Iterator[Breach]:
    """Promise 1: user code of two tries at once, but for the cases that are counted apart."""
    begun = sorted((one for one in life.attempts.values() if one.starts), key=lambda one: one.starts[0])
    for place, one in enumerate(begun):
        sight = sights.get(one.pid)
        if one.when is not None and one.starts[0] > one.when + MS:
            if sight is not None and touched(sight.stuck, one.when, one.starts[0]):
                apart["frozen"] += 1
            else:
                yield Breach(1, "started after its end", life.job, f"{one.token}: {one.when}, {one.starts}")
        ran_until = _ran_until(one, sight)
        for later in begun[place + 1 :]:
            if later.starts[0] < ran_until:
                case = _case(one, later.starts[0], ran_until, sight)
                if case is None:
                    text = f"{one.token} ran until {ran_until}, {later.token} since {later.starts[0]}"
                    yield Breach(1, "two run", life.job, text)
                else:
                    apart[case] += 1


def _ran_until(one: Attempt, sight: Sight | None) -> float:
    ends = [one.end] if sight is None else [one.end, sight.process.died, sight.process.gone]
    return min((at for at in ends if at is not None), default=FOREVER)


def _case(one: Attempt, since: float, until: float, sight: Sight | None) -> str | None:
    """Which of the named cases an overlap is; None if it is a breach."""
    if one.outcome != "lost":
        return None
    if one.sort == "thread":
        return "sync"
    if one.sort in ("stubborn", "blocking"):
        return "outlasted"
    # until its loop's first turn, and no longer
    if sight is not None and longest(sight.stuck, since, until) >= until - since - MS:
        return "frozen"
    return None


def _taken(run: Run, life: Life, limits: Limits) -> Iterator[Breach]:
    """Promise 1: a holder that lives and renews loses nothing."""
    for one in life.attempts.values():
        if one.outcome != "lost" or one.when is None:
            continue
        since, process = one.begun - limits.lease, run.process(one.pid)
        broken = merged(
            [*run.broken("server", "fleet", process.runner), *process.frozen, *process.lagged, *run.stalls]
        )
        ended = process.until < one.when
        if (
            not ended
            and not touched(broken, since, one.when)
            and not any(since <= at <= one.when for at in process.troubles)
        ):
            text = f"{one.token} was lost at {one.when}, and its runner {process.runner} had no trouble"
            yield Breach(1, "taken from a living holder", life.job, text)


def _kept(life: Life, limits: Limits) -> Iterator[Breach]:
    """Promise 5: nothing acknowledged is lost, and all comes to its end."""
    for one in life.refused:
        yield Breach(5, "put refused", life.job, one["error"])
    if life.document is None:
        if life.ack is not None:
            yield Breach(5, "acknowledged and gone", life.job, "it was put, and there is no document")
        return
    if limits.drained and life.document["status"] not in ENDED:
        lease = life.document.get("lease")
        text = f"status {life.document['status']}, lease {lease}, when all had the time to end"
        yield Breach(5, "never ended", life.job, text)


def _each_claim_one_try(life: Life) -> Iterator[Breach]:
    """Promise 5: each claim ends in one try, which says what its runner was told."""
    document = life.document or {}
    lease = document.get("lease") or {}
    token = life.attempt(lease["token"], lease["claimed"]).token if lease else None
    folded = any(one.get("outcome") == "folded" for one in document["tries"])
    for one in life.attempts.values():
        if len(one.entries) > 1:
            yield Breach(1, "two tries of one claim", life.job, f"{one.token}: {one.entries}")
        if not one.entries and one.token != token and not folded:
            yield Breach(5, "a claim without a try", life.job, f"{one}")
        if one.entries and one.token == token:
            yield Breach(5, "held after its try", life.job, f"{one}")
        if len(one.told) > 1 or (one.told and not folded and one.told[0] != one.outcome):
            text = f"{one.token}: its runner recorded {one.told}, stored is {one.outcome}"
            yield Breach(5, "an outcome was lost", life.job, text)


def _freed(run: Run, life: Life, sights: dict[int, Sight], limits: Limits) -> Iterator[Breach]:
    """Promise 2: a dead holder's job is taken back in time; promise 4: a claim that nobody knows of too."""
    for one in life.attempts.values():
        process, when = run.process(one.pid), run.over if one.when is None else one.when
        since = _gone(process, one.begun, when)
        if since is not None and one.outcome in (None, "lost"):
            late = max(
                (longest(_fencing(sight, limits), since + limits.lease, when) for pid, sight in sights.items() if pid != one.pid),
                default=0.0,
            )  # fmt: skip
            if late > limits.sweep:
                text = (
                    f"{one.token} was held {when - since:.2f} s after its holder's end, and for {late:.2f} s of "
                    f"the time after its lease somebody could have taken it"
                )
                yield Breach(2, "not taken back", life.job, text)
        elif since is None and not one.starts and one.pid in sights:
            known = longest(sights[one.pid].trusted, one.begun, when)
            if known > 2 * limits.interval + limits.back:
                yield Breach(4, "orphan", life.job, f"{one.token} was held unknown for {known:.2f} s")


def _gone(process: Process, begun: float, when: float) -> float | None:
    """Since when the holder was dead, or frozen until the end of its try."""
    dead = [at for at in (process.died, process.gone) if at is not None and begun < at < when]
    frozen = [since for since, until in process.frozen if begun < since < when <= until]
    return min([*dead, *frozen], default=None)


def _fencing(sight: Sight, limits: Limits) -> list[Window]:
    """When it may judge others: a beat and margin after its first renewal."""
    return [(since + limits.beat + limits.margin, until) for since, until in sight.trusted]
