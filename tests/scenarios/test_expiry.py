"""Results go at their deadline: to the moment, in any order, and without anybody looking at a clock."""

import random

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from actors.errors import JobNotFoundError
from actors.expiry import RETRY_S
from actors.job import JobActor
from events.state import JobState
from events.types import JobExpired, Mode
from tests.support.gateway import open_fake_gateway, poll, post, request, start
from tests.support.providers import FakeProvider
from tests.support.world import World, open_world


async def finished(world: World, *, ttl_s: float) -> JobActor:
    """An async job that has ended."""
    actor, watch = await world.submit(Mode.ASYNC, ttl_s=ttl_s)
    watch.leave()
    await actor.ended.wait()
    return actor


async def kept(world: World, actor: JobActor) -> bool:
    try:
        await world.supervisor.result(actor.job_id, "me")
    except JobNotFoundError:
        return False
    return True


def assert_nothing_left(world: World) -> None:
    assert len(world.snapshots) == 0
    assert world.snapshots.held_bytes == 0
    assert world.snapshots.next_deadline() is None
    assert world.log.held_bytes == 0


async def test_time_to_live_counts_from_completion(autojump_clock: MockClock) -> None:
    async with open_world(FakeProvider(deltas=3, delay_s=25)) as world:
        actor = await finished(world, ttl_s=10)
        assert trio.current_time() == 100
        await trio.sleep_until(109.75)
        assert await kept(world, actor)
        assert world.log.held_bytes > 0
        await trio.sleep_until(110)
        assert not await kept(world, actor)
        await wait_all_tasks_blocked()
        assert_nothing_left(world)
        with pytest.raises(JobNotFoundError):
            await world.supervisor.describe(actor.job_id, "me")


async def test_a_poll_at_the_very_deadline_finds_nothing(autojump_clock: MockClock) -> None:
    """Whoever runs first at that moment, the expiry task or the poll: the deadline itself is too late."""
    async with open_world() as world:
        for _ in range(50):
            actor = await finished(world, ttl_s=2)
            deadline = trio.current_time() + 2
            with trio.move_on_at(deadline):
                await trio.sleep_forever()
            assert trio.current_time() == deadline
            assert not await kept(world, actor)


async def test_many_deadlines_in_any_order(autojump_clock: MockClock) -> None:
    rng = random.Random(11)
    async with open_world() as world:
        deadlines: dict[JobActor, float] = {}
        for ttl_s in rng.sample(range(1, 500), 60):
            deadlines[await finished(world, ttl_s=ttl_s)] = trio.current_time() + ttl_s
            await trio.sleep(rng.choice([0, 0.25, 1]))
            for actor, at in deadlines.items():
                assert await kept(world, actor) is (trio.current_time() < at)
        looks = world.snapshots.looks
        left = sorted(at for at in deadlines.values() if at > trio.current_time())
        for at in left:
            await trio.sleep_until(at - 0.125)
            assert sum([await kept(world, actor) for actor in deadlines]) == sum(
                other >= at for other in left
            )
            await trio.sleep_until(at)
            assert sum([await kept(world, actor) for actor in deadlines]) == sum(other > at for other in left)
        await wait_all_tasks_blocked()
        assert_nothing_left(world)
        # One wake-up for each moment at which something was due, and none in between.
        assert world.snapshots.looks - looks == len(set(left))


async def test_the_task_sleeps_when_there_is_nothing_sooner(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        await finished(world, ttl_s=1000)
        await wait_all_tasks_blocked()
        assert world.snapshots.looks == 0
        # Later deadlines than the next one wake nobody.
        for ttl_s in (2000, 3000, 5000):
            await finished(world, ttl_s=ttl_s)
        await wait_all_tasks_blocked()
        assert world.snapshots.looks == 0
        await finished(world, ttl_s=500)
        await wait_all_tasks_blocked()
        assert world.snapshots.looks == 0
        await trio.sleep(80_000)
        assert world.snapshots.looks == 5
        assert_nothing_left(world)


async def test_same_deadline(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        for _ in range(50):
            await finished(world, ttl_s=30)
        await wait_all_tasks_blocked()
        looks = world.snapshots.looks
        await trio.sleep(31)
        assert_nothing_left(world)
        assert world.snapshots.looks == looks + 1


async def test_deleted_before_the_deadline(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        first = await finished(world, ttl_s=10)
        second = await finished(world, ttl_s=20)
        await trio.sleep(5)
        await world.supervisor.delete(first.job_id, "me")
        assert not await kept(world, first)
        assert await kept(world, second)
        await trio.sleep_until(20)
        assert not await kept(world, second)
        await wait_all_tasks_blocked()
        assert_nothing_left(world)
        assert world.logged("job.expiry_failed") == 0


@pytest.mark.parametrize("state", [JobState.FAILED, JobState.CANCELLED])
async def test_failures_and_cancellations_expire_too(state: JobState, autojump_clock: MockClock) -> None:
    fake = FakeProvider(stall_at="last_frame")
    if state is JobState.FAILED:
        fake.raise_at["last_frame"] = RuntimeError("boom")
    async with open_world(fake) as world:
        actor, _ = await world.submit(Mode.ASYNC, ttl_s=10)
        if state is JobState.CANCELLED:
            await fake.stalled.wait()
            await world.supervisor.cancel(actor.job_id, "me", by="me")
        await actor.ended.wait()
        assert (await world.supervisor.result(actor.job_id, "me")).state is state
        await trio.sleep(9.75)
        assert await kept(world, actor)
        await trio.sleep(0.25)
        assert not await kept(world, actor)


async def test_a_log_that_cannot_record_it_is_tried_again(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        actor = await finished(world, ttl_s=10)
        world.log.refused = (JobExpired,)
        await trio.sleep_until(10 + 3 * RETRY_S - 1)
        assert world.log.refusals == 3
        # The result is gone on time, recorded or not.
        assert not await kept(world, actor)
        with pytest.raises(JobNotFoundError):
            await world.supervisor.describe(actor.job_id, "me")
        assert world.log.held_bytes > 0
        world.log.refused = ()
        await trio.sleep(RETRY_S)
        assert_nothing_left(world)
        looks = world.snapshots.looks
        await trio.sleep(1000)
        assert world.snapshots.looks == looks


async def test_over_http(http_clock: MockClock) -> None:
    async with open_fake_gateway(FakeProvider(delay_s=1)) as gateway:
        short = await post(gateway.url, {"x-bf-async": "true", "x-bf-async-job-result-ttl": "5"})
        standard = await post(gateway.url, {"x-bf-async": "true"})
        # Both end at 4 s; the default time to live is an hour.
        await trio.sleep_until(8.75)
        assert (await poll(gateway.url, short.job_id)).headers["x-bf-async-status"] == "completed"
        assert (await request(gateway.url, "GET", f"/v1/jobs/{short.job_id}")).status == 200
        await trio.sleep_until(9)
        for answer in (
            await poll(gateway.url, short.job_id),
            await request(gateway.url, "GET", f"/v1/jobs/{short.job_id}"),
            await request(gateway.url, "GET", f"/v1/jobs/{short.job_id}/stream"),
        ):
            assert (answer.status, answer.error_type) == (404, "not_found_error")
        ids = [job["id"] for job in (await request(gateway.url, "GET", "/v1/jobs")).json["data"]]
        assert ids == [standard.job_id]
        await trio.sleep_until(4 + 3600 - 0.25)
        assert (await poll(gateway.url, standard.job_id)).status == 200
        await trio.sleep_until(4 + 3600)
        assert (await poll(gateway.url, standard.job_id)).status == 404
        await trio.sleep(1)
        assert gateway.log.held_bytes == 0
        assert gateway.supervisor.kept_bytes == 0


@pytest.mark.parametrize("way", ["expired", "deleted"])
async def test_a_slow_reader_of_what_is_gone_is_told(way: str, http_clock: MockClock) -> None:
    """A stream that cannot be read to its end must not look as if it had ended."""
    fake = FakeProvider(deltas=200, pad_bytes=1 << 17)
    async with open_fake_gateway(fake) as gateway:
        headers = {"x-bf-async": "true", "x-bf-async-job-result-ttl": "60"}
        job_id = (await post(gateway.url, headers)).job_id
        await poll(gateway.url, job_id, prefer="wait=60")
        async with start(gateway.url, "GET", f"/v1/jobs/{job_id}/stream") as call:
            await call.head()
            await call.events(2)
            if way == "expired":
                await trio.sleep(61)
            else:
                await request(gateway.url, "DELETE", f"/v1/jobs/{job_id}")
            assert gateway.log.held_bytes == 0
            events = await call.events()
        assert "message_stop" not in [event.event for event in events]
        assert events[-1].event == "error"
        assert events[-1].data["error"]["type"] == "not_found_error"
