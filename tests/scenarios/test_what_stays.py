"""What a job leaves behind: an attached one its counts, a kept one its result."""

import pytest
from trio.testing import MockClock, wait_all_tasks_blocked

from actors.errors import JobNotFoundError
from events.errors import UnknownJobError
from events.types import FramesReceived, JobAccepted, JobCompleted, Mode
from tests.support.gateway import BODY, open_fake_gateway, poll, request, start
from tests.support.providers import USAGE, FakeProvider
from tests.support.world import World, open_world

BODY_BYTES = b'{"model":"m","messages":"the secret of the client"}'


async def ended(world: World, mode: Mode) -> str:
    """The id of a job that has ended and is watched by nobody."""
    actor, watch = await world.submit(mode, body=BODY_BYTES)
    await actor.ended.wait()
    watch.leave()
    await wait_all_tasks_blocked()
    return actor.job_id


@pytest.mark.parametrize("mode", [Mode.PLAIN, Mode.STREAM])
async def test_counts_stay_content_goes(mode: Mode, autojump_clock: MockClock) -> None:
    async with open_world(FakeProvider(deltas=3)) as world:
        job_id = await ended(world, mode)
        events = await world.events(job_id)
        accepted, completed = events[0], events[-1]
        assert isinstance(accepted, JobAccepted)
        assert isinstance(completed, JobCompleted)
        assert (accepted.body, completed.message) == (b"", b"")
        assert completed.usage == USAGE
        runs = [event for event in events if isinstance(event, FramesReceived)]
        assert all(run.frames == () for run in runs)
        assert sum(run.count for run in runs) == (0 if mode is Mode.PLAIN else 8)
        snapshot = await world.supervisor.describe(job_id, "me")
        assert snapshot.message == b""
        assert snapshot.usage == USAGE
        assert snapshot.frames == (0 if mode is Mode.PLAIN else 8)
        assert world.log.held_bytes == 0
        # There is nothing to poll for: no result was promised.
        with pytest.raises(JobNotFoundError):
            await world.supervisor.result(job_id, "me")


async def test_a_kept_job_keeps_its_content() -> None:
    async with open_world(FakeProvider(deltas=3)) as world:
        job_id = await ended(world, Mode.ASYNC)
        accepted = (await world.events(job_id))[0]
        assert isinstance(accepted, JobAccepted)
        assert accepted.body == BODY_BYTES
        # What the store answers for is what is there: request, frames and result.
        assert world.snapshots.held_bytes == world.log.held_bytes


@pytest.mark.parametrize("bound", [0, 1, 5])
async def test_only_so_many_records_stay(bound: int, autojump_clock: MockClock) -> None:
    async with open_world(attached_history=bound) as world:
        kept = await ended(world, Mode.ASYNC)
        job_ids = [await ended(world, mode) for mode in [Mode.PLAIN, Mode.STREAM] * 4]
        gone = len(job_ids) - bound
        for job_id in job_ids[:gone]:
            with pytest.raises(UnknownJobError):
                await world.log.read(job_id)
        for job_id in (kept, *job_ids[gone:]):
            assert (await world.events(job_id))[0].at > 0
        assert (await world.supervisor.result(kept, "me")).message


async def test_deleting_an_attached_record(autojump_clock: MockClock) -> None:
    async with open_world(attached_history=3) as world:
        first = await ended(world, Mode.PLAIN)
        await world.supervisor.delete(first, "me")
        with pytest.raises(JobNotFoundError):
            await world.supervisor.describe(first, "me")
        for _ in range(5):
            last = await ended(world, Mode.STREAM)
        await world.supervisor.describe(last, "me")


async def test_over_http(http_clock: MockClock) -> None:
    async with open_fake_gateway(FakeProvider(deltas=3)) as gateway:
        async with start(gateway.url, "POST", "/v1/messages", {}, {**BODY, "stream": True}) as call:
            job_id = (await call.head()).job_id
            await call.events()
        job = await request(gateway.url, "GET", f"/v1/jobs/{job_id}")
        assert (job.status, job.json["status"], job.json["usage"]) == (200, "completed", USAGE)
        events = await request(gateway.url, "GET", f"/v1/jobs/{job_id}/events")
        assert events.status == 200
        assert b"count" in events.body
        assert BODY["messages"][0]["content"] not in str(events.json["data"][0])
        assert b"text_delta" not in events.body
        assert (await poll(gateway.url, job_id)).status == 404
        assert (await request(gateway.url, "GET", f"/v1/jobs/{job_id}/stream")).status == 404
        assert gateway.log.held_bytes == 0
