"""``Prefer: wait``: exact times, and what becomes of the job when the wait is over."""

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from actors.commands import CancelJob, DetachJob
from events.state import JobState
from events.types import JobDetached, Mode
from tests.support.gateway import BODY, open_fake_gateway, poll, post, request, start
from tests.support.providers import FakeProvider, text_of
from tests.support.world import open_world

# Three pieces of text, a second before the opening and each of them: done after 4 s.
DONE_S = 4.0


def provider() -> FakeProvider:
    return FakeProvider(deltas=3, delay_s=1)


async def test_done_within_the_wait(http_clock: MockClock) -> None:
    async with open_fake_gateway(provider()) as gateway:
        answer = await post(gateway.url, {"prefer": "wait=5"})
        assert trio.current_time() == DONE_S
        assert answer.status == 200
        assert answer.headers["preference-applied"] == "wait=5"
        assert answer.headers["x-bf-async-status"] == "completed"
        assert answer.json["content"] == [{"type": "text", "text": text_of(3)}]
        # It was never cut loose, so nothing is kept.
        assert gateway.supervisor.kept_bytes == 0
        assert (await poll(gateway.url, answer.job_id)).status == 404


async def test_the_wait_runs_out_and_the_job_goes_on(http_clock: MockClock) -> None:
    fake = provider()
    async with open_fake_gateway(fake) as gateway:
        answer = await post(gateway.url, {"prefer": "wait=2.5", "x-bf-async-job-result-ttl": "10"})
        assert trio.current_time() == 2.5
        assert answer.status == 200
        assert answer.headers["preference-applied"] == "wait=2.5"
        assert answer.headers["x-bf-async-status"] == "processing"
        assert answer.headers["retry-after"] == "1"
        assert answer.json["id"] == answer.job_id
        assert answer.json["content"] == []
        finished = await poll(gateway.url, answer.job_id, prefer="wait=60")
        assert trio.current_time() == DONE_S
        assert finished.headers["preference-applied"] == "wait=60"
        assert finished.json["content"] == [{"type": "text", "text": text_of(3)}]
        assert (await poll(gateway.url, answer.job_id)).json == finished.json
        await trio.sleep_until(DONE_S + 10)
        assert (await poll(gateway.url, answer.job_id)).status == 404
        assert len(fake.calls) == 1


async def test_wait_0_is_an_async_submit(http_clock: MockClock) -> None:
    async with open_fake_gateway(provider()) as gateway:
        answer = await post(gateway.url, {"prefer": "wait=0"})
        assert trio.current_time() == 0
        assert answer.headers["preference-applied"] == "wait=0"
        assert (await poll(gateway.url, answer.job_id, prefer="wait=9")).json["content"]
        assert trio.current_time() == DONE_S


@pytest.mark.parametrize(("wait_s", "until_s"), [(1, 1), (3.5, 3.5), (600, 4), (99999, 4)])
async def test_a_poll_waits(wait_s: float, until_s: float, http_clock: MockClock) -> None:
    async with open_fake_gateway(provider()) as gateway:
        job_id = (await post(gateway.url, {"x-bf-async": "true"})).job_id
        answer = await poll(gateway.url, job_id, prefer=f"wait={wait_s}")
        assert trio.current_time() == until_s
        done = until_s == DONE_S
        assert answer.headers["x-bf-async-status"] == ("completed" if done else "processing")
        assert answer.headers["preference-applied"] == f"wait={min(wait_s, 600):g}"


async def test_a_wait_is_bounded_by_the_settings(http_clock: MockClock) -> None:
    async with open_fake_gateway(FakeProvider(stall_at="connect"), jobs={"max_wait_s": 7}) as gateway:
        answer = await post(gateway.url, {"prefer": "wait=1000000"})
        assert trio.current_time() == 7
        assert answer.headers["preference-applied"] == "wait=7"
        await gateway.supervisor.cancel(answer.job_id, None, by="test")


@pytest.mark.parametrize("value", ["wait=x", "wait=-1", "respond-async", "wait=nan", "wait", ""])
async def test_a_preference_we_cannot_read_is_ignored(value: str, http_clock: MockClock) -> None:
    async with open_fake_gateway(provider()) as gateway:
        answer = await post(gateway.url, {"prefer": value})
        assert trio.current_time() == DONE_S
        assert answer.json["content"] == [{"type": "text", "text": text_of(3)}]
        assert "preference-applied" not in answer.headers


async def test_leaving_during_the_wait_stops_the_job(http_clock: MockClock) -> None:
    fake = FakeProvider(stall_at="mid_stream")
    async with open_fake_gateway(fake) as gateway:
        async with start(gateway.url, "POST", "/v1/messages", {"prefer": "wait=60"}, BODY):
            await fake.stalled.wait()
            await trio.sleep(59)
            assert fake.open_calls == 1
        left_at = trio.current_time()
        await trio.sleep(0.125)
        assert fake.calls[0].cancelled
        assert fake.calls[0].closed_at == left_at
        assert gateway.supervisor.kept_bytes == 0
        assert gateway.log.held_bytes == 0


async def test_leaving_after_the_wait_does_not(http_clock: MockClock) -> None:
    fake = provider()
    async with open_fake_gateway(fake) as gateway:
        async with start(gateway.url, "POST", "/v1/messages", {"prefer": "wait=1"}, BODY) as call:
            job_id = (await call.answer()).job_id
        answer = await poll(gateway.url, job_id, prefer="wait=60")
        assert answer.headers["x-bf-async-status"] == "completed"
        assert not fake.calls[0].cancelled


async def test_leaving_a_poll_stops_nothing(http_clock: MockClock) -> None:
    fake = provider()
    async with open_fake_gateway(fake) as gateway:
        job_id = (await post(gateway.url, {"x-bf-async": "true"})).job_id
        headers = {"x-bf-async-id": job_id, "prefer": "wait=60"}
        async with start(gateway.url, "POST", "/v1/messages", headers):
            await trio.sleep(1)
        answer = await poll(gateway.url, job_id, prefer="wait=60")
        assert answer.headers["x-bf-async-status"] == "completed"


@pytest.mark.parametrize("failing", [False, True])
async def test_the_end_and_the_end_of_the_wait_at_one_moment(failing: bool, http_clock: MockClock) -> None:
    """Both at 4 s. Either answer will do, but a pending one must have a result to come back for."""
    for _ in range(40):
        fake = provider()
        if failing:
            fake.raise_at["last_frame"] = RuntimeError("boom")
        began_at = trio.current_time()
        async with open_fake_gateway(fake) as gateway:
            with trio.fail_after(60):
                answer = await post(gateway.url, {"prefer": "wait=4"})
            assert trio.current_time() == began_at + DONE_S
            if answer.headers["x-bf-async-status"] == "processing":
                answer = await poll(gateway.url, answer.job_id, prefer="wait=1")
            if failing:
                assert (answer.status, answer.error_type) == (500, "api_error")
            else:
                assert answer.json["content"] == [{"type": "text", "text": text_of(3)}]


async def test_cancelled_at_the_end_of_the_wait(http_clock: MockClock) -> None:
    """A cancelled job answers 409 to who waited for it, or to who polls it then; never nothing."""
    for _ in range(20):
        fake = FakeProvider(stall_at="mid_stream")
        async with open_fake_gateway(fake) as gateway:
            began_at = trio.current_time()

            async def cancel(url: str = gateway.url, began_at: float = began_at) -> None:
                (job,) = (await request(url, "GET", "/v1/jobs")).json["data"]
                await trio.sleep_until(began_at + 5)
                await request(url, "POST", f"/v1/jobs/{job['id']}/cancel", body={})

            async with (
                trio.open_nursery() as nursery,
                start(gateway.url, "POST", "/v1/messages", {"prefer": "wait=5"}, BODY) as call,
            ):
                await fake.stalled.wait()
                nursery.start_soon(cancel)
                with trio.fail_after(60):
                    answer = await call.answer()
            if answer.headers["x-bf-async-status"] == "processing":
                answer = await poll(gateway.url, answer.job_id, prefer="wait=1")
            assert (answer.status, answer.error_type) == (409, "conflict_error")


async def test_detaching_is_recorded_with_its_own_time_to_live(autojump_clock: MockClock) -> None:
    async with open_world(provider()) as world:
        actor, watch = await world.submit(Mode.PLAIN, may_detach=True, ttl_s=60)
        await trio.sleep(1.5)
        command = DetachJob(result_ttl_s=20)
        assert actor.tell(command)
        await command.done.wait()
        watch.leave()
        await actor.ended.wait()
        (detached,) = [e for e in await world.events(actor.job_id) if isinstance(e, JobDetached)]
        assert detached.result_ttl_s == 20
        assert actor.snapshot.expires_at == (actor.snapshot.ended_at or 0) + 20
        assert (await world.supervisor.result(actor.job_id, "me")).message == actor.answer


async def test_a_detach_that_comes_too_late_is_answered_all_the_same(autojump_clock: MockClock) -> None:
    async with open_world(FakeProvider(stall_at="mid_stream")) as world:
        actor, _ = await world.submit(Mode.PLAIN, may_detach=True)
        await world.provider.stalled.wait()
        commands = [DetachJob(1), DetachJob(2)]
        assert actor.tell(CancelJob("me", "enough"))
        assert all(actor.tell(command) for command in commands)
        await wait_all_tasks_blocked()
        assert all(command.done.is_set() for command in commands)
        assert actor.snapshot.state is JobState.CANCELLED
        assert not actor.tell(DetachJob(3))


async def test_an_attached_wait_gives_its_reserved_room_back(autojump_clock: MockClock) -> None:
    async with open_world(provider()) as world:
        actor, watch = await world.submit(Mode.PLAIN, may_detach=True)
        assert world.snapshots.held_bytes > 0
        await actor.ended.wait()
        watch.leave()
        await wait_all_tasks_blocked()
        assert world.snapshots.held_bytes == 0
        assert world.log.held_bytes == 0
