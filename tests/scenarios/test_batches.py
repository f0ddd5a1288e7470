"""The life of a batch below the wire: order, places, cancelling, time, a failing log, the daemon's end."""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
import trio
from trio.testing import MockClock

from actors.batch_upload import BatchItem, BatchTooLargeError, UploadTerms
from actors.batches import Batch, Batches, BatchLimits
from actors.errors import BatchNotFoundError, JobConflictError, OverloadedError
from events.batches import BatchSnapshot, BatchState, ItemCounts, ItemResult, result_of
from events.errors import LogUnavailableError, UnknownJobError
from events.projections import JobSnapshot
from events.types import AttemptStarted, Failure, JobCancelled, JobFailed, Mode
from service.logs import make_logger
from service.settings_sections import LoggingSettings
from tests.support.providers import FakeProvider
from tests.support.world import World, open_world

HOUR_S = 3600.0
LIFETIME_S = 24 * HOUR_S
RESULT_TTL_S = 100 * HOUR_S
TERMS = UploadTerms(owner="me", request_id="req_1")
BODY = b'{"model": "m",  "messages": []}'


@dataclass
class BatchWorld:
    """A world with batches."""

    world: World
    batches: Batches

    async def make(self, *items: BatchItem, requests: int = 0, terms: UploadTerms = TERMS) -> str:
        """A batch of these items, or of so many."""
        made = items or [item(str(number)) for number in range(requests)]
        async with self.batches.open_upload(terms) as upload:
            for one in made:
                await upload.add(one)
            batch, _ = await upload.commit()
        return batch.batch_id

    async def look(self, batch_id: str) -> Batch:
        return await self.batches.describe(batch_id, "me")

    async def jobs(self, batch_id: str) -> list[JobSnapshot]:
        """Its items, in order, ended or not."""
        found = await self.world.log.items.results(batch_id, 0, limit=1000, max_bytes=1 << 20)
        found += await self.world.log.items.waiting(batch_id, 0, 1000)
        return [one.job for one in sorted(found)] + await self.world.log.items.begun(batch_id)

    async def until_ended(self, batch_id: str) -> BatchSnapshot:
        with trio.fail_after(LIFETIME_S + HOUR_S):
            while not (found := await self.look(batch_id)).batch.ended:  # noqa: ASYNC110 - a client would, too
                await trio.sleep(1)
        return found.batch


def item(custom_id: str, *, model: str = "m", failure: Failure | None = None) -> BatchItem:
    return BatchItem(custom_id=custom_id, body=BODY, model=model, failure=failure)


@asynccontextmanager
async def open_batches(
    provider: FakeProvider | None = None,
    *,
    others: Sequence[FakeProvider] = (),
    max_running: int = 8,
    per_batch: int = 4,
    max_open: int = 10,
    max_in_flight: int = 1000,
    max_bytes: int = 1 << 20,
) -> AsyncIterator[BatchWorld]:
    provider = provider or FakeProvider()
    async with (
        open_world(
            provider, others=others, max_in_flight=max_in_flight, max_snapshot_bytes=max_bytes
        ) as world,
        trio.open_nursery() as nursery,
    ):
        batches = Batches(
            nursery=nursery,
            log=world.log,
            snapshots=world.snapshots,
            supervisor=world.supervisor,
            clock=world.clock,
            telemetry=world.telemetry,
            logger=make_logger(LoggingSettings(level="debug", format="json"), world.lines),
            limits=BatchLimits(
                max_open=max_open,
                max_running=max_running,
                max_running_per_batch=per_batch,
                max_requests=300,
                max_attempts=3,
                lifetime_s=LIFETIME_S,
                result_ttl_s=RESULT_TTL_S,
            ),
        )
        nursery.start_soon(batches.forget_old)  # noqa: ASYNC113 - nothing here waits for it
        yield BatchWorld(world, batches)
        nursery.cancel_scope.cancel()


def custom_ids(jobs: Sequence[JobSnapshot]) -> list[str | None]:
    return [job.custom_id for job in jobs]


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


# --- what can go wrong -----------------------------------------------------------------------------


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
