"""The history of a run, on one clock, and the model that is made of it; ``promises.py`` judges it.

A history is a file of JSON lines that several processes append to. Each record has ``what`` and ``at``, seconds of
the boot clock, which all processes of a machine share. By whom, and what else:

==========  =============  ==========================================================================
what        written by     fields
==========  =============  ==========================================================================
put         the producer   job, kind, retries, interval (s), n (fresh for each job), before it is sent
ack         the producer   job, runat (ms on the server's clock, absent if as soon as possible)
refused     the producer   job, error: the library refused to put a job again
cancel      an operator    job, after the acknowledgement
retry       an operator    job, since: when it was asked for; after the acknowledgement
unsure      an operator    job: a cancel or retry had no answer
start, end  a handler      job, token, owner, pid, runner, number, sort; end also how
event       the runner     event, pid and the event's own fields
lag         the runner     pid, seconds: its loop got no turn for so long, until now
weak        a client       command, pid: it was written without a majority
held        the stream     job, token, owner, claimed (ms): a claim, in the order in which the collection's
                           stream tells it; freed: the lease was removed; gap: events may be missing
document    the end        job and what is stored of it (dates in ms); n of its data
garbage     the end        job, kept: whether a document that can't be a job is as it was
death       the driver     pid: killed
term, exit  the driver     pid: told to stop; ended, with its code
freeze      the driver     pid; thaw ends it
fault       the driver     id, sort, on (server, fleet, producers or a runner's name); healed ends it
stall       the driver     seconds: the machine or the server kept the driver waiting for so long, until now
clock       the driver     server (ms): the server's date at this moment, by a round trip of ``trip`` seconds
dropped     the driver     the collection was dropped: what was put before is nobody's
over        the driver     the run ended
==========  =============  ==========================================================================
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streamjobs.clock import boot
from tests.windows import FOREVER, Window, merged

Record = dict[str, Any]


class Log:
    """Appends records; each is one write, so that a kill -9 loses nothing that was noted before it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600)

    def note(self, what: str, **fields: Any) -> None:
        line = json.dumps({"what": what, "at": boot(), **fields}, default=str)
        os.write(self._file, line.encode() + b"\n")

    def close(self) -> None:
        os.close(self._file)


def read(path: Path) -> list[Record]:
    """All records of a file, by time."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return sorted(records, key=lambda record: record["at"])


@dataclass(slots=True)
class Attempt:
    """One claim of a job, as far as anyone saw it. ``entries`` are the tries that name its token."""

    token: str
    pid: int = 0
    owner: str = ""
    runner: str = ""
    sort: str = "async"
    number: int = 0
    starts: list[float] = field(default_factory=list)
    end: float | None = None
    how: str | None = None
    claimed: float | None = None
    when: float | None = None
    claimed_ms: float | None = None
    told: list[str] = field(default_factory=list)
    entries: list[Record] = field(default_factory=list)

    @property
    def outcome(self) -> str | None:
        """How its try says that it ended; None if there is no try."""
        return outcome_of(self.entries[0]) if self.entries else None

    @property
    def when_ms(self) -> float:
        """The server's date of its end."""
        return self.entries[0]["when"] if self.entries else FOREVER

    @property
    def begun(self) -> float:
        """When it held the job at the latest."""
        known = [one for one in (self.claimed, *self.starts) if one is not None]
        return min(known, default=FOREVER)


@dataclass(slots=True)
class Life:
    """One job: what was asked, what was done, what is stored."""

    job: str
    put: Record | None = None
    ack: Record | None = None
    document: Record | None = None
    refused: list[Record] = field(default_factory=list)
    cancels: list[float] = field(default_factory=list)
    retries: list[Window] = field(default_factory=list)  # from asking until the answer
    unsure: bool = False
    told: list[Record] = field(default_factory=list)
    attempts: dict[str, Attempt] = field(default_factory=dict)

    def attempt(self, token: str, claimed_ms: float | None = None) -> Attempt:
        """The claim with this token; a request that was sent twice may claim twice, at two dates."""
        while True:
            one = self.attempts.setdefault(token, Attempt(token))
            if claimed_ms is None or one.claimed_ms in (None, claimed_ms):
                return one
            token += " again"

    @property
    def ordered(self) -> list[Attempt]:
        return sorted(self.attempts.values(), key=lambda one: one.begun)


@dataclass(slots=True)
class Process:
    """A runner process.

    Windows: ``frozen``; ``lagged``, while its loop got no turn; ``doubted``, while it could not renew; ``deaf``, while its
    stream was not live.
    """

    pid: int
    runner: str = ""
    born: float = FOREVER
    died: float | None = None
    left: float | None = None
    gone: float | None = None
    asked: bool = False
    frozen: list[Window] = field(default_factory=list)
    lagged: list[Window] = field(default_factory=list)
    doubted: list[Window] = field(default_factory=list)
    deaf: list[Window] = field(default_factory=list)
    troubles: list[float] = field(default_factory=list)

    @property
    def until(self) -> float:
        """Until when it may have claimed."""
        return min(one for one in (self.died, self.left, self.gone, FOREVER) if one is not None)


class Run:
    """A history, in order: jobs with their attempts, processes, and when what was broken."""

    def __init__(self, records: Iterable[Record]) -> None:
        self.records = sorted(records, key=lambda record: record["at"])
        self.jobs: dict[str, Life] = {}
        self.processes: dict[int, Process] = {}
        self.faults: list[tuple[Window, str, str]] = []
        self.stalls: list[Window] = []
        self.weak = [one for one in self.records if one["what"] == "weak"]
        self.garbage = [one for one in self.records if one["what"] == "garbage"]
        self.gaps = [one["at"] for one in self.records if one["what"] == "gap"]
        self.over = max((one["at"] for one in self.records), default=0.0)
        clocks = [one for one in self.records if one["what"] == "clock"]
        best = min(clocks, key=lambda one: one["trip"], default=None)  # the others are only less exact
        self._offset = 0.0 if best is None else best["at"] - best["server"] / 1000
        self._open: dict[Any, tuple[float, Record]] = {}
        self._numbers: dict[tuple[str, int, str], Attempt] = {}
        for record in self.records:
            reader = getattr(self, f"_{record['what']}", None)
            if reader is not None:
                reader(record)
        self._close_windows()

    def moment(self, server_ms: float | None) -> float | None:
        """A date of the server on the clock of the history."""
        return None if server_ms is None else self._offset + server_ms / 1000

    def of_job(self, job: str) -> list[Record]:
        """A job's whole history."""
        return [one for one in self.records if one.get("job") == job]

    def _dropped(self, _record: Record) -> None:
        self.jobs.clear()

    def process(self, pid: int) -> Process:
        if pid not in self.processes:
            self.processes[pid] = Process(pid)
        return self.processes[pid]

    def broken(self, *on: str) -> list[Window]:
        """When any fault was on one of these."""
        return merged(window for window, _, where in self.faults if where in on)

    def _life(self, record: Record) -> Life:
        job = record["job"]
        if job not in self.jobs:
            self.jobs[job] = Life(job)
        return self.jobs[job]

    def _put(self, record: Record) -> None:
        self._life(record).put = record

    def _ack(self, record: Record) -> None:
        life = self._life(record)
        life.ack = life.ack or record

    def _refused(self, record: Record) -> None:
        self._life(record).refused.append(record)

    def _cancel(self, record: Record) -> None:
        self._life(record).cancels.append(record["at"])

    def _retry(self, record: Record) -> None:
        self._life(record).retries.append((record["since"], record["at"]))

    def _unsure(self, record: Record) -> None:
        self._life(record).unsure = True

    def _start(self, record: Record) -> None:
        one = self._life(record).attempt(record["token"])
        one.pid, one.owner, one.runner = record["pid"], record["owner"], record["runner"]
        one.sort, one.number = record["sort"], record["number"]
        one.starts.append(record["at"])
        self._numbers[record["job"], one.number, one.owner] = one

    def _end(self, record: Record) -> None:
        one = self._life(record).attempt(record["token"])
        one.end, one.how = record["at"], record["how"]

    def _freed(self, record: Record) -> None:
        self._life(record).told.append(record)

    def _held(self, record: Record) -> None:
        self._life(record).told.append(record)
        one = self._life(record).attempt(record["token"], record["claimed"])
        one.owner = record["owner"]
        one.pid = one.pid or pid_of(one.owner)
        self._dated(one, record["claimed"])

    def _document(self, record: Record) -> None:
        life = self._life(record)
        life.document = record
        for entry in record["tries"]:
            if "token" in entry:
                one = life.attempt(entry["token"], entry.get("claimed"))
                entry["attempt"] = one.token
                one.entries.append(entry)
                one.when = one.when or self.moment(entry["when"])
                self._dated(one, entry.get("claimed"))
        lease = record.get("lease")
        if lease:
            one = life.attempt(lease["token"], lease["claimed"])
            one.owner = lease["owner"]
            one.pid = one.pid or pid_of(one.owner)
            self._dated(one, lease["claimed"])

    def _dated(self, one: Attempt, claimed_ms: float | None) -> None:
        if claimed_ms is not None:
            one.claimed_ms, one.claimed = claimed_ms, self.moment(claimed_ms)

    def _event(self, record: Record) -> None:
        process, name = self.process(record["pid"]), record["event"]
        key = (name.split(".")[0], record["pid"])
        if name == "runner.started":
            process.born, process.runner = record["at"], record["runner"]
        elif name in ("runner.stopping", "runner.failed"):
            process.left = min(process.left or FOREVER, record["at"])
        elif name in ("lease.late", "lease.untrusted", "lease.lost"):
            if name != "lease.lost":
                process.troubles.append(record["at"])
            self._open.setdefault(key, (record["at"], record))
        elif name in ("lease.renewed", "lease.registered") and key in self._open:
            process.doubted.append((self._open.pop(key)[0], record["at"]))
        elif name == "stream.state" and record["state"] != "live":
            self._open.setdefault(key, (record["at"], record))
        elif name == "stream.state" and key in self._open:
            process.deaf.append((self._open.pop(key)[0], record["at"]))
        elif name == "try":
            one = self._numbers.get((record["job"], record["number"], record["owner"]))
            if one is not None:
                one.told.append(record["outcome"])

    def _death(self, record: Record) -> None:
        self.process(record["pid"]).died = record["at"]

    def _term(self, record: Record) -> None:
        process = self.process(record["pid"])
        process.asked = True
        process.left = min(process.left or FOREVER, record["at"])

    def _exit(self, record: Record) -> None:
        self.process(record["pid"]).gone = record["at"]

    def _freeze(self, record: Record) -> None:
        self._open["freeze", record["pid"]] = (record["at"], record)

    def _thaw(self, record: Record) -> None:
        since, _ = self._open.pop(("freeze", record["pid"]))
        self.process(record["pid"]).frozen.append((since, record["at"]))

    def _lag(self, record: Record) -> None:
        window = (record["at"] - record["seconds"], record["at"])
        self.process(record["pid"]).lagged.append(window)

    def _fault(self, record: Record) -> None:
        self._open["fault", record["id"]] = (record["at"], record)

    def _healed(self, record: Record) -> None:
        since, fault = self._open.pop(("fault", record["id"]))
        self.faults.append(((since, record["at"]), fault["sort"], fault["on"]))

    def _stall(self, record: Record) -> None:
        self.stalls.append((record["at"] - record["seconds"], record["at"]))

    def _close_windows(self) -> None:
        """What had not ended when the run did lasts for ever."""
        for (sort, key), (since, record) in self._open.items():
            window = (since, FOREVER)
            if sort == "fault":
                self.faults.append((window, record["sort"], record["on"]))
            else:
                process = self.process(key)
                {"freeze": process.frozen, "lease": process.doubted, "stream": process.deaf}[sort].append(
                    window
                )
        self.stalls = merged(self.stalls)
        for process in self.processes.values():
            process.frozen, process.doubted = merged(process.frozen), merged(process.doubted)
            process.deaf = merged(process.deaf)


def outcome_of(entry: Record) -> str:
    """How a try ended."""
    return entry.get("outcome") or ("success" if entry.get("err") is None else "failure")


def pid_of(owner: str) -> int:
    """The process that an owner's id names."""
    parts = owner.rsplit(":", 2)
    return int(parts[1]) if len(parts) == 3 and parts[1].isdigit() else 0
