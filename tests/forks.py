"""Processes of the tests that begin where all is imported: each would take half a second of a core for it."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import sys
from collections.abc import Callable
from functools import cache
from multiprocessing.connection import Connection
from typing import Any

from streamjobs.embedded import die_with_parent

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["streamjobs.cli", "tests.worker"])


@cache
def ready() -> None:
    """Wait, the first time, until the process that they come from has imported all."""
    first = FORKS.Process(target=_nothing)
    first.start()
    first.join()


def _nothing() -> None:
    pass


class Fork:
    """A process that calls a function, with its stderr as a stream to read.

    It has nothing of this process: it comes from one that has imported the code and done nothing else. It ends with
    this process at the latest.
    """

    def __init__(self, function: Callable[..., None], *args: Any) -> None:
        read, write = FORKS.Pipe(duplex=False)
        with write:
            self._process = FORKS.Process(target=_begin, args=(write, function, args), daemon=True)
            self._process.start()
        self._read = read
        self.pid: int = self._process.pid or 0

    async def lines(self) -> asyncio.StreamReader:
        """What it writes to stderr."""
        reader = asyncio.StreamReader(limit=2**24)
        with self._read:
            pipe = os.fdopen(os.dup(self._read.fileno()), "rb")
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), pipe)
        return reader

    @property
    def running(self) -> bool:
        return self._process.exitcode is None

    async def wait(self) -> int:
        """Wait for its end; its exit code, below zero where a signal ended it."""
        if self.running:
            loop, ended = asyncio.get_running_loop(), asyncio.Event()
            handle = os.dup(self._process.sentinel)  # others may wait as well
            loop.add_reader(handle, ended.set)
            try:
                await ended.wait()
            finally:
                loop.remove_reader(handle)
                os.close(handle)
            self._process.join()
        code = self._process.exitcode
        assert code is not None
        return code

    def send_signal(self, number: int) -> None:
        if self.running:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()


def _begin(write: Connection, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    if sys.platform == "linux":
        die_with_parent()
    with write:
        os.dup2(write.fileno(), 2)
    function(*args)
