"""What breaks in one job stays in that job."""

from collections.abc import Sequence

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from actors.commands import CRASH_FAILURE, UNRECORDED_FAILURE
from actors.errors import OverloadedError, UpstreamConnectionError
from actors.job import COMMIT_RETRY_S, COMMIT_TIMEOUT_S
from events.errors import LogUnavailableError
from events.state import JobState, project_state
from events.types import AttemptFailed, Event, JobCancelled, JobCompleted, JobFailed, Mode
from tests.support.gateway import BODY, kinds, open_fake_gateway, poll, post, start
from tests.support.providers import FakeProvider, Point
from tests.support.world import open_world

SECRET = "sk-not-to-be-shown"
CRASHES = [
    RuntimeError(SECRET),
    ExceptionGroup(SECRET, [ValueError(SECRET), KeyError(SECRET)]),
    OSError(SECRET),
    AssertionError(SECRET),
]


@pytest.mark.parametrize("crash", CRASHES, ids=lambda crash: type(crash).__name__)
@pytest.mark.parametrize(
    ("mode", "point"),
    [
        (Mode.PLAIN, "connect"),
        (Mode.PLAIN, "last_frame"),
        (Mode.STREAM, "connect"),
        (Mode.STREAM, "first_frame"),
        (Mode.STREAM, "mid_stream"),
        (Mode.ASYNC, "last_frame"),
    ],
)
async def test_a_provider_that_crashes(
    crash: Exception, mode: Mode, point: Point, autojump_clock: MockClock
) -> None:
    sound = FakeProvider(name="sound", deltas=4, delay_s=1)
    async with open_world(FakeProvider(raise_at={point: crash}), others=[sound]) as world:
        bystander, _ = await world.submit(mode, model="sound/m")
        broken, _ = await world.submit(mode)
        await broken.ended.wait()
        assert broken.snapshot.failure == CRASH_FAILURE
        assert isinstance(broken.terminal, JobFailed)
        assert project_state(await world.events(broken.job_id)) is JobState.FAILED
        assert world.supervisor.in_flight == 1
        await bystander.ended.wait()
        assert trio.current_time() == 5
        assert bystander.snapshot.state is JobState.COMPLETED
        assert world.supervisor.in_flight == 0
        assert world.logged("job.crashed") == 1


async def test_an_upstream_error_is_no_crash() -> None:
    error = UpstreamConnectionError("the connection broke")
    async with open_world(FakeProvider(raise_at={"connect": error})) as world:
        actor, _ = await world.submit(Mode.STREAM)
        await actor.ended.wait()
        assert actor.snapshot.failure == error.failure
        assert world.logged("job.crashed") == 0
        (failed,) = [event for event in await world.events(actor.job_id) if isinstance(event, AttemptFailed)]
        assert failed.failure == error.failure


async def test_a_crash_over_http_says_nothing_of_itself(http_clock: MockClock) -> None:
    fake = FakeProvider(deltas=2, raise_at={"last_frame": ExceptionGroup(SECRET, [RuntimeError(SECRET)])})
    async with open_fake_gateway(fake) as gateway:
        plain = await post(gateway.url)
        assert (plain.status, plain.error_type) == (500, "api_error")
        async with start(gateway.url, "POST", "/v1/messages", {}, {**BODY, "stream": True}) as call:
            await call.head()
            events = await call.events()
        assert kinds(events)[-1] == "error"
        assert events[-1].data["error"]["type"] == "api_error"
        assert "message_stop" not in kinds(events)
        job_id = (await post(gateway.url, {"x-bf-async": "true"})).job_id
        kept = await poll(gateway.url, job_id, prefer="wait=9")
        assert (kept.status, kept.error_type) == (500, "api_error")
        assert kept.headers["x-should-retry"] == "false"
        for text in (plain.body.decode(), str(events), kept.body.decode()):
            assert SECRET not in text
        fake.raise_at.clear()
        assert (await post(gateway.url)).status == 200


async def test_a_promised_end_is_offered_again_until_the_log_takes_it(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        world.log.refused = (JobCompleted,)
        actor, _ = await world.submit(Mode.ASYNC)
        await trio.sleep(3600)
        assert not actor.ended.is_set()
        assert (await world.supervisor.result(actor.job_id, "me")).state is JobState.PROCESSING
        world.log.refused = ()
        with trio.fail_after(2 * COMMIT_RETRY_S):
            await actor.ended.wait()
        assert (await world.supervisor.result(actor.job_id, "me")).message == actor.answer != b""
        assert (await world.kinds(actor.job_id)).count("JobCompleted") == 1


async def test_a_promised_end_that_cannot_be_recorded_does_not_hold_up_shutdown(
    autojump_clock: MockClock,
) -> None:
    async with open_world() as world:
        world.log.refused = (JobCompleted, JobFailed)
        actor, _ = await world.submit(Mode.ASYNC)
        await trio.sleep(10)
        began = trio.current_time()
        await world.supervisor.drain(5)
        assert trio.current_time() - began <= 5 + COMMIT_RETRY_S
        assert actor.snapshot.failure == UNRECORDED_FAILURE


@pytest.mark.parametrize("mode", [Mode.PLAIN, Mode.STREAM])
async def test_a_log_that_refuses_the_end(mode: Mode, autojump_clock: MockClock) -> None:
    async with open_world() as world:
        world.log.refused = (JobCompleted,)
        actor, watch = await world.submit(mode)
        with trio.fail_after(60):
            await actor.ended.wait()
        assert actor.snapshot.failure == UNRECORDED_FAILURE
        assert actor.answer == b""
        watch.leave()
        await wait_all_tasks_blocked()
        assert world.supervisor.in_flight == 0
        assert world.logged("job.end_unrecorded") == 1
        world.log.refused = ()
        other, _ = await world.submit(mode)
        await other.ended.wait()
        assert other.snapshot.state is JobState.COMPLETED


async def test_a_log_that_refuses_even_the_failure(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        world.log.refused = (AttemptFailed, JobFailed)
        world.provider.raise_at["connect"] = UpstreamConnectionError("no connection")
        actor, _ = await world.submit(Mode.PLAIN)
        with trio.fail_after(60):
            await actor.ended.wait()
        assert actor.snapshot.failure == UNRECORDED_FAILURE


async def test_a_log_that_refuses_a_cancellation(autojump_clock: MockClock) -> None:
    async with open_world(FakeProvider(stall_at="mid_stream")) as world:
        world.log.refused = (JobCancelled,)
        actor, _ = await world.submit(Mode.ASYNC)
        await world.provider.stalled.wait()
        with trio.fail_after(60), pytest.raises(OverloadedError):
            await world.supervisor.cancel(actor.job_id, "me", by="me")
        assert world.provider.open_calls == 0
        world.log.refused = ()
        snapshot = await world.supervisor.cancel(actor.job_id, "me", by="me")
        assert snapshot.state is JobState.CANCELLED


async def test_a_log_that_refuses_the_end_over_http(
    http_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_fake_gateway(FakeProvider(delay_s=1)) as gateway:
        with monkeypatch.context() as patch:
            append = gateway.log.append

            async def refuse(
                job_id: str, events: Sequence[Event], expected_seq: int, *, deferred: bool = False
            ) -> int:
                if isinstance(events[-1], JobCompleted):
                    raise LogUnavailableError("the disk is full")
                return await append(job_id, events, expected_seq, deferred=deferred)

            patch.setattr(gateway.log, "append", refuse)
            answer = await post(gateway.url)
            assert (answer.status, answer.error_type) == (500, "api_error")
            async with start(gateway.url, "POST", "/v1/messages", {}, {**BODY, "stream": True}) as call:
                await call.head()
                events = await call.events()
            # The frames had left; that their end is on record is what failed.
            assert kinds(events)[-2:] == ["message_stop", "error"]
        assert (await post(gateway.url)).status == 200
        assert gateway.supervisor.in_flight == 0


async def test_content_that_cannot_be_dropped_now_ends_nothing_else(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_world() as world:
        with monkeypatch.context() as patch:

            async def refuse(job_id: str) -> None:
                raise LogUnavailableError("the disk is full")

            patch.setattr(world.log, "redact", refuse)
            actor, watch = await world.submit(Mode.STREAM)
            await actor.ended.wait()
            watch.leave()
            await trio.sleep(10 * COMMIT_RETRY_S)
            assert world.log.held_bytes > 0
        await trio.sleep(2 * COMMIT_RETRY_S)
        assert world.log.held_bytes == 0
        other, _ = await world.submit(Mode.PLAIN)
        await other.ended.wait()
        assert other.snapshot.state is JobState.COMPLETED


async def test_an_actor_that_crashes_after_its_job_ends_alone(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_world() as world:

        async def crash(job_id: str) -> None:
            raise RuntimeError(SECRET)

        monkeypatch.setattr(world.log, "redact", crash)
        actor, watch = await world.submit(Mode.PLAIN)
        await actor.ended.wait()
        watch.leave()
        await wait_all_tasks_blocked()
        assert world.logged("job.actor_crashed") == 1
        other, _ = await world.submit(Mode.ASYNC)
        await other.ended.wait()
        assert other.snapshot.state is JobState.COMPLETED


async def test_a_job_refused_for_a_slow_log_does_not_stay_in_it(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_world() as world:
        append = world.log.append

        async def never_answers(
            job_id: str, events: Sequence[Event], expected_seq: int, *, deferred: bool = False
        ) -> int:
            await append(job_id, events, expected_seq, deferred=deferred)
            return await trio.sleep_forever()

        monkeypatch.setattr(world.log, "durable", True)
        monkeypatch.setattr(world.log, "append", never_answers)
        with pytest.raises(trio.TooSlowError):
            await world.submit(Mode.ASYNC)
        await wait_all_tasks_blocked()
        assert await world.log.unfinished() == []
        assert world.supervisor.in_flight == 0


async def test_a_stream_whose_record_the_disk_does_not_take_fails_in_time(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_world(FakeProvider(delay_s=1)) as world:

        async def hangs(job_id: str) -> None:
            await trio.sleep_forever()

        monkeypatch.setattr(world.log, "settle", hangs)
        actor, _ = await world.submit(Mode.STREAM)
        with trio.fail_after(2 * COMMIT_TIMEOUT_S):
            await actor.ended.wait()
        assert actor.snapshot.state is JobState.FAILED
        assert actor.frames == 0
