"""Whose leaving stops a job, and what stays of it. In memory, on a clock that jumps."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from actors.errors import JobConflictError, JobNotFoundError
from actors.retry import RetryPolicy
from events.state import JobState
from events.types import AttemptFailed, Event, JobCancelled, Mode
from tests.support.providers import FakeProvider, Point
from tests.support.scripted import says
from tests.support.world import World, open_world, read_stream

PLAIN: list[Point] = ["connect", "last_frame"]
STREAMED: list[Point] = ["connect", "first_frame", "mid_stream", "last_frame"]


async def assert_cancelled_by_client(world: World, job_id: str) -> None:
    """The upstream is closed, the job is recorded as left by its client, its content is gone."""
    (call,) = world.provider.calls
    assert call.cancelled
    assert call.closed_at == trio.current_time()
    last = (await world.events(job_id))[-1]
    assert isinstance(last, JobCancelled)
    assert last.by == "client"
    assert world.supervisor.in_flight == 0
    assert world.log.held_bytes == 0


@pytest.mark.parametrize(
    ("mode", "point"),
    [*((Mode.PLAIN, point) for point in PLAIN), *((Mode.STREAM, point) for point in STREAMED)],
)
async def test_the_last_watcher_leaves(mode: Mode, point: Point, autojump_clock: MockClock) -> None:
    async with open_world(FakeProvider(delay_s=1, stall_at=point)) as world:
        actor, watch = await world.submit(mode)
        await world.provider.stalled.wait()
        left_at = trio.current_time()
        watch.leave()
        await wait_all_tasks_blocked()
        assert trio.current_time() == left_at
        assert actor.ended.is_set()
        await assert_cancelled_by_client(world, actor.job_id)


@pytest.mark.parametrize("mode", [Mode.PLAIN, Mode.STREAM])
async def test_leaving_before_the_actor_has_run_at_all(mode: Mode) -> None:
    async with open_world() as world:
        actor, watch = await world.submit(mode)
        watch.leave()
        await actor.ended.wait()
        assert actor.snapshot.state is JobState.CANCELLED
        assert world.provider.open_calls == 0
        assert all(call.cancelled for call in world.provider.calls)


async def test_the_first_of_two_to_leave_changes_nothing(autojump_clock: MockClock) -> None:
    async with open_world(FakeProvider(stall_at="mid_stream")) as world:
        actor, first = await world.submit(Mode.STREAM)
        second = actor.watch()
        await world.provider.stalled.wait()
        first.leave()
        first.leave()
        await trio.sleep(3600)
        assert not actor.ended.is_set()
        assert world.provider.open_calls == 1
        second.leave()
        await wait_all_tasks_blocked()
        await assert_cancelled_by_client(world, actor.job_id)


@pytest.mark.parametrize("mode", [Mode.ASYNC, Mode.PLAIN, Mode.STREAM])
async def test_a_detached_job_survives_its_watchers(mode: Mode, autojump_clock: MockClock) -> None:
    async with open_world(FakeProvider(delay_s=1, deltas=3)) as world:
        actor, watch = await world.submit(mode, detached=True)
        watch.leave()
        actor.watch().leave()
        await actor.ended.wait()
        assert trio.current_time() == 4
        assert actor.snapshot.state is JobState.COMPLETED
        assert (await world.supervisor.result(actor.job_id, "me")).message == actor.answer != b""


@pytest.mark.parametrize("detached", [False, True])
async def test_a_write_is_made_though_the_work_that_waits_for_it_is_cancelled(
    detached: bool, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeProvider(raise_at={"connect": says(503)})
    async with open_world(fake, retries=RetryPolicy()) as world:
        append = world.log.append
        written = trio.Event()

        async def slow(job_id: str, events: Sequence[Event], *args: Any, **more: Any) -> int:
            seq = await append(job_id, events, *args, **more)
            if any(isinstance(event, AttemptFailed) for event in events):
                written.set()
                await trio.sleep_forever()
            return seq

        monkeypatch.setattr(world.log, "append", slow)
        actor, watch = await world.submit(detached=detached, may_detach=not detached)
        await written.wait()
        cancelled_at = trio.current_time()
        if detached:
            await world.supervisor.cancel(actor.job_id, "me", by="me")
        else:
            watch.leave()
        await actor.ended.wait()
        assert trio.current_time() == cancelled_at
        assert actor.snapshot.state is JobState.CANCELLED
        assert (await world.kinds(actor.job_id))[-2:] == ["AttemptFailed", "JobCancelled"]
        assert world.logged("job.end_unrecorded") == 0


async def test_a_watcher_that_leaves_twice_counts_once(autojump_clock: MockClock) -> None:
    async with open_world(FakeProvider(delay_s=1)) as world:
        actor, watch = await world.submit(Mode.PLAIN)
        other = actor.watch()
        other.leave()
        other.leave()
        await actor.ended.wait()
        assert actor.snapshot.state is JobState.COMPLETED
        watch.leave()


@pytest.mark.parametrize("point", STREAMED)
async def test_cancelling_a_detached_job(point: Point, autojump_clock: MockClock) -> None:
    async with open_world(FakeProvider(stall_at=point)) as world:
        actor, watch = await world.submit(Mode.ASYNC, ttl_s=10)
        watch.leave()
        await world.provider.stalled.wait()
        snapshot = await world.supervisor.cancel(actor.job_id, "me", by="somebody")
        assert snapshot.state is JobState.CANCELLED
        assert snapshot.failure is not None
        assert (snapshot.failure.status, snapshot.failure.type) == (409, "conflict_error")
        assert world.provider.calls[0].cancelled
        assert world.provider.open_calls == 0
        last = (await world.events(actor.job_id))[-1]
        assert isinstance(last, JobCancelled)
        assert last.by == "somebody"
        # What was counted until then is kept; the fold knows usage from message_start on.
        seen = point in ("mid_stream", "last_frame")
        assert (last.usage.get("input_tokens") == 3) is seen
        assert (await world.supervisor.result(actor.job_id, "me")).state is JobState.CANCELLED


async def test_cancelling_is_idempotent(autojump_clock: MockClock) -> None:
    async with open_world(FakeProvider(stall_at="mid_stream")) as world:
        actor, _ = await world.submit(Mode.ASYNC)
        await world.provider.stalled.wait()
        async with trio.open_nursery() as nursery:
            for name in ("one", "two", *map(str, range(20))):
                nursery.start_soon(partial(world.supervisor.cancel, actor.job_id, "me", by=name))
        again = await world.supervisor.cancel(actor.job_id, "me", by="late")
        assert again.state is JobState.CANCELLED
        assert (await world.kinds(actor.job_id)).count("JobCancelled") == 1


async def test_cancelling_what_has_ended_changes_nothing() -> None:
    async with open_world() as world:
        actor, _ = await world.submit(Mode.ASYNC)
        await actor.ended.wait()
        before = await world.kinds(actor.job_id)
        snapshot = await world.supervisor.cancel(actor.job_id, "me", by="me")
        assert snapshot.state is JobState.COMPLETED
        assert await world.kinds(actor.job_id) == before


async def test_other_owners_see_no_job_to_cancel_or_delete() -> None:
    async with open_world(FakeProvider(stall_at="connect")) as world:
        actor, _ = await world.submit(Mode.ASYNC, owner="me")
        await world.provider.stalled.wait()
        for job_id in (actor.job_id, "never-was"):
            with pytest.raises(JobNotFoundError):
                await world.supervisor.cancel(job_id, "you", by="you")
            with pytest.raises(JobNotFoundError):
                await world.supervisor.delete(job_id, "you")
        assert not actor.ended.is_set()


async def test_a_running_job_is_not_deleted() -> None:
    async with open_world(FakeProvider(stall_at="connect")) as world:
        actor, _ = await world.submit(Mode.ASYNC)
        with pytest.raises(JobConflictError):
            await world.supervisor.delete(actor.job_id, "me")
        assert not actor.ended.is_set()
        await world.supervisor.cancel(actor.job_id, "me", by="me")
        await world.supervisor.delete(actor.job_id, "me")
        with pytest.raises(JobNotFoundError):
            await world.supervisor.result(actor.job_id, "me")
        with pytest.raises(JobNotFoundError):
            await world.supervisor.delete(actor.job_id, "me")
        assert world.log.held_bytes == 0
        assert world.snapshots.held_bytes == 0


async def test_watchers_of_a_cancelled_job_read_what_there_was(autojump_clock: MockClock) -> None:
    async with open_world(FakeProvider(deltas=4, stall_at="mid_stream")) as world:
        actor, watch = await world.submit(Mode.STREAM)
        subscription = actor.subscribe()
        await world.provider.stalled.wait()
        await world.supervisor.cancel(actor.job_id, "me", by="me")
        # The content stays until its last watcher is done with it.
        assert len(await read_stream(subscription)) == 4
        assert world.log.held_bytes > 0
        subscription.close()
        watch.leave()
        await wait_all_tasks_blocked()
        assert world.log.held_bytes == 0
        assert world.telemetry.watchers == 0


async def test_a_caller_that_gives_up_waiting_for_the_cancel(autojump_clock: MockClock) -> None:
    async with open_world(FakeProvider(stall_at="connect")) as world:
        actor, _ = await world.submit(Mode.ASYNC)
        await world.provider.stalled.wait()
        with trio.CancelScope() as scope:
            scope.cancel()
            await world.supervisor.cancel(actor.job_id, "me", by="me")
        assert scope.cancelled_caught
        await actor.ended.wait()
        assert actor.snapshot.state is JobState.CANCELLED
