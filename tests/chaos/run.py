"""One run: a server, a fleet, a load, faults by schedule, a drain, a verdict."""

from __future__ import annotations

import asyncio
import secrets
import tempfile
from collections import Counter
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass
from pathlib import Path

from streamjobs.clock import boot
from streamjobs.embedded import Server, find
from tests import promises
from tests.chaos.faults import Faults
from tests.chaos.load import Load
from tests.chaos.schedule import ALL, ANYWHERE, Fault, schedule
from tests.chaos.wire import Wire
from tests.fleet import Scene
from tests.history import Run
from tests.proxy import Proxy
from tests.sight import LIVE, Breach

SETTINGS = {
    "concurrency": 4,
    "interval": 3,
    "lease": 3.0,
    "beat": 0.5,
    "margin": 0.5,
    "stop_deadline": 2,
    "stream_wait": 1,
}
#: For half of the seeds: a server of which a failpoint says that it shuts down is looked at again at once.
_POLLED = "&serverMonitoringMode=poll&heartbeatFrequencyMS=500"
#: Jobs a second, and seconds that a due one may wait, unless told. The Python server is busy with few jobs, and when four
#: runners come back to it at once, each round trip takes a part of a second.
SLOW, FAST = (4.0, 3.0), (8.0, LIVE)
_DRAIN = 90.0  # seconds for all to come to its end when nothing is broken any more
_KEEP = 0.3  # seconds between two looks whether a runner has ended


@dataclass(slots=True)
class Result:
    """What came of a run."""

    seed: int
    seconds: float
    on: str
    run: Run
    verdict: promises.Verdict
    faults: Counter[str]
    drained: float

    @property
    def line(self) -> str:
        """The last line: jobs, faults of each sort, breaches."""
        tries = sum(len(life.attempts) for life in self.run.jobs.values())
        return (
            f"chaos: seed {self.seed}, {self.seconds:.0f} s on {self.on}, drained in {self.drained:.0f} s: "
            f"{len(self.run.jobs)} jobs, {tries} claims, {self.faults.total()} faults ({_counts(self.faults)}), "
            f"counted apart: {_counts(self.verdict.apart) or 'nothing'}, {len(self.verdict.breaches)} breaches"
        )


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counter.items()))


class Chaos:
    """The parts of one run."""

    def __init__(self, scene: Scene, faults: Faults, load: Load, runners: list[str]) -> None:
        self._scene, self._faults, self._load, self._runners = scene, faults, load, runners

    async def run(self, plan: list[Fault], seconds: float) -> float:
        """Work and break until the time is over; then drain. Seconds that the drain took."""
        await self._scene.fleet.start(*self._runners)
        began = boot()
        keeping = asyncio.create_task(self._keep())
        load = asyncio.create_task(self._load.run())
        try:
            async with asyncio.TaskGroup() as tasks:
                for fault in plan:
                    await asyncio.sleep(max(0.0, began + fault.at - boot()))
                    tasks.create_task(self._faults.inject(fault))
                await asyncio.sleep(max(0.0, began + seconds - boot()))
            healed = boot()
            self._load.ended.set()
            await load
            await self._scene.finished(_DRAIN)
            return boot() - healed
        finally:
            for task in (keeping, load):
                task.cancel()
            await asyncio.wait([keeping, load])

    async def _keep(self) -> None:
        """Start again what has ended without a fault, as an init system does."""
        fleet = self._scene.fleet
        while True:
            await asyncio.sleep(_KEEP)
            for name in self._runners:
                if not fleet.running(name) and name not in self._faults.down:
                    fleet.launch(name)


async def chaos(
    seconds: float, seed: int, *, uri: str | None = None, runners: int = 4, rate: float | None = None, folder: Path | None = None,
    live: float | None = None,
    mutation: str | None = None,
) -> Result:  # fmt: skip
    """Run it: on a server of its own, or with a URI on that one, without the faults that need its control."""
    sorts = ALL if uri is None else ANYWHERE
    names = [f"r{number}" for number in range(runners)]
    plan = schedule(seed, seconds, names, sorts, SETTINGS["lease"])
    with ExitStack() as stack:
        if folder is None:
            temporary = tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True)
            folder = Path(stack.enter_context(temporary))
        server = proxy = None
        polled = seed % 2 == 1
        direct = uri
        if uri is None:
            server = Server(folder / "server", test_commands=True, options=_options())
            server.start()
            stack.callback(server.kill)
            stack.callback(server.resume)
            proxy = stack.enter_context(Proxy(server.uri))
            direct, uri = server.uri, proxy.uri + (_POLLED if polled else "")
        usual = SLOW if server is not None and server.program.sort == "python" else FAST
        rate, live = usual[0] if rate is None else rate, usual[1] if live is None else live
        namespace = f"chaos{secrets.token_hex(4)}.jobs"
        async with AsyncExitStack() as ends:
            scene = Scene(
                uri, namespace, folder, direct=direct, settings=SETTINGS, apart=True, mutation=mutation
            )
            await ends.enter_async_context(scene)
            wire = None
            if server is None:
                ends.push_async_callback(scene.client.drop_database, namespace.partition(".")[0])
            else:
                wire = Wire(scene, server, proxy, polled=polled)
                ends.push_async_callback(wire.close)
            faults = Faults(scene, server, wire)
            drained = await Chaos(scene, faults, Load(scene, seed, rate), names).run(plan, seconds)
            await faults.inspect_garbage()
            stopped = True
            try:
                await scene.fleet.stop()
            except TimeoutError:
                stopped = False
            run, verdict = await scene.judge(live=live)
            if not stopped:
                verdict.breaches.append(
                    Breach(4, "did not stop", None, "a runner with nothing to do did not stop")
                )
        on = "a given server" if server is None else server.program.sort
        return Result(seed, seconds, on, run, verdict, faults.done, drained)


def _options() -> list[str]:
    """What makes acknowledged writes survive a kill -9."""
    return [] if find().sort == "mongod" else ["--sync-on-commit"]
