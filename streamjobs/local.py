"""The runners of this process, so that a put here wakes them without waiting for the stream.

A hint, not a promise: the runner still has to claim the job from its server.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from streamjobs.job import Job

Wake = Callable[[Sequence[Job]], None]

_lock = threading.Lock()
_runners: dict[str, tuple[Wake, ...]] = {}


def join(namespace: str, wake: Wake) -> None:
    """Have ``wake(jobs)`` called, in any thread, for each put into this ``database.collection``."""
    with _lock:
        _runners[namespace] = (*_runners.get(namespace, ()), wake)


def leave(namespace: str, wake: Wake) -> None:
    """Undo :func:`join`."""
    with _lock:
        left = tuple(other for other in _runners.get(namespace, ()) if other != wake)
        _runners[namespace] = left
        if not left:
            del _runners[namespace]


def tell(namespace: str, jobs: Sequence[Job]) -> None:
    """Wake the runners of this process."""
    for wake in _runners.get(namespace, ()):
        wake(jobs)
