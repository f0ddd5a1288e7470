"""Attempts that fail, and what follows: on a virtual clock, to the second."""

from dataclasses import dataclass, field
from typing import Any

import orjson
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from actors.circuit import CircuitPolicy
from actors.errors import JobConflictError, UnsupportedError, UpstreamConnectionError
from actors.providers.keys import Key, KeyRing
from actors.retry import RetryPolicy
from events.log.base import FrameCursor
from events.state import JobState
from events.types import AttemptFailed, JobCancelled, Mode
from tests.support.providers import FakeProvider, opening, whole_stream
from tests.support.scripted import Moody, Scripted, ping, says, start_only, told
from tests.support.world import open_world, read_stream

MANY = RetryPolicy(backoff_s=1, max_backoff_s=4)
STEADY = RetryPolicy(backoff_s=0)
REFUSED = UpstreamConnectionError("no connection to the upstream")
CANNOT = UnsupportedError("container: it cannot be used", status=400)


@dataclass
class Keyed(Moody):
    """One that has keys."""

    keys: KeyRing = field(default_factory=KeyRing)


@pytest.mark.parametrize("mode", [Mode.PLAIN, Mode.STREAM, Mode.ASYNC])
async def test_every_attempt_is_told(mode: Mode, autojump_clock: MockClock) -> None:
    fake = Moody(moods=[("connect", says(529)), ("connect", REFUSED)])
    async with open_world(fake, retries=MANY) as world:
        actor, watch = await world.submit(mode)
        await actor.ended.wait()
        assert await told(world, actor.job_id) == [
            (1, "fake", "m"),
            (1, 529, "retry"),
            (2, "fake", "m"),
            (2, 502, "retry"),
            (3, "fake", "m"),
        ]
        assert actor.snapshot.state is JobState.COMPLETED
        assert (actor.snapshot.attempt, actor.snapshot.failure) == (3, None)
        assert world.logged("attempt.failed") == 2
        watch.leave()


async def test_the_wait_is_what_the_event_says(autojump_clock: MockClock) -> None:
    fake = Moody(moods=[("connect", says(500)), ("connect", says(429, retry_after="7"))])
    async with open_world(fake, retries=MANY) as world:
        actor, _ = await world.submit()
        await actor.ended.wait()
        waits = [e.retry_after_s for e in await world.events(actor.job_id) if isinstance(e, AttemptFailed)]
        opened = [call.opened_at for call in fake.calls]
        assert waits == [opened[1] - opened[0], 7]
        assert opened[2] - opened[1] == 7
        assert 0 < opened[1] < 1


async def test_an_upstream_that_asks_for_too_long_is_not_waited_for(autojump_clock: MockClock) -> None:
    fake = Moody(moods=[("connect", says(429, retry_after="31"))])
    async with open_world(fake, retries=MANY) as world:
        actor, _ = await world.submit()
        await actor.ended.wait()
        assert trio.current_time() == 0
        assert actor.snapshot.failure is not None
        assert actor.snapshot.failure.headers == (("retry-after", "31"),)


async def test_all_tries_at_one_target_then_the_next(autojump_clock: MockClock) -> None:
    first, second = FakeProvider(raise_at={"connect": REFUSED}), FakeProvider(name="second")
    async with open_world(first, others=[second], tried=["fake", "second"], retries=STEADY) as world:
        actor, _ = await world.submit(Mode.STREAM)
        frames = await read_stream(actor.subscribe())
        assert frames == [frame.wire for frame in whole_stream(3)]
        assert await told(world, actor.job_id) == [
            (1, "fake", "m"),
            (1, 502, "retry"),
            (2, "fake", "m"),
            (2, 502, "retry"),
            (3, "fake", "m"),
            (3, 502, "fall_back"),
            (4, "second", "m"),
        ]
        assert actor.snapshot.state is JobState.COMPLETED


@pytest.mark.parametrize(
    ("asked", "story"),
    [
        ({}, [(1, "fake", "m"), (1, 429, "fall_back"), (2, "second", "m")]),
        ({"retry_after": "5"}, [(1, "fake", "m"), (1, 429, "retry"), (2, "fake", "m")]),
    ],
)
async def test_a_key_left_alone_for_longer_than_the_wait_is_a_fallback(
    asked: dict[str, str], story: list[tuple[Any, ...]], autojump_clock: MockClock
) -> None:
    """What is said to follow is what follows, and nobody waits for another target."""
    keys = KeyRing((Key("only", "secret"),), cooldown_s=60)
    first = Keyed(moods=[("connect", says(429, **asked))], keys=keys)
    second = FakeProvider(name="second")
    async with open_world(first, others=[second], tried=["fake", "second"], retries=MANY) as world:
        actor, _ = await world.submit()
        await actor.ended.wait()
        assert await told(world, actor.job_id) == story
        assert trio.current_time() == float(asked.get("retry_after", 0))


async def test_the_last_failure_is_the_jobs_own(autojump_clock: MockClock) -> None:
    first, second = (
        FakeProvider(raise_at={"connect": says(503)}),
        FakeProvider(name="second", raise_at={"connect": says(400)}),
    )
    async with open_world(first, others=[second], tried=["fake", "second"], retries=STEADY) as world:
        actor, _ = await world.submit()
        await actor.ended.wait()
        assert actor.snapshot.failure is not None
        assert actor.snapshot.failure.status == 400
        assert len(first.calls) == 3


async def test_what_a_target_cannot_do_is_for_the_next_one(autojump_clock: MockClock) -> None:
    """It says nothing of its key, nor of its health; where nothing is left to try, it is the answer."""
    keys = KeyRing((Key("only", "secret"),), cooldown_s=60)
    first = Keyed(moods=[("connect", CANNOT)] * 2, keys=keys)
    second = FakeProvider(name="second")
    opens = CircuitPolicy(failures=1)
    async with open_world(
        first, others=[second], tried=["fake", "second"], retries=MANY, circuits=opens
    ) as world:
        actor, _ = await world.submit()
        await actor.ended.wait()
        assert trio.current_time() == 0
        assert await told(world, actor.job_id) == [
            (1, "fake", "m"),
            (1, 400, "fall_back"),
            (2, "second", "m"),
        ]
        assert actor.snapshot.state is JobState.COMPLETED
        assert keys.ready("m")
        assert world.targets.circuits() == []

        alone, _ = await world.submit(model="fake/m")
        await alone.ended.wait()
        assert await told(world, alone.job_id) == [(1, "fake", "m"), (1, 400, "give_up")]
        assert alone.snapshot.failure == CANNOT.failure


async def test_what_an_upstream_refuses_no_other_target_is_asked(autojump_clock: MockClock) -> None:
    first, second = FakeProvider(raise_at={"connect": says(400)}), FakeProvider(name="second")
    async with open_world(first, others=[second], tried=["fake", "second"], retries=MANY) as world:
        actor, _ = await world.submit()
        await actor.ended.wait()
        assert await told(world, actor.job_id) == [(1, "fake", "m"), (1, 400, "give_up")]
        assert second.calls == []


async def test_the_count_bounds_the_whole(autojump_clock: MockClock) -> None:
    policy = RetryPolicy(backoff_s=0, max_attempts=4, max_retries=9)
    fakes = [FakeProvider(name=name, raise_at={"connect": REFUSED}) for name in ("fake", "b")]
    async with open_world(fakes[0], others=fakes[1:], tried=["fake", "b"], retries=policy) as world:
        actor, _ = await world.submit(Mode.ASYNC)
        await actor.ended.wait()
        assert sum(len(fake.calls) for fake in fakes) == 4
        assert actor.snapshot.state is JobState.FAILED


async def test_every_target_has_its_try_before_the_attempts_run_out(autojump_clock: MockClock) -> None:
    names = ["fake", "b", "c"]
    fakes = [FakeProvider(name=name, raise_at={"connect": REFUSED}) for name in names[:2]]
    fakes.append(FakeProvider(name="c"))
    async with open_world(fakes[0], others=fakes[1:], tried=names, retries=STEADY) as world:
        actor, _ = await world.submit()
        await actor.ended.wait()
        assert [len(fake.calls) for fake in fakes] == [3, 2, 1]
        assert actor.snapshot.state is JobState.COMPLETED


async def test_time_bounds_the_whole(autojump_clock: MockClock) -> None:
    policy = RetryPolicy(max_attempts=99, max_retries=99, total_s=100)
    fake = FakeProvider(raise_at={"connect": says(503, retry_after="30")})
    async with open_world(fake, retries=policy) as world:
        actor, _ = await world.submit(Mode.ASYNC)
        await actor.ended.wait()
        assert [call.opened_at for call in fake.calls] == [0, 30, 60, 90]
        assert trio.current_time() == 90


async def test_who_said_never_is_not_tried_again(autojump_clock: MockClock) -> None:
    fake = Moody(moods=[("connect", says(529))])
    async with open_world(fake, retries=MANY) as world:
        actor, _ = await world.submit(Mode.ASYNC, may_rerun=False)
        await actor.ended.wait()
        assert len(fake.calls) == 1
        assert actor.snapshot.state is JobState.FAILED


# --- what was shown ------------------------------------------------------------------------------


async def test_a_start_is_held_back_so_that_it_comes_once(autojump_clock: MockClock) -> None:
    """message_start of an attempt that brought nothing more is nobody's business but the events'."""
    fake = Scripted(scripts=[[start_only(), ping(), ping()]])
    async with open_world(fake, retries=STEADY) as world:
        actor, watch = await world.submit(Mode.STREAM)
        assert await read_stream(actor.subscribe()) == [frame.wire for frame in whole_stream(2)]
        assert await told(world, actor.job_id) == [(1, "fake", "m"), (1, 502, "retry"), (2, "fake", "m")]
        watch.leave()


async def test_content_that_was_shown_is_final(autojump_clock: MockClock) -> None:
    fake = Scripted(scripts=[[opening()]])
    async with open_world(fake, retries=STEADY) as world:
        actor, watch = await world.submit(Mode.STREAM)
        assert await read_stream(actor.subscribe()) == [frame.wire for frame in opening()]
        assert actor.snapshot.state is JobState.FAILED
        assert await told(world, actor.job_id) == [(1, "fake", "m"), (1, 502, "give_up")]
        watch.leave()


async def test_content_that_nobody_saw_is_void(autojump_clock: MockClock) -> None:
    fake = Scripted(scripts=[[opening()]])
    async with open_world(fake, retries=STEADY) as world:
        actor, _ = await world.submit(Mode.ASYNC)
        await actor.ended.wait()
        assert await told(world, actor.job_id) == [(1, "fake", "m"), (1, 502, "retry"), (2, "fake", "m")]
        assert orjson.loads(actor.answer)["content"] == [{"type": "text", "text": "1 2 "}]
        watched = await world.supervisor.subscribe(actor.job_id, "me", None)
        assert await read_stream(watched.subscription) == [frame.wire for frame in whole_stream(2)]
        with pytest.raises(JobConflictError, match="given up"):
            await world.supervisor.subscribe(actor.job_id, "me", FrameCursor(1, 1))


async def test_who_comes_during_the_wait_sees_the_next_attempt_only(autojump_clock: MockClock) -> None:
    fake = Scripted(scripts=[[opening()]])
    async with open_world(fake, retries=RetryPolicy(backoff_s=100, max_backoff_s=100)) as world:
        actor, _ = await world.submit(Mode.ASYNC)
        await wait_all_tasks_blocked()
        assert actor.waiting
        watched = await world.supervisor.subscribe(actor.job_id, "me", None)
        assert watched.snapshot.attempt == 2
        assert await read_stream(watched.subscription) == [frame.wire for frame in whole_stream(2)]


async def test_a_watcher_who_saw_content_and_left_still_counts(autojump_clock: MockClock) -> None:
    fake = Scripted(scripts=[[opening(), 10]])
    async with open_world(fake, retries=STEADY) as world:
        actor, _ = await world.submit(Mode.ASYNC)
        watched = await world.supervisor.subscribe(actor.job_id, "me", None)
        assert await watched.subscription.receive()
        watched.subscription.close()
        await actor.ended.wait()
        assert await told(world, actor.job_id) == [(1, "fake", "m"), (1, 502, "give_up")]


async def test_what_was_revealed_counts_as_shown(autojump_clock: MockClock) -> None:
    fake = Scripted(scripts=[[start_only(), 60]])
    async with open_world(fake, retries=STEADY) as world:
        actor, watch = await world.submit(Mode.STREAM)
        subscription = actor.subscribe()
        await trio.sleep(15)
        await actor.reveal()
        await actor.reveal()
        assert await read_stream(subscription) == [start_only()[0].wire]
        assert await told(world, actor.job_id) == [(1, "fake", "m"), (1, 502, "give_up")]
        watch.leave()


async def test_what_follows_a_revealed_start_is_numbered_on(autojump_clock: MockClock) -> None:
    fake = Scripted(scripts=[[start_only(), 60, whole_stream(2)[1:]]])
    async with open_world(fake, retries=STEADY) as world:
        actor, watch = await world.submit(Mode.STREAM)
        subscription = actor.subscribe()
        await trio.sleep(15)
        await actor.reveal()
        first = await subscription.receive()
        assert first[0].cursor == FrameCursor(1, 1)
        assert await read_stream(subscription) == [frame.wire for frame in whole_stream(2)[1:]]
        assert actor.snapshot.state is JobState.COMPLETED
        watch.leave()


async def test_what_comes_while_a_start_is_revealed_waits_for_it(autojump_clock: MockClock) -> None:
    fake = Scripted(scripts=[[start_only(), 15.5, whole_stream(2)[1:]]])
    async with open_world(fake, retries=STEADY) as world:
        actor, watch = await world.submit(Mode.STREAM)
        subscription = actor.subscribe()
        await trio.sleep(15)
        world.log.frames_take_s = 1
        await actor.reveal()
        assert await read_stream(subscription) == [frame.wire for frame in whole_stream(2)]
        assert actor.snapshot.state is JobState.COMPLETED
        watch.leave()


async def test_endless_pings_are_not_held_back_for_ever(autojump_clock: MockClock) -> None:
    fake = Scripted(scripts=[[start_only(), *[ping()] * 100, 5]])
    async with open_world(fake, retries=STEADY) as world:
        actor, watch = await world.submit(Mode.STREAM)
        assert len(await read_stream(actor.subscribe())) == 101
        assert actor.snapshot.state is JobState.FAILED
        watch.leave()


# --- leaving while it waits ----------------------------------------------------------------------

LONG = RetryPolicy(backoff_s=1000, max_backoff_s=1000, total_s=9999)


async def test_a_client_that_leaves_ends_the_wait_at_once(autojump_clock: MockClock) -> None:
    fake = FakeProvider(raise_at={"connect": REFUSED})
    async with open_world(fake, retries=LONG) as world:
        actor, watch = await world.submit()
        await wait_all_tasks_blocked()
        assert actor.waiting
        watch.leave()
        await actor.ended.wait()
        assert trio.current_time() == 0
        assert isinstance(actor.terminal, JobCancelled)
        assert len(fake.calls) == 1
        assert world.targets.providers()[0].working == 0


async def test_so_does_a_cancellation(autojump_clock: MockClock) -> None:
    async with open_world(FakeProvider(raise_at={"connect": REFUSED}), retries=LONG) as world:
        actor, _ = await world.submit(Mode.ASYNC)
        await wait_all_tasks_blocked()
        await world.supervisor.cancel(actor.job_id, "me", by="me")
        assert trio.current_time() == 0
        assert actor.snapshot.state is JobState.CANCELLED


async def test_a_drain_waits_for_its_time_and_no_longer(autojump_clock: MockClock) -> None:
    async with open_world(FakeProvider(raise_at={"connect": REFUSED}), retries=LONG) as world:
        actor, _ = await world.submit(Mode.ASYNC)
        await wait_all_tasks_blocked()
        await world.supervisor.drain(5)
        assert trio.current_time() == 5
        assert actor.snapshot.state is JobState.FAILED


async def test_no_place_is_held_during_the_wait(autojump_clock: MockClock) -> None:
    fake = Moody(moods=[("connect", says(503, retry_after="20"))])
    async with open_world(fake, retries=MANY, concurrency={"fake": 1}) as world:
        waits, _ = await world.submit(Mode.ASYNC)
        await wait_all_tasks_blocked()
        passes, _ = await world.submit(Mode.ASYNC)
        await passes.ended.wait()
        assert trio.current_time() == 0
        await waits.ended.wait()
        assert trio.current_time() == 20
