"""The standard streams of a command: whatever is behind them, what it did is done, and its exit code says so."""

from __future__ import annotations

import errno
import io
import os
import sys
from pathlib import Path
from typing import Any, TextIO, cast


class Output(io.TextIOWrapper):
    """A stream whose reader may be gone, whose disk may be full, whose terminal may know ASCII only.

    Attributes:
        failed: the first error of a write. A disk may have room again; a reader that has gone does not come back.

    """

    failed: OSError | None = None

    def write(self, text: str, /) -> int:
        """Write, as long as that works."""
        if not self._gone:
            try:
                return super().write(text)
            except OSError as error:
                self.failed = self.failed or error
        return len(text)

    def flush(self) -> None:
        """Flush, as long as that works."""
        if not self._gone:
            try:
                super().flush()
            except OSError as error:
                self.failed = self.failed or error

    @property
    def _gone(self) -> bool:
        return self.failed is not None and self.failed.errno == errno.EPIPE


def settle() -> None:
    """Make the standard streams such that no command fails half-way for one of them."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            # closed by whoever started it: the lowest free number, so its own, which a file opened later would get
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115 - until the process ends
    sys.stdout, sys.stderr = _tolerant(sys.stdout), _tolerant(sys.stderr)


def finish(code: int) -> int:
    """Flush; the exit code of a command that ended with ``code``.

    A reader that left has read what it wanted. What could not be written for another reason is told on stderr.
    """
    sys.stdout.flush()
    failed = sys.stdout.failed if isinstance(sys.stdout, Output) else None
    if failed is not None and failed.errno != errno.EPIPE:
        done = "what was asked is done, but " if code == 0 else ""
        sys.stderr.write(f"error: {done}the output can't be written ({failed.strerror or failed})\n")
        code = code or 1
    sys.stderr.flush()
    return code


_replaced: list[TextIO] = []  # else the collector would close what these share with their successors


def _tolerant(stream: Any) -> Any:
    if not isinstance(stream, io.TextIOWrapper):  # somebody's own
        return stream
    of = cast("Any", stream)
    _replaced.append(of)
    return Output(of.buffer, of.encoding, "backslashreplace", None, of.line_buffering, of.write_through)
