"""What can go wrong with a batch: uploads, bounds, a failing log, the daemon's end."""

from collections.abc import Awaitable, Callable

import pytest
import trio
from trio.testing import MockClock

from actors.batch_upload import BatchTooLargeError
from actors.errors import OverloadedError
from events.batches import ItemCounts
from events.errors import LogUnavailableError
from events.types import AttemptStarted, JobFailed, Mode
from tests.support.batches import (
    BODY,
    TERMS,
    item,
    open_batches,
)
from tests.support.providers import FakeProvider


async def test_an_upload_that_breaks_off_leaves_nothing(autojump_clock: MockClock) -> None:
    async with open_batches() as world:
        async with world.batches.open_upload(TERMS) as upload:
            for number in range(200):
                await upload.add(item(str(number)))
            assert (await world.world.log.items.counts(upload.batch_id)).processing == 128
        await trio.sleep(1)
        assert await world.world.log.items.counts(upload.batch_id) == ItemCounts()
        assert world.world.snapshots.held_bytes == 0


async def test_more_items_than_a_batch_may_have_are_refused(autojump_clock: MockClock) -> None:
    async with open_batches(max_bytes=1 << 22) as world:
        with pytest.raises(BatchTooLargeError, match="more than 300"):
            await world.make(requests=301)


async def test_memory_bounds_what_a_log_in_memory_takes(autojump_clock: MockClock) -> None:
    async with open_batches(max_bytes=50_000) as world:
        with pytest.raises(OverloadedError):
            await world.make(requests=50)
        await trio.sleep(1)
        assert world.world.snapshots.held_bytes == 0
        batch_id = await world.make(requests=5)
        await world.until_ended(batch_id)
        held = sum(len(job.message) for job in await world.jobs(batch_id)) + 5 * len(BODY)
        assert world.world.snapshots.held_bytes >= held


async def test_open_batches_are_bounded(autojump_clock: MockClock) -> None:
    fake = FakeProvider(stall_at="connect")
    async with open_batches(fake, max_open=2) as world:
        for _ in range(2):
            await world.make(requests=1)
        with pytest.raises(OverloadedError, match="too many batches"):
            await world.make(requests=1)


async def test_a_log_that_takes_nothing_for_a_while_delays_a_batch_and_loses_nothing(
    autojump_clock: MockClock,
) -> None:
    fake = FakeProvider(first_delay_s=1)
    async with open_batches(fake, per_batch=1) as world:
        batch_id = await world.make(requests=3)
        await fake.until_called(1)
        world.world.log.refused = (AttemptStarted, JobFailed)
        await trio.sleep(20)
        assert world.world.log.refusals > 0
        world.world.log.refused = ()
        counts = (await world.until_ended(batch_id)).counts
        assert counts is not None
        assert (counts.processing, counts.succeeded + counts.errored) == (0, 3)


async def test_a_stop_with_a_log_in_memory_records_what_is_left(autojump_clock: MockClock) -> None:
    fake = FakeProvider(stall_at="mid_stream")
    async with open_batches(fake, per_batch=1) as world:
        batch_id = await world.make(requests=3)
        await fake.until_called(1)
        world.batches.stop()
        with pytest.raises(OverloadedError, match="shutting down"):
            await world.make(requests=1)
        await world.world.supervisor.drain(1.0)
        await world.batches.drain()
        found = await world.look(batch_id)
        assert found.batch.counts == ItemCounts(errored=3)
        for job in await world.jobs(batch_id):
            assert job.failure is not None
            assert job.failure.status == 503


async def test_a_commit_that_the_log_refuses_makes_no_batch(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_batches() as world:

        async def refuse(*args: object) -> None:
            raise LogUnavailableError("the disk is full")

        with monkeypatch.context() as patch:
            patch.setattr(world.world.log.records, "append", refuse)
            with pytest.raises(LogUnavailableError):
                await world.make(requests=2)
        await trio.sleep(1)
        assert (await world.batches.page("me", limit=9, after_id=None, before_id=None)).batches == []
        assert await world.world.log.items.orphans() == []


async def test_a_log_that_cannot_be_read_for_a_while_only_delays_a_batch(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_batches() as world:
        items = world.world.log.items
        for name in ("waiting", "begun", "counts"):
            monkeypatch.setattr(items, name, failing_at_first(getattr(items, name), times=2))
        batch_id = await world.make(requests=3)
        assert (await world.until_ended(batch_id)).counts == ItemCounts(succeeded=3)
        assert world.world.logged("batch.delayed") >= 6


def failing_at_first(call: Callable[..., Awaitable[object]], *, times: int) -> Callable[..., object]:
    left = [times]

    async def failing(*args: object, **named: object) -> object:
        if left[0]:
            left[0] -= 1
            raise LogUnavailableError("the disk does not answer")
        return await call(*args, **named)

    return failing


async def test_a_batch_that_waits_for_room_can_be_cancelled_and_holds_no_place(
    autojump_clock: MockClock,
) -> None:
    fake = FakeProvider(stall_at="connect")
    async with open_batches(fake, max_in_flight=1, max_running=1) as world:
        await world.world.submit(Mode.ASYNC)
        await fake.until_called(1)
        batch_id = await world.make(requests=2)
        await trio.sleep(10)
        await world.batches.cancel(batch_id, "me", by="me")
        assert (await world.until_ended(batch_id)).counts == ItemCounts(canceled=2)
        fake.release.set()
        assert (await world.until_ended(await world.make(requests=1))).counts == ItemCounts(succeeded=1)


async def test_an_item_cancelled_while_its_batch_is_stopped_ends_with_it(autojump_clock: MockClock) -> None:
    fake = FakeProvider(stall_at="connect")
    async with open_batches(fake, per_batch=1) as world:
        batch_id = await world.make(requests=2)
        await fake.until_called(1)
        ((_, waiting),) = await world.world.log.items.waiting(batch_id, 0, 9)
        await world.batches.cancel(batch_id, "me", by="me")
        await world.batches.cancel_item(waiting, by="me")
        assert (await world.world.log.snapshot(waiting.job_id)).ended
        assert (await world.look(batch_id)).counts == ItemCounts(canceled=2)
