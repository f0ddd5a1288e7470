"""Places at a provider: who waits is pending, first in first out, and leaves the line with its client."""

from collections import Counter

import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from actors.circuit import CircuitPolicy
from actors.errors import UpstreamConnectionError
from actors.retry import RetryPolicy
from events.errors import LogUnavailableError
from events.state import JobState
from events.types import JobAccepted, JobFailed, Mode
from tests.support.gateway import BODY, Answer, open_fake_gateway, poll, post, request, start
from tests.support.providers import FakeProvider
from tests.support.scripted import Moody, says
from tests.support.world import World, open_world

ONE = {"fake": 1}


async def states(world: World) -> Counter[str]:
    """How many jobs are in which state."""
    return Counter(snapshot.state.value for snapshot in await world.log.unfinished())


async def test_who_waits_is_pending_and_comes_in_order(autojump_clock: MockClock) -> None:
    fake = FakeProvider(deltas=0, delay_s=10)
    async with open_world(fake, concurrency=ONE) as world:
        jobs = [(await world.submit(Mode.ASYNC))[0] for _ in range(4)]
        await wait_all_tasks_blocked()
        assert await states(world) == {"processing": 1, "pending": 3}
        assert [await world.kinds(job.job_id) for job in jobs[:2]] == [
            ["JobAccepted", "AttemptStarted"],
            ["JobAccepted"],
        ]
        assert [(one.working, one.waiting) for one in world.targets.providers()] == [(1, 3)]
        for number, job in enumerate(jobs, 1):
            await job.ended.wait()
            assert trio.current_time() == 10 * number
            assert job.snapshot.started_at == job.snapshot.ended_at - 10  # type: ignore[operator]  # it has ended
        assert await world.kinds(jobs[3].job_id) == [
            "JobAccepted",
            "AttemptStarted",
            "FramesReceived",
            "FramesReceived",
            "JobCompleted",
        ]


async def test_every_place_is_used_and_no_more(autojump_clock: MockClock) -> None:
    fake = FakeProvider(deltas=0, delay_s=10)
    async with open_world(fake, concurrency={"fake": 3}) as world:
        jobs = [(await world.submit(Mode.PLAIN))[0] for _ in range(7)]
        await wait_all_tasks_blocked()
        assert fake.open_calls == 3
        for job in jobs:
            await job.ended.wait()
        assert trio.current_time() == 30
        assert [call.opened_at for call in fake.calls] == [0, 0, 0, 10, 10, 10, 20]


async def test_a_client_that_leaves_leaves_the_line(autojump_clock: MockClock) -> None:
    fake = FakeProvider(deltas=0, delay_s=10)
    async with open_world(fake, concurrency=ONE) as world:
        first, _ = await world.submit()
        second, watch = await world.submit(Mode.STREAM)
        third, _ = await world.submit()
        await wait_all_tasks_blocked()
        watch.leave()
        await second.ended.wait()
        assert trio.current_time() == 0
        assert await world.kinds(second.job_id) == ["JobAccepted", "JobCancelled"]
        await third.ended.wait()
        assert trio.current_time() == 20
        assert first.snapshot.state is third.snapshot.state is JobState.COMPLETED
        assert len(fake.calls) == 2


async def test_batches_wait_behind_calls(autojump_clock: MockClock) -> None:
    fake = FakeProvider(deltas=0, delay_s=10)
    async with open_world(fake, concurrency=ONE) as world:
        modes = [Mode.PLAIN, Mode.BATCH, Mode.BATCH, Mode.ASYNC, Mode.PLAIN]
        jobs = [(await world.submit(mode, detached=mode is not Mode.PLAIN))[0] for mode in modes]
        ended = []
        for _ in jobs:
            await trio.sleep(10)
            await wait_all_tasks_blocked()
            ended.append(next(n for n, job in enumerate(jobs) if n not in ended and job.ended.is_set()))
        assert ended == [0, 3, 4, 1, 2]


async def test_one_full_provider_holds_nobody_else_up(autojump_clock: MockClock) -> None:
    slow, quick = FakeProvider(deltas=0, delay_s=10), FakeProvider(name="quick")
    async with open_world(slow, others=[quick], concurrency={"fake": 1, "quick": 1}) as world:
        for _ in range(3):
            await world.submit(Mode.ASYNC)
        actor, _ = await world.submit(Mode.ASYNC, model="quick/m")
        await actor.ended.wait()
        assert trio.current_time() == 0


async def test_a_submit_the_log_refuses_keeps_no_place(autojump_clock: MockClock) -> None:
    async with open_world(concurrency=ONE) as world:
        world.log.refused = (JobAccepted,)
        for _ in range(3):
            try:
                await world.submit()
            except LogUnavailableError:
                continue
            raise AssertionError("it was accepted")
        assert [(one.working, one.waiting) for one in world.targets.providers()] == [(0, 0)]


async def test_whose_turn_comes_when_the_circuit_is_open(autojump_clock: MockClock) -> None:
    """An attached job is told at once; a detached one waits for the upstream, within the bounds."""
    fake = FakeProvider(deltas=0, delay_s=10, raise_at={"first_frame": UpstreamConnectionError("gone")})
    policies = {"retries": RetryPolicy(max_retries=0, total_s=100), "circuits": CircuitPolicy(failures=1)}
    async with open_world(fake, concurrency=ONE, **policies) as world:  # type: ignore[arg-type]  # two of its policies
        first, _ = await world.submit(Mode.ASYNC)
        attached, _ = await world.submit(Mode.STREAM)
        detached, _ = await world.submit(Mode.ASYNC)
        await attached.ended.wait()
        assert trio.current_time() == 0
        assert isinstance(attached.terminal, JobFailed)
        assert attached.terminal.failure.status == 529
        assert attached.terminal.failure.headers == (("retry-after", "30"),)
        fake.raise_at.clear()
        await detached.ended.wait()
        assert trio.current_time() == 40
        assert await world.kinds(attached.job_id) == ["JobAccepted", "JobFailed"]
        assert first.snapshot.state is JobState.FAILED
        assert detached.snapshot.state is JobState.COMPLETED


async def test_a_circuit_that_opens_during_a_wait_does_not_hide_the_failure(
    autojump_clock: MockClock,
) -> None:
    fake = Moody(
        moods=[("connect", says(503, retry_after="5")), ("connect", UpstreamConnectionError("gone"))]
    )
    async with open_world(fake, retries=RetryPolicy(), circuits=CircuitPolicy(failures=2)) as world:
        waits, _ = await world.submit()
        await wait_all_tasks_blocked()
        opens, _ = await world.submit(may_rerun=False)
        await opens.ended.wait()
        await waits.ended.wait()
        assert trio.current_time() == 5
        assert waits.snapshot.failure is not None
        assert waits.snapshot.failure.status == 503
        assert await world.kinds(waits.job_id) == [
            "JobAccepted",
            "AttemptStarted",
            "AttemptFailed",
            "JobFailed",
        ]


async def test_patience_ends(autojump_clock: MockClock) -> None:
    fake = FakeProvider(deltas=0, delay_s=1, raise_at={"first_frame": UpstreamConnectionError("gone")})
    policies = {
        "retries": RetryPolicy(max_retries=0, total_s=100),
        "circuits": CircuitPolicy(failures=1, open_s=30),
    }
    async with open_world(fake, concurrency=ONE, **policies) as world:  # type: ignore[arg-type]  # two of its policies
        jobs = [(await world.submit(Mode.ASYNC))[0] for _ in range(9)]
        for job in jobs:
            await job.ended.wait()
        # A probe every 30 s, each of which is a job that fails by itself.
        assert len(fake.calls) == 4
        assert trio.current_time() <= 100


async def test_the_wire_says_pending(http_clock: MockClock) -> None:
    fake = FakeProvider(deltas=0, delay_s=30)
    async with open_fake_gateway(
        fake, providers=[{"name": "fake", "kind": "echo", "max_concurrency": 1}]
    ) as gateway:
        jobs = [(await post(gateway.url, {"x-bf-async": "true"})).job_id for _ in range(2)]
        await trio.sleep(5)
        answers: list[Answer] = [await poll(gateway.url, job) for job in jobs]
        assert [answer.headers["x-bf-async-status"] for answer in answers] == ["processing", "pending"]
        text = (await request(gateway.url, "GET", "/metrics")).body.decode()
        assert 'messagesd_provider_working{provider="fake"} 1.0' in text
        assert 'messagesd_provider_waiting{provider="fake"} 1.0' in text
        async with start(gateway.url, "POST", "/v1/messages", {}, {**BODY, "stream": True}):
            await fake.until_called(1)
            await trio.sleep(5)
            assert gateway.supervisor.in_flight == 3
        await trio.sleep(1)
        assert gateway.supervisor.in_flight == 2
        done = await poll(gateway.url, jobs[1], prefer="wait=600")
        assert done.headers["x-bf-async-status"] == "completed"
