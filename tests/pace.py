"""How much of a span this machine kept for itself: what a runner can't help, and a bound on it leaves out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from streamjobs.clock import boot

_TURN = 0.01


class Pace:
    """Attribute ``lost``: seconds for which the loop's turns came late."""

    def __init__(self) -> None:
        self.lost = 0.0

    async def _measure(self) -> None:
        while True:
            asleep = boot()
            await asyncio.sleep(_TURN)
            self.lost += max(0.0, boot() - asleep - 2 * _TURN)


@asynccontextmanager
async def pace() -> AsyncIterator[Pace]:
    """Measure while the context is open."""
    one = Pace()
    task = asyncio.create_task(one._measure())
    try:
        yield one
    finally:
        task.cancel()
