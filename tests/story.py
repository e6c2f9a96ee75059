"""A job as its tries tell it, one after the other: status and retries fit, and each claim came when it was due."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tests.history import Life, Record, Run, outcome_of
from tests.sight import MS, Breach, Limits, Sight
from tests.windows import Window, longest

NEW, WORKING, WAITING, SUCCESS, FAILED, CANCELLED = range(1, 7)
ENDED = (SUCCESS, FAILED, CANCELLED)
LOST_AGAIN = 1.0  # seconds that a job waits at least when it was lost twice in a row


@dataclass(slots=True)
class State:
    """A job as its tries tell, one after the other."""

    status: int
    retries: int
    interval: float
    due: float | None
    runat_ms: float | None  # before which, by the server's clock, it may not be claimed
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
                self.status, wait = WAITING, max(self.interval, LOST_AGAIN)
            case _:
                self.status = NEW
        self.lost = outcome == "lost"
        self.due, self.runat_ms = when + wait, (entry["when"] + wait * 1000 if wait else None)


def story(run: Run, life: Life, sights: dict[int, Sight], limits: Limits) -> Iterator[Breach]:
    """Promises 5 and 6: status, tries and retries fit, and each claim came when it was due."""
    document = life.document or {}
    if life.put is None or any("token" not in one for one in document["tries"]):
        return
    due, ack = None, life.ack or {}
    if ack:
        due = max(run.moment(ack["runat"]) or 0.0, ack["at"])
    state = State(NEW, life.put["retries"], life.put["interval"], due, ack.get("runat"))
    retried, over = set(life.retries), 0.0
    for entry in document["tries"]:
        one = life.attempts[entry["attempt"]]
        if state.status in ENDED:
            # more than one try may come of a retry that was sent again: a server may not know it for the same
            again = next(
                (two for two in life.retries if two[0] <= one.begun + MS and over - MS <= two[1]), None
            )
            if again is None and not life.unsure:
                yield Breach(5, "ran after its end", life.job, f"{one.token}: it was over ({state.status})")
                return
            state.retries, state.status = max(state.retries, 1), NEW
            state.due, state.runat_ms = None, None
            if again is not None:
                retried.discard(again)
                state.due = again[1]
        if any(at < one.begun - MS for at in life.cancels) and not life.retries:
            yield Breach(5, "ran after its cancel", life.job, f"{one.token} at {one.begun}")
        if state.runat_ms is not None and one.claimed_ms is not None and one.claimed_ms < state.runat_ms:
            text = f"{one.token} claimed it {state.runat_ms - one.claimed_ms:.0f} ms before it was due"
            yield Breach(6, "early", life.job, text)
        yield from _late(life, state.due, one.claimed, sights, limits)
        over = one.when or run.over
        state.end(entry, over)
    if state.status in (NEW, WAITING) and document["status"] in (NEW, WAITING) and not life.unsure:
        yield from _late(life, state.due, run.over, sights, limits)
    yield from _as_stored(life, state, retried)


def _as_stored(life: Life, state: State, retried: set[Window]) -> Iterator[Breach]:
    stored = (life.document or {})["status"], (life.document or {})["retries"]
    if state.status in (NEW, WAITING) and life.cancels:
        state.status = CANCELLED
    # new or waiting depends on runat, and a claim that goes on has no try yet
    runnable = {NEW: NEW, WAITING: NEW, WORKING: NEW}
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
