"""Admission: what is refused, with which words, and what a refusal must not cost those already taken."""

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from actors.errors import NoSuchModelError, OverloadedError
from actors.submission import SubmitJob
from events.errors import LogUnavailableError
from events.snapshots import RESERVED_RESULT_BYTES
from events.types import JobAccepted, Mode
from tests.support.gateway import BODY, open_fake_gateway, poll, post, request, start
from tests.support.providers import FakeProvider
from tests.support.world import open_world

ASYNC = {"x-bf-async": "true"}


@pytest.mark.parametrize("mode", [Mode.PLAIN, Mode.STREAM, Mode.ASYNC])
async def test_no_more_than_max_in_flight(mode: Mode, autojump_clock: MockClock) -> None:
    async with open_world(FakeProvider(stall_at="connect"), max_in_flight=3) as world:
        jobs = [await world.submit(mode) for _ in range(3)]
        kept_bytes = world.snapshots.held_bytes
        for _ in range(5):
            with pytest.raises(OverloadedError) as refusal:
                await world.submit(mode)
            assert refusal.value.failure.status == 529
            assert dict(refusal.value.headers)["retry-after"] == "1"
        assert world.supervisor.in_flight == 3
        assert world.snapshots.held_bytes == kept_bytes
        await wait_all_tasks_blocked()
        assert len(world.provider.calls) == 3
        await world.supervisor.cancel(jobs[0][0].job_id, "me", by="me")
        await world.submit(mode)
        assert world.supervisor.in_flight == 3


async def test_over_http_it_is_529_with_retry_after(http_clock: MockClock) -> None:
    fake = FakeProvider(stall_at="connect")
    async with open_fake_gateway(fake, jobs={"max_in_flight": 1}) as gateway:
        job_id = (await post(gateway.url, ASYNC)).job_id
        for answer in (
            await post(gateway.url, ASYNC),
            await post(gateway.url),
            await post(gateway.url, stream=True),
        ):
            assert (answer.status, answer.error_type) == (529, "overloaded_error")
            assert answer.headers["retry-after"] == "1"
            assert "x-bf-async-id" not in answer.headers
        assert len((await request(gateway.url, "GET", "/v1/jobs")).json["data"]) == 1
        fake.release.set()
        await poll(gateway.url, job_id, prefer="wait=9")
        assert (await post(gateway.url)).status == 200


async def test_a_full_store_refuses_what_it_would_have_to_keep(autojump_clock: MockClock) -> None:
    body = b"x" * 1000
    room = 2 * (RESERVED_RESULT_BYTES + len(body))
    async with open_world(FakeProvider(deltas=3), max_snapshot_bytes=room) as world:
        kept = [(await world.submit(Mode.ASYNC, body=body, ttl_s=100))[0] for _ in range(2)]
        for options in ({"mode": Mode.ASYNC}, {"mode": Mode.STREAM, "detached": True}, {"may_detach": True}):
            with pytest.raises(OverloadedError) as refusal:
                await world.submit(body=body, **options)
            assert dict(refusal.value.headers)["retry-after"] == "30"
        attached = [(await world.submit(mode, body=body))[0] for mode in (Mode.PLAIN, Mode.STREAM)]
        for actor in (*kept, *attached):
            await actor.ended.wait()
        # The results turned out smaller than the room set aside for them.
        assert world.snapshots.held_bytes < room
        assert world.supervisor.in_flight == 0
        for actor in kept:
            assert (await world.supervisor.result(actor.job_id, "me")).message == actor.answer


async def test_what_was_promised_is_kept_even_when_it_is_larger(autojump_clock: MockClock) -> None:
    fake = FakeProvider(deltas=500)
    async with open_world(fake, max_snapshot_bytes=2 * RESERVED_RESULT_BYTES + 100) as world:
        actors = [(await world.submit(Mode.ASYNC, ttl_s=100))[0] for _ in range(2)]
        for actor in actors:
            await actor.ended.wait()
        assert world.snapshots.held_bytes > 10 * RESERVED_RESULT_BYTES
        with pytest.raises(OverloadedError):
            await world.submit(Mode.ASYNC)
        for actor in actors:
            assert (await world.supervisor.result(actor.job_id, "me")).message
        await trio.sleep(100)
        await wait_all_tasks_blocked()
        await world.submit(Mode.ASYNC)


async def test_a_full_store_over_http(http_clock: MockClock) -> None:
    async with open_fake_gateway(jobs={"max_snapshot_bytes": RESERVED_RESULT_BYTES + 500}) as gateway:
        headers = {**ASYNC, "x-bf-async-job-result-ttl": "10"}
        kept = await post(gateway.url, headers, metadata={"pad": "x" * 300})
        refused = await post(gateway.url, ASYNC, metadata={"pad": "x" * 300})
        assert (refused.status, refused.error_type) == (529, "overloaded_error")
        assert refused.headers["retry-after"] == "30"
        plain = await post(gateway.url)
        assert (plain.status, plain.headers["x-bf-async-status"]) == (200, "completed")
        async with start(gateway.url, "POST", "/v1/messages", {}, {**BODY, "stream": True}) as call:
            assert (await call.head()).status == 200
            assert (await call.events())[-1].event == "message_stop"
        assert (await poll(gateway.url, kept.job_id)).json["type"] == "message"
        await trio.sleep(10)
        assert (await post(gateway.url, headers)).status == 200


async def test_a_log_that_takes_nothing_accepts_nothing(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        world.log.refused = (JobAccepted,)
        for mode in (Mode.PLAIN, Mode.ASYNC):
            with pytest.raises(LogUnavailableError):
                await world.submit(mode)
        assert world.supervisor.in_flight == 0
        assert world.snapshots.held_bytes == 0
        assert world.provider.calls == []
        world.log.refused = ()
        actor, _ = await world.submit(Mode.ASYNC)
        await actor.ended.wait()


async def test_a_model_nobody_answers_costs_nothing() -> None:
    async with open_world() as world:
        world.targets._router._routes = ()
        with pytest.raises(NoSuchModelError):
            await world.supervisor.submit(
                SubmitJob(
                    owner="me",
                    body=b"{}",
                    fields={},
                    model="m",
                    mode=Mode.ASYNC,
                    detached=True,
                    result_ttl_s=1,
                )
            )
        assert world.supervisor.in_flight == 0
        assert world.snapshots.held_bytes == 0
