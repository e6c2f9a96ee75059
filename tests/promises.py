"""The history checker: what a run broke of promises 1, 2, 5 and 6, as plain functions over its model.

Four things are counted apart, since the promise names them: user code of a try that was lost runs on while the next
one runs, because it is a sync handler that does not look, one that swallows or outlasts its cancellation, or in a
process that was frozen, or whose loop was blocked, until its loop's first turn.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from tests.history import Attempt, Life, Process, Record, Run, outcome_of
from tests.windows import FOREVER, Window, crowded, longest, merged, touched, without

NEW, WORKING, WAITING, SUCCESS, FAILED, CANCELLED = range(1, 7)
_ENDED = (SUCCESS, FAILED, CANCELLED)
_MS = 0.005  # seconds by which the server's dates may seem wrong on the history's clock
_LOST_AGAIN = 1.0
#: Seconds that a due job may wait for a runner that is idle with its stream live.
LIVE = 1.5
_CLAIM = 0.01  # seconds that a claim stands for
_SHOWN = 20  # breaches whose jobs' histories are printed


@dataclass(frozen=True, slots=True)
class Limits:
    """What the runners' settings promise, in seconds.

    ``live`` bounds lateness while the stream is live, ``back`` is what a runner gets to recover after a fault,
    ``turn`` an event loop for its first turn, ``sweep`` the second of promise 2. ``drained`` says that all jobs had
    the time to end.
    """

    lease: float
    beat: float
    margin: float
    interval: float
    slots: int
    live: float = LIVE
    back: float = 2.0
    turn: float = 0.5
    sweep: float = 1.0
    drained: bool = True


@dataclass(frozen=True, slots=True)
class Breach:
    """A promise that was broken: its number, a name for the sort, by which job, and how."""

    promise: int
    name: str
    job: str | None
    text: str


@dataclass(slots=True)
class Verdict:
    """All breaches, and what was counted apart."""

    breaches: list[Breach]
    apart: Counter[str]


@dataclass(slots=True)
class Sight:
    """When a process could work: its lease was trusted.

    ``idle`` is when it had a slot free too and claimed nothing, whatever its stream did; ``awake`` when its stream
    was live as well; ``stuck`` when it was frozen or its loop blocked, and for the turn after that.
    """

    process: Process
    trusted: list[Window]
    idle: list[Window]
    awake: list[Window]
    stuck: list[Window]


def check(run: Run, limits: Limits) -> Verdict:
    """Judge a run."""
    sights = _sights(run, limits)
    apart: Counter[str] = Counter()
    found: list[Breach] = []
    numbers: dict[object, set[str]] = defaultdict(set)
    for life in run.jobs.values():
        if life.document is not None:
            numbers[life.document.get("n")].add(life.job)
        found += _kept(life, limits)
        if life.document is None:
            continue
        found += _one_holder(life)
        found += _starts(life)
        found += _code(life, sights, apart)
        found += _taken(run, life, limits)
        found += _each_claim_one_try(life)
        found += _freed(run, life, sights, limits)
        found += _story(run, life, sights, limits)
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
    """Each breach with its job's whole history before it."""
    lines: list[str] = []
    for place, breach in enumerate(verdict.breaches):
        if breach.job is not None and place < _SHOWN:
            lines += [str(one) for one in run.of_job(breach.job)]
        lines.append(f"BREACH of promise {breach.promise}, {breach.name}, job {breach.job}: {breach.text}\n")
    return "\n".join(lines)


def _sights(run: Run, limits: Limits) -> dict[int, Sight]:
    spans: dict[int, list[Window]] = defaultdict(list)
    blocked: dict[int, list[Window]] = defaultdict(list)
    for life in run.jobs.values():
        for one in life.attempts.values():
            ends = [at for at in (one.when, one.end) if at is not None]
            over = max(ends) if one.when is not None and (one.end is not None or not one.starts) else FOREVER
            spans[one.pid].append((one.begun, over))
            if one.sort == "blocking" and one.starts:
                blocked[one.pid].append((one.starts[0], FOREVER if one.end is None else one.end))
    everywhere = run.broken("server", "fleet")
    out: dict[int, Sight] = {}
    for pid, process in run.processes.items():
        held_up = merged([*process.frozen, *blocked[pid], *run.stalls])
        broken = merged([*everywhere, *run.broken(process.runner), *process.doubted, *process.frozen])
        stuck = _longer(held_up, limits.turn)
        holes = merged([*stuck, *_longer(broken, limits.back)])
        trusted = without([(process.born + limits.back, process.until)], holes)
        claims = merged((since, since + _CLAIM) for since, _ in spans[pid])
        idle = without(without(trusted, crowded(spans[pid], limits.slots)), claims)
        awake = without(idle, _longer(process.deaf, limits.back))
        out[pid] = Sight(process, trusted, idle, awake, stuck)
    return out


def _longer(windows: list[Window], by: float) -> list[Window]:
    return merged((since, until + by) for since, until in windows)


def _one_holder(life: Life) -> Iterator[Breach]:
    """Promise 1: no two tries hold it at once, by the server's dates."""
    known = sorted(
        (one for one in life.attempts.values() if one.claimed_ms is not None),
        key=lambda one: one.claimed_ms or 0.0,
    )
    for before, after in zip(known, known[1:], strict=False):
        if (after.claimed_ms or 0.0) < before.when_ms:
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
        if one.when is not None and one.starts[0] > one.when + _MS:
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
    if sight is not None and longest(sight.stuck, since, until) >= until - since - _MS:
        return "frozen"
    return None


def _taken(run: Run, life: Life, limits: Limits) -> Iterator[Breach]:
    """Promise 1: a holder that lives and renews loses nothing."""
    for one in life.attempts.values():
        if one.outcome != "lost" or one.when is None:
            continue
        since, process = one.begun - limits.lease, run.process(one.pid)
        broken = merged([*run.broken("server", "fleet", process.runner), *process.frozen, *run.stalls])
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
    if limits.drained and life.document["status"] not in _ENDED:
        lease = life.document.get("lease")
        text = f"status {life.document['status']}, lease {lease}, when all had the time to end"
        yield Breach(5, "never ended", life.job, text)


def _each_claim_one_try(life: Life) -> Iterator[Breach]:
    """Promise 5: each claim ends in one try, which says what its runner was told."""
    document = life.document or {}
    token = (document.get("lease") or {}).get("token")
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


@dataclass(slots=True)
class _State:
    """A job as its tries tell, one after the other."""

    status: int
    retries: int
    interval: float
    due: float | None
    due_ms: float | None  # on the server's clock
    lost: bool = False

    def end(self, entry: Record, when: float) -> None:
        """What a try of this outcome makes of it."""
        outcome, wait = outcome_of(entry), 0.0
        if outcome in ("failure", "lost"):
            self.retries -= 1
        match outcome:
            case "success":
                self.status = SUCCESS
            case "cancelled":
                self.status = CANCELLED
            case "snoozed":
                self.status, wait = WAITING, float(entry["err"].split()[1])
            case "failure":
                self.status, wait = (WAITING, self.interval) if self.retries > 0 else (FAILED, 0.0)
            case "interrupted" if self.retries <= 1:
                self.status = FAILED
            case "lost" if self.retries <= 0:
                self.status = FAILED
            case "lost" if self.lost:
                self.status, wait = WAITING, max(self.interval, _LOST_AGAIN)
            case _:
                self.status = NEW
        self.lost = outcome == "lost"
        self.due, self.due_ms = when + wait, entry["when"] + wait * 1000


def _story(run: Run, life: Life, sights: dict[int, Sight], limits: Limits) -> Iterator[Breach]:
    """Promises 5 and 6: status, tries and retries fit, and each claim came when it was due."""
    document = life.document or {}
    if life.put is None or any("token" not in one for one in document["tries"]):
        return
    due, ack = None, life.ack or {}
    if ack:
        due = max(run.moment(ack["runat"]) or 0.0, ack["at"])
    state = _State(NEW, life.put["retries"], life.put["interval"], due, ack.get("runat"))
    retried = list(life.retries)
    for entry in document["tries"]:
        one = life.attempts[entry["token"]]
        if state.status in _ENDED:
            if not retried and not life.unsure:
                yield Breach(5, "ran after its end", life.job, f"{one.token}: it was over ({state.status})")
                return
            state.retries, state.status = max(state.retries, 1), NEW
            state.due, state.due_ms = (retried.pop(0) if retried else None), None
        if any(at < one.begun - _MS for at in life.cancels) and not life.retries:
            yield Breach(5, "ran after its cancel", life.job, f"{one.token} at {one.begun}")
        if state.due_ms is not None and one.claimed_ms is not None and one.claimed_ms < state.due_ms:
            text = f"{one.token} claimed it {state.due_ms - one.claimed_ms:.0f} ms before it was due"
            yield Breach(6, "early", life.job, text)
        yield from _late(life, state.due, one.claimed, sights, limits)
        state.end(entry, one.when or run.over)
    if state.status in (NEW, WAITING) and document["status"] in (NEW, WAITING) and not life.unsure:
        yield from _late(life, state.due, run.over, sights, limits)
    yield from _as_stored(life, state, retried)


def _as_stored(life: Life, state: _State, retried: list[float]) -> Iterator[Breach]:
    stored = (life.document or {})["status"], (life.document or {})["retries"]
    if state.status in (NEW, WAITING) and life.cancels:
        state.status = CANCELLED
    runnable = {
        NEW: NEW,
        WAITING: NEW,
        WORKING: NEW,
    }  # which of them depends on runat, and a claim has no try yet
    told = runnable.get(state.status, state.status), state.retries
    if (runnable.get(stored[0], stored[0]), stored[1]) != told and not life.unsure and not retried:
        text = f"stored are status and retries {stored}, the tries tell {(state.status, state.retries)}"
        yield Breach(5, "status and tries differ", life.job, text)


def _late(
    life: Life, due: float | None, claimed: float | None, sights: dict[int, Sight], limits: Limits
) -> Iterator[Breach]:
    """Promise 6: nobody with a free slot let it wait; who claims others meanwhile is at work."""
    if due is None or claimed is None or claimed <= due:
        return
    bounds = (("late", limits.live), ("late for the fallback", limits.interval + limits.back))
    for name, bound in bounds:
        if claimed - due <= bound:
            continue
        for sight in sights.values():
            waited = longest(sight.awake if name == "late" else sight.idle, due, claimed)
            if waited > bound:
                text = (
                    f"due at {due}, claimed at {claimed}; {sight.process.runner} was idle for {waited:.2f} s"
                )
                yield Breach(6, name, life.job, text)
                return
