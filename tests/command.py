"""The command line's commands as processes, for the tests."""

import json
import os
import queue
import re
import select
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from bson import json_util

from streamjobs.cli import main
from tests.forks import FORKS

LONG = 60.0
APP = """
import asyncio, threading
from streamjobs import Queue
jobs = Queue("mongodb://user:s3cret@127.0.0.1:1", "app.jobs")
number = 7

@jobs.handler("hello", retries=4, retry_interval=2)
async def hello(job):
    job.log.info("try", name=job.data.get("name"), odd={(1, 2): object()}, outcome="put off", delay="5 min")
    if job.data.get("fail"):
        raise ValueError(job.data["fail"])

@jobs.handler("long", retries=3)
async def long(job):
    job.log.info("begun")
    await asyncio.sleep(1000)

@jobs.handler("stuck", retries=3)
def stuck(job):
    job.log.info("begun")
    threading.Event().wait(1000)
"""


class Running:
    """A command that runs, whose lines are waited for."""

    def __init__(self, *command, stream="stderr", **options):
        self.command = command
        self.process = subprocess.Popen(
            [sys.executable, "-m", "streamjobs", *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            **options,
        )
        self.out, self.err, self.seen = [], [], []
        self._lines = queue.SimpleQueue()
        self._readers = [
            threading.Thread(
                target=self._read, args=(self.process.stdout, self.out, stream == "stdout"), daemon=True
            ),
            threading.Thread(
                target=self._read, args=(self.process.stderr, self.err, stream == "stderr"), daemon=True
            ),
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, source, kept, watched):
        with source:
            for line in source:
                kept.append(line.rstrip("\n"))
                if watched:
                    self._lines.put(line.rstrip("\n"))
        if watched:
            self._lines.put(None)

    def until(self, pattern):
        """Wait for a line; its match."""
        while (line := self._lines.get(timeout=LONG)) is not None:
            if found := re.search(pattern, line):
                return found
        raise AssertionError(f"ended without {pattern!r}: {self.out + self.err}")

    def event(self, name):
        """Wait for an event."""
        return json.loads(self.until(rf'"event": "{re.escape(name)}"').string)

    def events(self, name, count=1, **match):
        """Wait until there were so many such events, in whatever order with others; all of them."""

        def fits(event):
            return event["event"] == name and all(event.get(key) == value for key, value in match.items())

        found = [event for event in self.seen if fits(event)]
        while len(found) < count:
            line = self._lines.get(timeout=LONG)
            assert line is not None, f"ended without {count} x {name} {match}: {self.out + self.err}"
            if line.startswith("{"):
                self.seen.append(json.loads(line))
                found += self.seen[-1:] if fits(self.seen[-1]) else []
        return found

    def signal(self, number):
        self.process.send_signal(number)

    def wait(self):
        code = self.process.wait(LONG)
        for reader in self._readers:
            reader.join(LONG)
        return code

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.wait()


def processes(text):
    """Ids of processes that were started with a text in their environment or command line."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            told = (folder / "environ").read_bytes() + (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if text.encode() in told and int(folder.name) != os.getpid():
            found.append(int(folder.name))
    return found


def wait_gone(pid):
    """Wait for the end of a process that is no child."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([handle], [], [], LONG)[0], f"process {pid} is still there"
    finally:
        os.close(handle)


def _complete(command, folder, env, stdin):
    """Run a command in a process of its own, to its end."""
    with tempfile.TemporaryDirectory() as name:
        given, out, err = files = [Path(name) / each for each in ("in", "out", "err")]
        given.write_text(stdin)
        process = FORKS.Process(target=_become, args=(list(command), folder, env, files), daemon=True)
        process.start()
        process.join(LONG)
        code = process.exitcode
        if code is None:
            process.kill()
            process.join()
        process.close()
        told = [one.read_text() for one in (out, err)]
    assert code is not None, (command, *told)
    return subprocess.CompletedProcess(command, code, *told)


def _become(command, folder, env, files):
    """Be ``streamjobs`` in this process."""
    for number, path in enumerate(files):
        os.dup2(os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT), number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = ["streamjobs", *command]
    sys.stdin, sys.stdout, sys.stderr = (
        os.fdopen(number, "r" if number == 0 else "w") for number in range(3)
    )
    main()


class Place:
    """Runs commands in a folder that has app.py, on a test's collection."""

    def __init__(self, folder, uri, collection):
        self.folder = folder
        (folder / "app.py").write_text(APP)
        self._place = {"uri": uri, "collection": collection}
        self._opened = []

    def call(self, *command, place=True, env=None, stdin="", code=0):
        """Run a command to its end, which must be with this exit code."""
        settings = (
            {f"STREAMJOBS_{name.upper()}": value for name, value in self._place.items()} if place else {}
        )
        kept = {key: value for key, value in os.environ.items() if key != "COLUMNS"}
        done = _complete(command, self.folder, {**kept, **settings, **(env or {})}, stdin)
        assert done.returncode == code, (command, done.returncode, done.stdout, done.stderr)
        assert "Traceback (most recent call last)" not in done.stderr
        return done

    def put(self, *command):
        """Put a job; its document."""
        return json_util.loads(self.call("put", *command, "--json").stdout)

    @property
    def where(self):
        """The options that name its collection."""
        return [word for name, value in self._place.items() for word in (f"--{name}", value)]

    def run(self, *options, target="app:jobs"):
        """Start a runner; it ends with this place."""
        one = Running("run", target, *self.where, *options, cwd=self.folder)
        self._opened.append(one)
        return one

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for one in self._opened:
            one.__exit__()
