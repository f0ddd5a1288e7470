"""Random walks over everything that can be asked of a supervisor, with what must hold after every step."""

from dataclasses import dataclass, field

import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from actors.broadcast import Subscription
from actors.circuit import CircuitPolicy
from actors.commands import DetachJob
from actors.errors import (
    JobConflictError,
    JobNotFoundError,
    NoTargetError,
    OverloadedError,
    UpstreamConnectionError,
)
from actors.job import JobActor
from actors.retry import RetryPolicy
from actors.work import Watch
from events.errors import UnknownJobError
from events.projections import project
from events.state import ENDED, JobState
from events.types import JobCancelled, JobCompleted, JobFailed, Mode
from tests.support.providers import FakeProvider, Point, whole_stream
from tests.support.world import World, open_world

TTL_S = 30.0
MAX_IN_FLIGHT = 4
DELTAS = 3
TERMINAL = (JobCompleted, JobFailed, JobCancelled)


def providers() -> list[FakeProvider]:
    """One of each temper."""
    return [
        FakeProvider(name="sound", deltas=DELTAS),
        FakeProvider(name="slow", deltas=DELTAS, delay_s=5),
        FakeProvider(name="stuck", deltas=DELTAS, stall_at="mid_stream"),
        FakeProvider(name="broken", deltas=DELTAS, raise_at={"last_frame": RuntimeError("boom")}, delay_s=1),
        Flaky(name="flaky", deltas=DELTAS),
    ]


class Flaky(FakeProvider):
    """Two of three calls fail, one before its first frame and one after some content."""

    async def at(self, point: Point) -> None:
        if point == ("first_frame", "mid_stream", "")[len(self.calls) % 3]:
            raise UpstreamConnectionError("gone")


@dataclass
class Job:
    """A job as the walk knows it."""

    actor: JobActor
    watches: list[Watch]
    subscriptions: list[Subscription] = field(default_factory=list)
    may_detach: bool = False
    cancelled: bool = False
    deleted: bool = False


class Walk:
    """Does the steps, and remembers what ought to be."""

    def __init__(self, world: World, providers: list[FakeProvider]) -> None:
        self.world = world
        self.providers = providers
        self.jobs: list[Job] = []

    def pick(self, number: int) -> Job | None:
        return self.jobs[number % len(self.jobs)] if self.jobs else None

    async def submit(self, number: int) -> None:
        mode = [Mode.PLAIN, Mode.STREAM, Mode.ASYNC][number % 3]
        provider = self.providers[number // 3 % len(self.providers)]
        may_detach = mode is Mode.PLAIN and number % 2 == 0
        full = self.world.supervisor.in_flight >= MAX_IN_FLIGHT
        try:
            actor, watch = await self.world.submit(
                mode, may_detach=may_detach, ttl_s=TTL_S, model=f"{provider.name}/m"
            )
        except NoTargetError:
            assert provider.name == "flaky"
            return
        except OverloadedError:
            assert full
            return
        assert not full
        self.jobs.append(Job(actor, [watch], may_detach=may_detach))

    async def watch(self, number: int) -> None:
        job = self.pick(number)
        if job is None:
            return
        try:
            subscription, _, _, watch = await self.world.supervisor.subscribe(job.actor.job_id, "me", None)
        except (JobNotFoundError, JobConflictError):
            return
        job.subscriptions.append(subscription)
        if watch is not None:
            job.watches.append(watch)

    async def leave(self, number: int) -> None:
        job = self.pick(number)
        if job is not None and job.watches:
            job.watches.pop().leave()

    async def cancel(self, number: int) -> None:
        job = self.pick(number)
        if job is None:
            return
        running = not job.actor.ended.is_set()
        try:
            snapshot = await self.world.supervisor.cancel(job.actor.job_id, "me", by="walk")
        except JobNotFoundError:
            assert not running
            return
        job.cancelled |= running
        assert snapshot.state in ENDED

    async def delete(self, number: int) -> None:
        job = self.pick(number)
        if job is None:
            return
        running = not job.actor.ended.is_set()
        try:
            await self.world.supervisor.delete(job.actor.job_id, "me")
        except JobConflictError:
            assert running
        except JobNotFoundError:
            assert not running
        else:
            assert not running
            job.deleted = True

    async def detach(self, number: int) -> None:
        job = self.pick(number)
        if job is not None and job.may_detach:
            command = DetachJob(TTL_S)
            if job.actor.tell(command):
                await command.done.wait()
                if not job.actor.snapshot.detached:
                    await job.actor.ended.wait()

    async def sleep(self, number: int) -> None:
        await trio.sleep(number / 4)

    async def check(self) -> None:
        """What holds whenever nobody is in the middle of anything."""
        await wait_all_tasks_blocked()
        running = [job for job in self.jobs if not job.actor.ended.is_set()]
        assert self.world.supervisor.in_flight == len(running)
        at_work = [job for job in running if not job.actor.waiting]
        assert sum(provider.open_calls for provider in self.providers) == len(at_work)
        assert sum(report.working for report in self.world.targets.providers()) == len(at_work)
        for job in self.jobs:
            await self.check_job(job)

    async def check_job(self, job: Job) -> None:
        actor = job.actor
        if not job.watches and not actor.snapshot.detached:
            assert actor.ended.is_set()
        try:
            events = await self.world.events(actor.job_id)
        except UnknownJobError:
            assert actor.ended.is_set()
            return
        snapshot = project(actor.job_id, events)
        assert snapshot.state is actor.snapshot.state
        assert snapshot.last_seq == len(events)
        assert sum(isinstance(event, TERMINAL) for event in events) == int(actor.ended.is_set())
        if actor.snapshot.detached and snapshot.state is JobState.CANCELLED:
            assert job.cancelled
        if actor.ended.is_set():
            assert actor.snapshot.last_seq == len(events)
            assert actor.snapshot.frames == snapshot.frames <= len(whole_stream(DELTAS))

    async def finish(self) -> None:
        """Everybody goes; then nothing may be left of anything."""
        for job in self.jobs:
            for subscription in job.subscriptions:
                subscription.close()
            for watch in job.watches:
                watch.leave()
            if job.actor.snapshot.detached and not job.actor.ended.is_set():
                await self.world.supervisor.cancel(job.actor.job_id, "me", by="walk")
                job.cancelled = True
            job.watches.clear()
        await self.check()
        await trio.sleep(TTL_S)
        await wait_all_tasks_blocked()
        assert self.world.supervisor.in_flight == 0
        assert sum(report.waiting for report in self.world.targets.providers()) == 0
        assert self.world.log.held_bytes == 0
        assert (len(self.world.snapshots), self.world.snapshots.held_bytes) == (0, 0)
        assert self.world.telemetry.watchers == 0
        assert self.world.logged("job.expiry_failed") == 0
        assert self.world.logged("job.end_unrecorded") == 0


ACTIONS = ("submit", "watch", "leave", "cancel", "delete", "detach", "sleep")
STEPS = st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 59)), max_size=30)


@given(steps=STEPS, settle=st.booleans())
@settings(max_examples=120, deadline=None)
def test_a_walk(steps: list[tuple[str, int]], settle: bool) -> None:
    """``settle``: look after every step. Otherwise steps come as fast as they can, and races with them."""

    async def walk() -> None:
        tempers = providers()
        async with open_world(
            tempers[0],
            others=tempers[1:],
            max_in_flight=MAX_IN_FLIGHT,
            retries=RetryPolicy(backoff_s=2),
            circuits=CircuitPolicy(failures=3, open_s=5),
            concurrency={"slow": 1, "stuck": 1, "flaky": 2},
        ) as world:
            taken = Walk(world, tempers)
            for action, number in steps:
                await getattr(taken, action)(number)
                if settle:
                    await taken.check()
            await taken.finish()

    trio.run(walk, clock=MockClock(autojump_threshold=0))
