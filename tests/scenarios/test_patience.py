"""Detached jobs whose failure leaves no target that can be asked: they wait for one, within the bounds."""

import pytest
import trio
from trio.testing import MockClock

from actors.circuit import CircuitPolicy
from actors.errors import ProviderError, UnsupportedError
from actors.retry import RetryPolicy
from events.state import JobState
from events.types import AttemptFailed, Mode
from tests.support.providers import FakeProvider
from tests.support.scripted import Moody, says, told
from tests.support.world import open_world

OPENS = CircuitPolicy(failures=1, open_s=30)
STEADY = RetryPolicy(backoff_s=0)
ONCE = RetryPolicy(backoff_s=0, max_retries=0)


async def test_a_job_that_opened_the_last_circuit_waits_for_the_probe(autojump_clock: MockClock) -> None:
    fake = Moody(moods=[("connect", says(503))])
    async with open_world(fake, retries=STEADY, circuits=OPENS, concurrency={"fake": 1}) as world:
        actor, _ = await world.submit(Mode.ASYNC)
        await trio.sleep(10)
        assert actor.waiting
        # Whoever waits for the circuit keeps nobody from a place.
        assert [one.working for one in world.targets.providers()] == [0]
        await actor.ended.wait()
        assert trio.current_time() == 30
        assert await told(world, actor.job_id) == [(1, "fake", "m"), (1, 503, "retry"), (2, "fake", "m")]
        waits = [e.retry_after_s for e in await world.events(actor.job_id) if isinstance(e, AttemptFailed)]
        assert waits == [30]
        assert actor.snapshot.state is JobState.COMPLETED


async def test_an_attached_one_is_told_at_once(autojump_clock: MockClock) -> None:
    fake = Moody(moods=[("connect", says(503))])
    async with open_world(fake, retries=STEADY, circuits=OPENS) as world:
        actor, _ = await world.submit(Mode.STREAM)
        await actor.ended.wait()
        assert trio.current_time() == 0
        assert await told(world, actor.job_id) == [(1, "fake", "m"), (1, 503, "give_up")]


@pytest.mark.parametrize(
    ("policy", "asked_at"),
    [
        (STEADY, [0, 30, 60]),
        (RetryPolicy(backoff_s=0, max_attempts=2), [0, 30]),
        (RetryPolicy(backoff_s=0, total_s=45), [0, 30]),
        (RetryPolicy(backoff_s=0, total_s=20), [0]),
        (ONCE, [0]),
    ],
)
async def test_its_patience_has_the_bounds_of_the_retries(
    policy: RetryPolicy, asked_at: list[float], autojump_clock: MockClock
) -> None:
    fake = FakeProvider(raise_at={"connect": says(503)})
    async with open_world(fake, retries=policy, circuits=OPENS) as world:
        actor, _ = await world.submit(Mode.ASYNC)
        await actor.ended.wait()
        assert [call.opened_at for call in fake.calls] == asked_at
        assert trio.current_time() == asked_at[-1]
        assert actor.snapshot.failure is not None
        assert actor.snapshot.failure.status == 503


async def test_a_wait_that_the_probe_of_another_prolongs_is_bounded_too(autojump_clock: MockClock) -> None:
    """One of two finds that the probe is out, and might wait for as long again."""
    policy = RetryPolicy(backoff_s=0, total_s=50)
    fake = Moody(moods=[("connect", says(503))] * 2, delay_s=1)
    async with open_world(fake, retries=policy, circuits=OPENS) as world:
        jobs = [(await world.submit(Mode.ASYNC))[0] for _ in range(2)]
        await trio.sleep(30.5)
        (ended,) = [job for job in jobs if job.ended.is_set()]
        assert ended.snapshot.failure is not None
        assert ended.snapshot.failure.status == 503
        for job in jobs:
            await job.ended.wait()
        assert {job.snapshot.state for job in jobs} == {JobState.FAILED, JobState.COMPLETED}
        assert len(fake.calls) == 3


@pytest.mark.parametrize("failure", [says(503), UnsupportedError("container: no", status=400)])
async def test_a_target_whose_circuit_is_open_is_fallen_back_on_later(
    failure: ProviderError, autojump_clock: MockClock
) -> None:
    first = FakeProvider(raise_at={"connect": failure})
    second = Moody(name="second", moods=[("connect", says(503))])
    async with open_world(
        first, others=[second], tried=["fake", "second"], retries=ONCE, circuits=OPENS
    ) as world:
        opens, _ = await world.submit(model="second/m")
        await opens.ended.wait()
        await trio.sleep(10)
        actor, _ = await world.submit(Mode.ASYNC)
        await actor.ended.wait()
        assert trio.current_time() == 30
        assert [step[1:] for step in await told(world, actor.job_id)] == [
            ("fake", "m"),
            (failure.status, "fall_back"),
            ("second", "m"),
        ]
        assert actor.snapshot.state is JobState.COMPLETED
