"""Ending tasks: those that are inside the driver, which may make an error of a cancellation, and those that may not be."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import anyio

from streamjobs.clock import boot


async def end_task(task: asyncio.Task[Any], limit: float = 5.0) -> None:
    """Cancel a task until it has ended.

    More than once: before Python 3.12, ``asyncio.wait_for`` loses a cancellation that comes together with its
    result, and the driver sends every command through it. Not at once again: a second cancellation that meets
    the driver taking its topology's lock back leaves that lock taken for ever.
    """
    until = boot() + limit
    while not task.done() and boot() < until:
        task.cancel()
        # long enough for what the driver does when it is cancelled: it frees a cursor on the server
        await asyncio.wait([task], timeout=min(limit / 2, 0.25))


async def to_the_end(doing: Awaitable[Any], hurry: Callable[[], None] = lambda: None) -> None:
    """Wait for the end of something, whatever cancels the caller meanwhile; then the cancellation goes on.

    Args:
        doing: what; its error is left in it where it is a task.
        hurry: called at each cancellation.

    """
    task, cancelled = asyncio.ensure_future(doing), False
    with anyio.CancelScope(shield=True):  # one of anyio's would cancel in every turn; task.cancel() passes it
        while not task.done():
            try:
                await asyncio.wait([task])
            except asyncio.CancelledError:
                cancelled = True
                hurry()
    if cancelled:
        if not task.cancelled():
            task.exception()  # was looked at
        raise asyncio.CancelledError


async def surely_done(do: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Do something to its end, again if it was cancelled itself: the end of ``asyncio.run`` cancels all tasks there are.

    What cancels the caller meanwhile goes on after it; an error of it is raised.
    """
    cancelled = False
    while True:
        task = asyncio.create_task(do())
        try:
            await to_the_end(task)
        except asyncio.CancelledError:
            cancelled = True
        if not task.cancelled():
            break
    task.result()
    if cancelled:
        raise asyncio.CancelledError


def going() -> bool:
    """Whether the running task was not cancelled: False also where the driver has made an error of the cancellation.

    The condition of a role's loop: what is lost so after :func:`end_task` has given up would let it go on for ever.
    """
    task = asyncio.current_task()
    return task is None or not task.cancelling()
