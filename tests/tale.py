"""Histories made by hand, for the tests of the checker."""

from __future__ import annotations

from typing import Any

from tests.history import Run
from tests.promises import check
from tests.sight import Limits

LIMITS = Limits(lease=3.0, beat=0.5, margin=0.5, interval=3.0, slots=2)
A, B, C, D = 101, 102, 103, 104


class Tale:
    """A history, told by hand; the server's clock is the history's."""

    def __init__(self, *pids: int) -> None:
        self.records: list[dict[str, Any]] = []
        self.tries: dict[str, list[dict[str, Any]]] = {}
        self.put_about: dict[str, dict[str, Any]] = {}
        self.tell("clock", 0.0, server=0.0, trip=0.001)
        for pid in pids or (A, B):
            self.event("runner.started", 0.0, pid)

    def tell(self, what: str, at: float, **fields: Any) -> None:
        self.records.append({"what": what, "at": at, **fields})

    def event(self, name: str, at: float, pid: int, **fields: Any) -> None:
        self.tell("event", at, event=name, pid=pid, runner=f"r{pid}", owner=owner(pid), **fields)

    def put(
        self, job: str = "j", at: float = 5.0, *, retries: int = 3, interval: float = 0.0, n: int = 1
    ) -> None:
        self.put_about[job] = {"retries": retries, "n": n}
        self.tell("put", at - 0.01, job=job, kind="many", retries=retries, interval=interval, n=n)
        self.tell("ack", at, job=job, runat=None)

    def run(
        self, token: str, pid: int, since: float, until: float | None, *, job: str = "j", sort: str = "async", number: int = 1
    ) -> None:  # fmt: skip
        """A claim, and its handler's start and end."""
        self.tell("held", since, job=job, token=token, owner=owner(pid), claimed=since * 1000)
        about = {"job": job, "token": token, "owner": owner(pid), "pid": pid, "runner": f"r{pid}"}
        self.tell("start", since + 0.01, **about, number=number, sort=sort)
        if until is not None:
            self.tell("end", until, **about, number=number, sort=sort, how="returned")

    def ended(
        self, token: str, since: float, when: float, outcome: str = "success", *, job: str = "j", **more: Any
    ) -> None:
        """Its try, as stored, and its write on the stream."""
        self.tell("freed", when, job=job)
        entry = {"runner": "r", "token": token, "claimed": since * 1000, "when": when * 1000, **more}
        if outcome not in ("success", "failure"):
            entry["outcome"] = outcome
        if outcome != "success":
            entry.setdefault("err", outcome)
        self.tries.setdefault(job, []).append(entry)

    def stored(
        self, status: int = 4, retries: int = 3, *, job: str = "j", at: float = 60.0, **more: Any
    ) -> None:
        n = self.put_about.get(job, {}).get("n")
        tries = self.tries.get(job, [])
        self.tell(
            "document",
            at,
            **{"job": job, "status": status, "retries": retries, "tries": tries, "n": n, **more},
        )

    def judge(self, **limits: Any) -> list[tuple[int, str]]:
        self.verdict = check(Run(self.records), Limits(**{**vars_of(LIMITS), **limits}))
        return [(one.promise, one.name) for one in self.verdict.breaches]


def owner(pid: int) -> str:
    return f"host:{pid}:0a0b0c"


def vars_of(limits: Limits) -> dict[str, Any]:
    return {name: getattr(limits, name) for name in Limits.__dataclass_fields__}


def lost_and_again(*, until: float = 9.0, again: float = 10.0, sort: str = "async") -> Tale:
    """A's try is lost at 9.9 after trouble with its lease; B runs it again."""
    tale = Tale()
    tale.put()
    tale.run("a", A, 5.1, until, sort=sort)
    tale.event("lease.untrusted", 9.0, A)
    tale.event("lease.registered", 9.95, A)
    tale.ended("a", 5.1, 9.9, "lost")
    tale.run("b", B, again, again + 1, number=2)
    tale.ended("b", again, again + 1)
    tale.stored(retries=2)
    return tale
