"""The library with one guard switched off: what the tests must notice. Only ``worker.py`` and tests apply them."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

from pymongo.write_concern import WriteConcern

from streamjobs import clients, putting, transitions
from streamjobs.runner import takeback
from streamjobs.runner.lease import Trust
from streamjobs.runner.wake import Waker

MUTATIONS: dict[str, Callable[[], None]] = {}


def _named(name: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    def register(apply: Callable[[], None]) -> Callable[[], None]:
        MUTATIONS[name] = apply
        return apply

    return register


@_named("token out of the finish filter")
def _token() -> None:
    real = transitions._finish

    def finish(*args: Any, **named: Any) -> transitions.Change:
        guard, update = real(*args, **named)
        guard.pop("lease.token")
        return guard, update

    transitions._finish = finish


def _claim(loosen: Callable[[dict[str, Any], list[Any]], None]) -> None:
    """Change what a claim's filter and the conditions in its pipeline demand."""
    real = transitions.claim

    def claim(*args: Any, **options: Any) -> transitions.Change:
        guard, update = deepcopy(real(*args, **options))  # the conditions are shared by all claims
        loosen(guard, update[0]["$set"]["lease"]["$cond"][0]["$and"])
        return guard, update

    transitions.claim = claim


def _drop(conditions: list[Any], field: str) -> None:
    found = [one for one in conditions if field in str(one)]
    assert found
    for one in found:
        conditions.remove(one)


@_named("due check out of the pipeline")
def _due() -> None:
    _claim(lambda _guard, conditions: _drop(conditions, "$$NOW"))


@_named("claim without status")
def _status() -> None:
    def loosen(guard: dict[str, Any], conditions: list[Any]) -> None:
        guard.pop("status")
        _drop(conditions, "$status")

    _claim(loosen)


@_named("trust deadline ignored")
def _trust() -> None:
    Trust.holds = lambda self, owner=None: owner is None or owner == self.owner  # type: ignore[method-assign]


@_named("fence at any time")
def _fence() -> None:
    takeback.fence = lambda: [{"$set": {"fenced": "$$NOW"}}]


@_named("sweep by event")
def _sweep() -> None:
    """Only whoever fences a record frees its jobs, once."""
    real_fence, real_free = takeback.Sweeper._fence, takeback.Sweeper._free_fenced

    mine: set[tuple[int, str]] = set()

    async def fence(self: Any, owner: str) -> bool:
        fenced = await real_fence(self, owner)
        if fenced:
            mine.add((id(self), owner))
        return fenced

    async def free(self: Any, owner: str, *, holds: bool) -> None:
        if (id(self), owner) in mine:
            mine.remove((id(self), owner))
            await real_free(self, owner, holds=holds)

    takeback.Sweeper._fence, takeback.Sweeper._free_fenced = fence, free  # type: ignore[method-assign]


@_named("own orphans not looked for")
def _orphans() -> None:
    async def release(_self: Any) -> int:
        return 0

    takeback.Sweeper.release_orphans = release  # type: ignore[method-assign]


@_named("take-back uncharged")
def _uncharged() -> None:
    real = transitions.lose

    def lose(claim: transitions.Claim, why: str) -> transitions.Change:
        guard, update = real(claim, why)
        if update[0]["$set"].pop("retries", None) is not None:
            update[0]["$set"]["status"] = transitions.literal(1)
        return guard, update

    transitions.lose = lose


@_named("no catch-up after a gap")
def _catch_up() -> None:
    """The stream's first opening reads everything, as the runner's start does; later ones trust their events."""
    real = Waker.restart_all

    def restart_all(self: Any) -> None:
        if not getattr(self, "opened_before", False):
            self.opened_before = True
            real(self)

    Waker.restart_all = restart_all  # type: ignore[method-assign]


@_named("majority off")
def _majority() -> None:
    real = clients.ours

    def ours(collection: Any) -> Any:
        return real(collection).with_options(write_concern=WriteConcern(1))

    clients.ours = ours


@_named("repeated put refused")
def _repeated() -> None:
    putting._same_id = lambda _details: False
