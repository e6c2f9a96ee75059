"""The doctor's findings, for the tests."""

from __future__ import annotations

from typing import Any

from streamjobs.clients import Source
from streamjobs.doctor import Finding, Level, examine

#: As the server and its failpoints know the doctor.
APP = "streamjobs/doctor"


def see(source: Source, **options: Any) -> dict[str, Finding]:
    """All findings by name; whatever fails has a fix."""
    found = list(examine(source, **options))
    assert all(one.fix for one in found if one.level is Level.FAIL)
    names = [one.name for one in found]
    assert len(names) == len(set(names)), "one line each"
    return {one.name: one for one in found}


def failing(error: Exception) -> Any:
    """A function that raises this, whatever it is given."""

    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail
