"""A server for the demo, for ``streamjobs dev`` and for tests; nothing else ever starts one.

In this order: a ``mongod`` on PATH (as a replica set of one member), a ``secantusd-rs`` on PATH, then SecantusDB's
``secantusd-py`` from the ``embedded`` extra. Each runs as a process of its own and ends with this one.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pymongo import MongoClient
from pymongo.errors import OperationFailure, PyMongoError

from streamjobs.errors import ConfigError, ConnectError, shown

_START = 30.0  # seconds that a server gets to answer
_STOP = 10.0
_PR_SET_PDEATHSIG = 1
#: Overrides the order above: mongod, rust or python.
CHOICE = "STREAMJOBS_SERVER"


@dataclass(frozen=True, slots=True)
class Program:
    """A server program: its sort (mongod, rust, python) and path."""

    sort: str
    path: str


def find(sort: str | None = None) -> Program:
    """The program to start.

    Args:
        sort: mongod, rust or python; where left out, what ``STREAMJOBS_SERVER`` says, or the first that is there.

    Raises:
        ConfigError: there is none; the message says what to install.

    """
    wanted = sort or os.environ.get(CHOICE)
    beside = Path(sys.executable).parent / "secantusd-py"
    python = str(beside) if beside.exists() else shutil.which("secantusd-py")
    programs = {"mongod": shutil.which("mongod"), "rust": shutil.which("secantusd-rs"), "python": python}
    if wanted is not None and wanted not in programs:
        raise ConfigError(f"{CHOICE}={shown(wanted)}: give one of {', '.join(programs)}")
    for name, path in programs.items():
        if path is not None and wanted in (None, name):
            return Program(name, path)
    raise ConfigError(
        f"no server program {'' if wanted is None else repr(wanted) + ' '}was found: install the embedded one with "
        "pip install 'streamjobs[embedded]' (Python 3.11 to 3.13), put a mongod on PATH, or give --uri"
    )


class Server:
    """A server process on a folder.

    Args:
        folder: where its data is; made if missing, kept when it stops.
        sort: as :func:`find`'s.
        port: its port, by default a free one.
        options: more options for the program.
        test_commands: whether ``configureFailPoint`` and the like are allowed.

    """

    def __init__(
        self,
        folder: Path,
        *,
        sort: str | None = None,
        port: int | None = None,
        options: Sequence[str] = (),
        test_commands: bool = False,
    ) -> None:
        self.program = find(sort)
        self.folder = folder
        self.port = port or free_port()
        self._options = list(options)
        self._test_commands = test_commands
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        """Its address."""
        name = "?replicaSet=rs0&directConnection=false" if self.program.sort == "mongod" else ""
        return f"mongodb://127.0.0.1:{self.port}/{name}"

    @property
    def pid(self) -> int | None:
        """Its process id while it runs."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start it and wait until it answers."""
        self.folder.mkdir(parents=True, exist_ok=True)
        log = self.folder / "server.log"
        with log.open("ab") as output:
            # the program's folder is its working directory, so that no configuration lying about is read
            self._process = subprocess.Popen(  # noqa: S603 - our own command line
                self._command(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=self.folder,
                start_new_session=True,  # ctrl+C is for us; we stop it in order
                preexec_fn=die_with_parent if sys.platform == "linux" else None,  # noqa: PLW1509
            )
        try:
            self._wait()
        except BaseException:
            self.kill()
            raise

    def stop(self) -> None:
        """Stop it in order."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(_STOP)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def kill(self) -> None:
        """Kill it at once, as a loss of power would."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()

    def pause(self) -> None:
        """Freeze it: connections stay open and nothing is answered."""
        if self._process is not None:
            self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Undo :meth:`pause`."""
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)

    def _command(self) -> list[str]:
        data = str(self.folder / "data")
        if self.program.sort == "mongod":
            Path(data).mkdir(exist_ok=True)
            extra = ["--setParameter", "enableTestCommands=1"] if self._test_commands else []
            where = ["--dbpath", data, "--bind_ip", "127.0.0.1", "--port", str(self.port)]
            return [self.program.path, "--replSet", "rs0", *where, *extra, *self._options]
        extra = ["--enable-test-commands"] if self._test_commands else []
        where = ["--host", "127.0.0.1", "--port", str(self.port), "--storage-path", data]
        return [self.program.path, *where, *extra, *self._options]

    def _wait(self) -> None:
        """Until it is a primary that answers."""
        deadline = time.monotonic() + _START
        client: MongoClient[dict[str, object]] = MongoClient(
            "127.0.0.1", self.port, directConnection=True, serverSelectionTimeoutMS=200, connectTimeoutMS=1000
        )
        try:
            while time.monotonic() < deadline:
                if self._process is None or self._process.poll() is not None:
                    break
                with suppress(PyMongoError):
                    hello = client.admin.command("hello")
                    if hello.get("isWritablePrimary"):
                        return
                    if self.program.sort == "mongod" and not hello.get("setName"):
                        self._initiate(client)
                time.sleep(0.02)
        finally:
            client.close()
        tail = (self.folder / "server.log").read_text(errors="replace")[-2000:]
        raise ConnectError(
            f"{self.program.path} did not answer on port {self.port} within {_START:.0f} s:\n{tail}"
        )

    def _initiate(self, client: MongoClient[dict[str, object]]) -> None:
        members = [{"_id": 0, "host": f"127.0.0.1:{self.port}"}]
        with suppress(OperationFailure):  # it may have been initiated meanwhile
            client.admin.command("replSetInitiate", {"_id": "rs0", "members": members})


@contextmanager
def temporary() -> Generator[Server, None, None]:
    """A server in a temporary folder; neither is left behind."""
    with tempfile.TemporaryDirectory(prefix="streamjobs-", ignore_cleanup_errors=True) as folder:
        server = Server(Path(folder))
        server.start()
        try:
            yield server
        finally:
            server.kill()  # its data goes with the folder: no need for an orderly stop


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def die_with_parent() -> None:
    """Called in a child before its program starts: it is killed when this process ends, however that happens."""
    # a server that outlives a killed test run keeps its port and folder
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
