"""Runners as processes of their own: started as fresh interpreters, read line by line, never outliving this one.

:class:`RunnerProcess` is the parent's end, :class:`Parent` the child's.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import IO, Any, cast

from streamjobs import events
from streamjobs.clock import boot
from streamjobs.embedded import die_with_parent
from streamjobs.errors import BadArgument

_LAST = 1.0  # seconds that a dead process's last words get: what it started may hold its pipes open for ever
_KILLED = 5.0
#: What a process reports: its runner has started; it has done as many jobs as it was told to.
STARTED, JOBS = "started", "jobs"


@contextmanager
def caught(numbers: Sequence[signal.Signals], note: Callable[[int], None]) -> Generator[None]:
    """Have ``note(number)`` called at these signals, in a thread, for as long as the context is open.

    For a main thread that waits without end: Python would call a handler there, once the wait is over, and a
    signal that came just before the wait or was given to another thread does not end it.
    """

    def quiet(_number: int, _frame: Any) -> None:
        """The number is read from the socket."""

    def read() -> None:
        while got := ours.recv(64):
            for number in got:
                if number in numbers:  # others that Python has handlers for are told too
                    note(number)

    ours, pythons = socket.socketpair()
    with ours:
        with pythons:
            pythons.setblocking(False)
            thread = threading.Thread(target=read, name="signals", daemon=True)
            thread.start()
            earlier = signal.set_wakeup_fd(pythons.fileno(), warn_on_full_buffer=False)
            before = {number: signal.signal(number, quiet) for number in numbers}
            try:
                yield
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)
                signal.set_wakeup_fd(earlier)
        thread.join()


@dataclass(frozen=True, slots=True)
class Hooks:
    """What is called as a process goes on, in threads.

    Attributes:
        line: with each whole line of its stderr.
        ended: with it, once it has ended and its lines have been read.
        told: with it and each word that it reports: ``STARTED``, ``JOBS``.

    """

    line: Callable[[bytes], None]
    ended: Callable[[RunnerProcess], None]
    told: Callable[[RunnerProcess, str], None] = lambda _process, _word: None


class RunnerProcess:
    """A ``streamjobs run`` in a process.

    To be made in the main thread: the kernel ends the process with the thread that started it.

    Args:
        name: the runner's name.
        target: its MODULE:NAME.
        options: more options of ``run``.
        environment: what to set; URIs, for instance, since others may read a command line.
        hooks: what to call.
        jobs: after how many jobs it reports ``JOBS``; 0 is never.
        output: its stdout; None is this process's.

    Raises:
        OSError: it could not be started.

    """

    def __init__(
        self, name: str, target: str, options: Sequence[str], environment: Mapping[str, str], hooks: Hooks, *,
        jobs: int = 0, output: int | None = None,
    ) -> None:  # fmt: skip
        self.name = name
        self._hooks = hooks
        reports, tell = os.pipe()
        try:
            self._process = subprocess.Popen(  # noqa: S603 - our own command line
                [
                    sys.executable, "-m", "streamjobs", "run", target, *options, "--name", name,
                    "--parent", f"{os.getpid()}:{tell}:{jobs}",
                ],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.PIPE,
                env={**os.environ, **environment},
                pass_fds=[tell],
                start_new_session=True,  # ctrl+C is for the parent, who hands it on
            )  # fmt: skip
        except BaseException:
            os.close(reports)
            raise
        finally:
            os.close(tell)
        self._readers = [
            self._thread("lines of", self._read),
            self._thread("reports of", self._hear, os.fdopen(reports, "rb")),
        ]
        self._watcher = self._thread("watch of", self._watch)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def code(self) -> int | None:
        """Its exit code once it has ended; minus the signal's number if one ended it."""
        return self._process.returncode

    def terminate(self) -> None:
        """Ask it to stop; again: at once; a third time: end."""
        self._process.terminate()

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()

    def wait(self, seconds: float) -> int:
        """Its exit code, once it has ended; it is killed if that takes too long."""
        self._watcher.join(seconds)
        if self.code is None:
            self.kill()
            self._watcher.join(_KILLED)
        return -signal.SIGKILL if self.code is None else self.code

    def describe_end(self) -> str:
        """How it ended, for a sentence that begins with its name."""
        return describe_end(self.wait(_KILLED))

    def _thread(self, what: str, work: Callable[..., None], *args: Any) -> threading.Thread:
        thread = threading.Thread(target=work, args=args, name=f"{what} {self.name}", daemon=True)
        thread.start()
        return thread

    def _read(self) -> None:
        with cast("IO[bytes]", self._process.stderr) as lines:
            for line in lines:
                self._hooks.line(line if line.endswith(b"\n") else line + b"\n")

    def _hear(self, reports: IO[bytes]) -> None:
        with reports:
            for word in reports:
                self._hooks.told(self, word.decode().strip())

    def _watch(self) -> None:
        self._process.wait()  # not the end of its pipes: what it has forked keeps them open
        until = boot() + _LAST
        for reader in self._readers:
            reader.join(max(0.0, until - boot()))
        self._hooks.ended(self)


def describe_end(code: int) -> str:
    """An exit code in words."""
    if code >= 0:
        return f"ended with code {code}"
    with suppress(ValueError):
        return f"was killed by {signal.Signals(-code).name}"
    return f"was killed by signal {-code}"  # real-time signals have no name


@dataclass(slots=True)
class Parent:
    """Who started this process, as the option ``--parent`` says it.

    Attributes:
        pid: its process id.
        pipe: file descriptor of the pipe to report to.
        jobs: after how many to report ``JOBS``; 0 is never.

    """

    pid: int
    pipe: int
    jobs: int
    _done: int = field(default=0, init=False)

    @classmethod
    def parse(cls, text: str) -> Parent:
        """The option's value, ``PID:PIPE:JOBS``."""
        try:
            pid, pipe, jobs = (int(part) for part in text.split(":"))
        except ValueError:
            raise BadArgument("--parent", text, "leave it out: it is for streamjobs itself") from None
        return cls(pid, pipe, jobs)

    def bind(self) -> None:
        """End with the parent, however it ends; what this process starts gets no hold of the pipe."""
        os.set_inheritable(self.pipe, False)
        os.register_at_fork(after_in_child=self._let_go)
        if sys.platform == "linux":
            die_with_parent()
        if os.getppid() != self.pid:  # it has ended before that was settled
            os._exit(1)

    @contextmanager
    def informed(self) -> Generator[None]:
        """Report to it for as long as the context is open."""
        with events.subscribe(self._listen, level="info"):
            yield

    def _listen(self, name: str, _level: str, _fields: dict[str, Any]) -> None:
        if name == "runner.started":
            self._report(STARTED)
        elif name == "try":
            self._done += 1
            if self._done == self.jobs:
                self._report(JOBS)

    def _let_go(self) -> None:
        with suppress(OSError):
            os.close(self.pipe)

    def _report(self, word: str) -> None:
        with suppress(OSError):
            os.write(self.pipe, word.encode() + b"\n")
