"""Everything below the wire, in memory: a supervisor with its log, its results and a fake upstream."""

import io
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from random import Random

import orjson
import trio

from actors.broadcast import Subscription
from actors.circuit import CircuitPolicy
from actors.clock import Clock
from actors.expiry import Expiry
from actors.job import JobActor
from actors.retry import RetryPolicy
from actors.router import Route, Router, RouteTarget
from actors.submission import SubmitJob, SupervisorLimits
from actors.supervisor import Supervisor
from actors.targets import Targets
from actors.telemetry import NullTelemetry
from actors.work import Watch
from events.errors import LogUnavailableError
from events.log.memory import MemoryLog
from events.projections import JobSnapshot
from events.snapshots import SnapshotStore
from events.types import Event, Mode
from service.logs import make_logger
from service.settings_sections import LoggingSettings
from tests.support.providers import FakeProvider

EPOCH = 1_000_000.0
"""Unix time at which every world begins; whole, so that moments under a MockClock are exact."""


class CountingStore(SnapshotStore):
    """Counts how often somebody looked for what is due: the wake-ups of the expiry task."""

    def __init__(self, max_bytes: int) -> None:
        super().__init__(max_bytes)
        self.looks = 0

    def expire(self, now: float) -> list[JobSnapshot]:
        self.looks += 1
        return super().expire(now)


class FaultyLog(MemoryLog):
    """A memory log that refuses events of the types in ``refused``, as a full disk would, and may be slow."""

    def __init__(self) -> None:
        super().__init__()
        self.refused: tuple[type[Event], ...] = ()
        self.refusals = 0
        self.frames_take_s = 0.0

    async def append_frames(
        self, job_id: str, attempt: int, frames: Sequence[bytes], expected_seq: int, at: float
    ) -> int:
        if self.frames_take_s:
            await trio.sleep(self.frames_take_s)
        return await super().append_frames(job_id, attempt, frames, expected_seq, at)

    async def append(
        self, job_id: str, events: Sequence[Event], expected_seq: int, *, deferred: bool = False
    ) -> int:
        if any(isinstance(event, self.refused) for event in events):
            self.refusals += 1
            raise LogUnavailableError("the disk is full")
        return await super().append(job_id, events, expected_seq, deferred=deferred)


class CountingTelemetry(NullTelemetry):
    """Counts watchers and those who fell behind."""

    def __init__(self) -> None:
        self.watchers = 0
        self.lags = 0

    def subscribers(self, delta: int) -> None:
        self.watchers += delta

    def lagged(self) -> None:
        self.lags += 1


@dataclass
class World:
    """The parts, to be looked at from outside."""

    supervisor: Supervisor
    targets: Targets
    log: FaultyLog
    snapshots: CountingStore
    provider: FakeProvider
    telemetry: CountingTelemetry
    clock: Clock
    lines: io.StringIO = field(default_factory=io.StringIO)

    async def submit(
        self,
        mode: Mode = Mode.PLAIN,
        *,
        owner: str = "me",
        detached: bool | None = None,
        may_detach: bool = False,
        ttl_s: float = 60.0,
        body: bytes = b'{"model":"m"}',
        model: str = "m",
        fallbacks: tuple[str, ...] = (),
        may_rerun: bool = True,
    ) -> tuple[JobActor, Watch]:
        """Submit a job; async ones are detached unless told otherwise."""
        return await self.supervisor.submit(
            SubmitJob(
                owner=owner,
                body=body,
                fields={"model": model},
                model=model,
                mode=mode,
                detached=mode is Mode.ASYNC if detached is None else detached,
                may_detach=may_detach,
                result_ttl_s=ttl_s,
                fallbacks=fallbacks,
                may_rerun=may_rerun,
            )
        )

    async def events(self, job_id: str) -> list[Event]:
        """The job's events."""
        return [stored.event for stored in await self.log.read(job_id)]

    async def kinds(self, job_id: str) -> list[str]:
        """The names of the job's events."""
        return [type(event).__name__ for event in await self.events(job_id)]

    def logged(self, action: str) -> int:
        """How many log lines have this action."""
        return sum(orjson.loads(line)["action"] == action for line in self.lines.getvalue().splitlines())


@asynccontextmanager
async def open_world(
    provider: FakeProvider | None = None,
    *,
    max_in_flight: int = 1000,
    attached_history: int = 100,
    buffer_runs: int = 4,
    max_snapshot_bytes: int = 1 << 20,
    others: Sequence[FakeProvider] = (),
    tried: Sequence[str] = (),
    retries: RetryPolicy | None = None,
    circuits: CircuitPolicy | None = None,
    concurrency: Mapping[str, int] | None = None,
) -> AsyncIterator[World]:
    """A supervisor at work; leaving tears everything down at once.

    ``provider`` answers every model, ``others`` those that name them; or the route has the targets named in
    ``tried``. Nothing is tried again unless ``retries`` says so.
    """
    provider = provider or FakeProvider()
    retries = retries or RetryPolicy(max_attempts=1)
    log = FaultyLog()
    snapshots = CountingStore(max_snapshot_bytes)
    telemetry = CountingTelemetry()
    lines = io.StringIO()
    logger = make_logger(LoggingSettings(level="debug", format="json"), lines)
    clock = Clock(unix_at_start=EPOCH)
    async with trio.open_nursery() as nursery:
        expiry = Expiry(snapshots=snapshots, log=log, clock=clock, logger=logger)
        nursery.start_soon(expiry.run)  # noqa: ASYNC113 - nothing here waits for it
        named = {one.name: one for one in (provider, *others)}
        route = Route("*", provider.name, targets=tuple(RouteTarget(name) for name in tried))
        targets = Targets(
            router=Router([route], named),
            clock=clock,
            telemetry=telemetry,
            logger=logger,
            retries=retries,
            circuits=circuits,
            concurrency=concurrency,
            random=Random(0),
        )
        supervisor = Supervisor(
            nursery=nursery,
            log=log,
            snapshots=snapshots,
            expiry=expiry,
            targets=targets,
            clock=clock,
            telemetry=telemetry,
            logger=logger,
            limits=SupervisorLimits(
                max_in_flight=max_in_flight,
                attached_history=attached_history,
                subscriber_buffer_runs=buffer_runs,
            ),
        )
        yield World(supervisor, targets, log, snapshots, provider, telemetry, clock, lines)
        nursery.cancel_scope.cancel()


async def read_stream(subscription: Subscription) -> list[bytes]:
    """Every frame from here to the end of the stream."""
    frames: list[bytes] = []
    while runs := await subscription.receive():
        for run in runs:
            frames.extend(run.frames)
    return frames
