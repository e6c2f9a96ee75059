"""Runners as processes of their own, whose events are read as they come, and which never outlive this one."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

from streamjobs.embedded import die_with_parent
from streamjobs.errors import StreamJobsError

_STOP = 5.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

Event = dict[str, Any]
#: Events of all processes in the order in which they were read; a process's end is an event without a name.
Events = queue.SimpleQueue[Event]


class Interrupted(Exception):  # noqa: N818 - it is nobody's error
    """A signal asked to end; ``number`` says which."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


class Interrupts:
    """SIGINT, SIGTERM and SIGHUP as something to look at, so that they tear nothing that is half done.

    Args:
        events: gets an empty event, to wake who waits there.

    """

    def __init__(self, events: Events) -> None:
        self._events = events
        self._number: int | None = None

    def check(self) -> None:
        """Raise Interrupted once a signal has come."""
        if self._number is not None:
            raise Interrupted(self._number)

    @contextmanager
    def caught(self) -> Generator[None]:
        """Take the signals for as long as the context is open."""

        def note(number: int, _frame: Any) -> None:
            if self._number is None:
                self._number = number
                self._events.put({})

        before = {number: signal.signal(number, note) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class RunnerProcess:
    """A ``streamjobs run`` in a process.

    Args:
        name: the runner's name.
        target: its MODULE:NAME.
        uri: the server, given by the environment: others may read a command line.
        collection: ``database.collection``.
        events: where its events go.

    """

    def __init__(self, name: str, target: str, uri: str, collection: str, events: Events) -> None:
        self.name = name
        self._events = events
        options = ["--collection", collection, "--name", name, "--log", "json", "--stop-deadline", "3"]
        self._process = subprocess.Popen(  # noqa: S603 - our own command line
            [sys.executable, "-m", "streamjobs", "run", target, *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={**os.environ, "STREAMJOBS_URI": uri},
            start_new_session=True,  # ctrl+C is for the parent, who stops it in order
            preexec_fn=die_with_parent if sys.platform == "linux" else None,  # noqa: PLW1509
        )
        self._reader = threading.Thread(target=self._read, name=f"demo reads {name}", daemon=True)
        self._reader.start()

    def terminate(self) -> None:
        """Ask it to stop."""
        self._process.terminate()

    def wait(self) -> int:
        """Its exit code, once it has ended; it is killed if that takes too long."""
        try:
            code = self._process.wait(_STOP)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        self._reader.join(_STOP)
        return code

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()
        self.wait()

    def describe_end(self) -> str:
        """How it ended, for an error."""
        code = self._process.wait(_STOP)
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"

    def _read(self) -> None:
        for line in cast("Any", self._process.stderr):
            self._events.put({"runner": self.name, **_parse(line)})
        self._events.put({"runner": self.name})


def _parse(line: bytes) -> Event:
    text = line.decode("utf-8", "replace").rstrip("\n")
    try:
        event = json.loads(text)
    except ValueError:
        event = None
    if isinstance(event, dict) and "event" in event:
        return cast("Event", event)
    return {"event": "stderr", "level": "error", "message": text}


def take(events: Events, seconds: float, what: str) -> Event:
    """The next event; StreamJobsError if none comes in time."""
    try:
        return events.get(timeout=max(0.0, seconds))
    except queue.Empty:
        raise StreamJobsError(f"{what} took too long") from None
