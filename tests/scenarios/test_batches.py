"""The life of a batch below the wire: order, places, cancelling, time."""

import pytest
import trio
from trio.testing import MockClock

from actors.errors import BatchNotFoundError, JobConflictError, OverloadedError
from events.batches import BatchState, ItemCounts, ItemResult, result_of
from events.errors import UnknownJobError
from events.types import Failure, JobCancelled, Mode
from tests.support.batches import (
    LIFETIME_S,
    RESULT_TTL_S,
    custom_ids,
    item,
    open_batches,
)
from tests.support.providers import FakeProvider

# --- to the end ------------------------------------------------------------------------------------


async def test_items_are_begun_in_order_a_bounded_number_at_a_time(autojump_clock: MockClock) -> None:
    fake = FakeProvider(first_delay_s=10)
    async with open_batches(fake, per_batch=4) as world:
        batch_id = await world.make(requests=10)
        await fake.until_called(4)
        await trio.sleep(5)
        assert (fake.open_calls, world.batches.running_items, world.batches.waiting_items) == (4, 4, 6)
        assert (await world.look(batch_id)).counts == ItemCounts(processing=10)
        await trio.sleep(6)
        assert (await world.look(batch_id)).counts == ItemCounts(processing=6, succeeded=4)
        batch = await world.until_ended(batch_id)
        assert batch.counts == ItemCounts(succeeded=10)
        assert [call.opened_at - fake.calls[0].opened_at for call in fake.calls] == pytest.approx(
            [0.0] * 4 + [10.0] * 4 + [20.0] * 2
        )
        jobs = await world.jobs(batch_id)
        assert custom_ids(jobs) == [str(number) for number in range(10)]
        assert all(job.mode is Mode.BATCH and job.message and job.attempt == 1 for job in jobs)
        kinds = await world.world.kinds(jobs[0].job_id)
        assert kinds[:2] == ["JobAccepted", "AttemptStarted"]
        assert world.batches.open == world.batches.waiting_items == world.world.supervisor.in_flight == 0


async def test_batches_share_the_places_there_are(autojump_clock: MockClock) -> None:
    fake = FakeProvider(first_delay_s=10)
    async with open_batches(fake, max_running=3, per_batch=3) as world:
        first = await world.make(requests=6)
        second = await world.make(requests=2)
        await trio.sleep(25)
        # The second one's turn came before the first one was through.
        assert (await world.look(second)).counts.processing < 2
        assert (await world.look(first)).counts.processing > 0
        for batch_id in (first, second):
            await world.until_ended(batch_id)
        assert max(sum(c.opened_at <= at < (c.closed_at or 0) for c in fake.calls) for at in range(60)) <= 3


async def test_other_jobs_go_first(autojump_clock: MockClock) -> None:
    fake = FakeProvider(first_delay_s=10)
    async with open_batches(fake, max_in_flight=2) as world:
        jobs = [await world.world.submit(Mode.ASYNC) for _ in range(2)]
        batch_id = await world.make(requests=2)
        with pytest.raises(OverloadedError):
            await world.world.submit()
        await trio.sleep(9)
        assert len(fake.calls) == 2
        for actor, _ in jobs:
            await actor.ended.wait()
        await fake.until_called(4)
        # Running items take no place from other jobs.
        actor, _ = await world.world.submit(Mode.ASYNC)
        assert (await world.until_ended(batch_id)).counts == ItemCounts(succeeded=2)
        await actor.ended.wait()


async def test_a_bad_item_is_errored_and_fails_nothing_else(autojump_clock: MockClock) -> None:
    failure = Failure(400, "invalid_request_error", "messages: Field required")
    async with open_batches() as world:
        batch_id = await world.make(item("good"), item("bad", failure=failure), item("good too"))
        assert (await world.until_ended(batch_id)).counts == ItemCounts(succeeded=2, errored=1)
        bad = (await world.jobs(batch_id))[1]
        assert (bad.custom_id, bad.failure, bad.attempt) == ("bad", failure, 0)


async def test_an_item_that_fails_upstream_is_errored(autojump_clock: MockClock) -> None:
    failing = FakeProvider(name="failing", raise_at={"connect": RuntimeError("bug")})
    async with open_batches(others=[failing]) as world:
        batch_id = await world.make(item("1"), item("2", model="failing/m"))
        assert (await world.until_ended(batch_id)).counts == ItemCounts(succeeded=1, errored=1)


# --- stopping --------------------------------------------------------------------------------------


async def test_cancelling_ends_what_runs_and_what_waits(autojump_clock: MockClock) -> None:
    fake = FakeProvider(stall_at="mid_stream")
    async with open_batches(fake, per_batch=2) as world:
        batch_id = await world.make(requests=5)
        await fake.until_called(2)
        found = await world.batches.cancel(batch_id, "me", by="me")
        assert found.batch.state is BatchState.CANCELING
        assert found.counts.processing == 5
        assert found.batch.cancel_initiated_at is not None
        again = await world.batches.cancel(batch_id, "me", by="somebody else")
        assert again.batch == found.batch
        batch = await world.until_ended(batch_id)
        assert batch.counts == ItemCounts(canceled=5)
        assert len(fake.calls) == 2
        assert all(call.cancelled for call in fake.calls)
        for job in await world.jobs(batch_id):
            end = (await world.world.events(job.job_id))[-1]
            assert isinstance(end, JobCancelled)
            assert (end.by, end.reason) == ("me", "its batch was cancelled")
        assert (await world.batches.cancel(batch_id, "me", by="me")).batch == batch


async def test_what_has_not_ended_after_a_day_expires(autojump_clock: MockClock) -> None:
    fake = FakeProvider(stall_at="mid_stream")
    async with open_batches(fake, per_batch=1) as world:
        batch_id = await world.make(requests=3)
        await trio.sleep(LIFETIME_S - 1)
        assert (await world.look(batch_id)).counts == ItemCounts(processing=3)
        await trio.sleep(2)
        found = await world.look(batch_id)
        assert found.batch.counts == ItemCounts(expired=3)
        assert found.batch.ended_at == found.batch.expires_at
        assert {result_of(job) for job in await world.jobs(batch_id)} == {ItemResult.EXPIRED}


async def test_an_item_can_be_cancelled_by_hand_running_or_not(autojump_clock: MockClock) -> None:
    fake = FakeProvider(stall_at="mid_stream")
    async with open_batches(fake, per_batch=1) as world:
        batch_id = await world.make(requests=4)
        await fake.until_called(1)
        second, third, _ = [one.job for one in await world.world.log.items.waiting(batch_id, 0, 9)]
        (first,) = await world.world.log.items.begun(batch_id)
        await world.batches.cancel_item(third, by="me")
        assert (await world.look(batch_id)).counts == ItemCounts(processing=3, canceled=1)
        await world.world.supervisor.cancel(first.job_id, "me", by="me")
        await fake.until_called(2)
        # Begun since it was read as waiting.
        await world.batches.cancel_item(second, by="me")
        assert (await world.look(batch_id)).counts == ItemCounts(processing=1, canceled=3)
        fake.release.set()
        assert (await world.until_ended(batch_id)).counts == ItemCounts(succeeded=1, canceled=3)
        assert len(fake.calls) == 3
        with pytest.raises(JobConflictError):
            await world.batches.cancel_item(second, by="me")


async def test_an_item_is_not_deleted_but_with_its_batch(autojump_clock: MockClock) -> None:
    async with open_batches() as world:
        batch_id = await world.make(requests=1)
        await world.until_ended(batch_id)
        (job,) = await world.jobs(batch_id)
        with pytest.raises(JobConflictError, match="delete the batch"):
            await world.world.supervisor.delete(job.job_id, "me")
        await world.batches.delete(batch_id, "me")
        await trio.sleep(1)
        with pytest.raises(UnknownJobError):
            await world.world.log.snapshot(job.job_id)
        with pytest.raises(BatchNotFoundError):
            await world.look(batch_id)
        assert world.world.snapshots.held_bytes == 0


async def test_a_batch_is_forgotten_in_its_time_and_its_items_not_before(autojump_clock: MockClock) -> None:
    async with open_batches() as world:
        batch_id = await world.make(requests=3)
        batch = await world.until_ended(batch_id)
        assert batch.ended_at is not None
        await trio.sleep(batch.ended_at + RESULT_TTL_S - world.world.clock.now() - 1)
        for job in await world.jobs(batch_id):
            assert (await world.world.supervisor.result(job.job_id, "me")).message
        with pytest.raises(JobConflictError):
            await world.batches.delete(await world.make(requests=1), "me")
        await trio.sleep(62)
        with pytest.raises(BatchNotFoundError):
            await world.look(batch_id)
        assert await world.world.log.items.counts(batch_id) == ItemCounts()
