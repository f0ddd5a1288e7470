"""The broadcast alone: replay, live, lagging, resuming and attempts that were given up."""

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import wait_all_tasks_blocked

from actors.broadcast import AttemptGivenUpError, Replay
from actors.errors import JobNotFoundError
from events.log.base import FrameCursor
from tests.unit.broadcasts import JOB, Upstream, frames_of, rest, started, watched


async def test_live() -> None:
    upstream = await started()
    subscription = upstream.broadcast.subscribe()
    await upstream.send(b"1", b"2")
    assert frames_of(await subscription.receive()) == [b"1", b"2"]
    assert subscription.cursor == FrameCursor(1, 2)
    await upstream.send(b"3")
    upstream.broadcast.close()
    assert await rest(subscription) == [b"3"]
    assert await subscription.receive() == []


async def test_what_is_at_hand_comes_together() -> None:
    upstream, (subscription,) = await watched(4)
    await upstream.send(b"1")
    assert frames_of(await subscription.receive()) == [b"1"]
    for frame in (b"2", b"3", b"4"):
        await upstream.send(frame)
    runs = await subscription.receive()
    assert [run.first for run in runs] == [2, 3, 4]


async def test_subscribing_before_the_first_attempt() -> None:
    upstream = Upstream()
    await upstream.accept()
    subscription = upstream.broadcast.subscribe()
    await upstream.attempt()
    await upstream.send(b"1")
    upstream.broadcast.close()
    assert await rest(subscription) == [b"1"]


async def test_joining_late_and_resuming() -> None:
    upstream = await started()
    for number in range(10):
        await upstream.send(b"%d" % number)
    late = upstream.broadcast.subscribe()
    resumed = upstream.broadcast.subscribe(FrameCursor(1, 7))
    at_the_end = upstream.broadcast.subscribe(FrameCursor(1, 10))
    await upstream.send(b"last")
    upstream.broadcast.close()
    assert await rest(late) == [*(b"%d" % number for number in range(10)), b"last"]
    assert await rest(resumed) == [b"7", b"8", b"9", b"last"]
    assert await rest(at_the_end) == [b"last"]


async def test_resuming_within_a_run() -> None:
    upstream = await started()
    await upstream.send(b"1", b"2", b"3")
    subscription = upstream.broadcast.subscribe(FrameCursor(1, 2))
    upstream.broadcast.close()
    assert await rest(subscription) == [b"3"]


async def test_a_reader_that_falls_behind_loses_nothing() -> None:
    upstream, (slow, keen) = await watched(2, watchers=2)
    sent = [b"%d" % number for number in range(50)]
    for frame in sent:
        await upstream.send(frame)
        assert frames_of(await keen.receive()) == [frame]
    assert upstream.telemetry.lags == 1
    upstream.broadcast.close()
    assert await rest(slow) == sent
    assert await rest(keen) == []


async def test_falling_behind_again_and_again() -> None:
    upstream, (subscription,) = await watched(1)
    received: list[bytes] = []
    for number in range(60):
        await upstream.send(b"%d" % number)
        if number % 5 == 4:
            while len(received) <= number:
                received += frames_of(await subscription.receive())
            # Nothing more in the log: it goes on live, and its buffer is empty again.
            with trio.move_on_after(0):
                await subscription.receive()
    upstream.broadcast.close()
    received += await rest(subscription)
    assert received == [b"%d" % number for number in range(60)]
    assert upstream.telemetry.lags == 60 // 5


async def test_the_frames_dropped_right_before_the_end() -> None:
    upstream = await started(buffer_runs=1)
    subscription = upstream.broadcast.subscribe()
    await upstream.send(b"1")
    assert frames_of(await subscription.receive()) == [b"1"]

    received: list[bytes] = []
    async with trio.open_nursery() as nursery:

        async def read() -> None:
            received.extend(await rest(subscription))

        nursery.start_soon(read)
        await wait_all_tasks_blocked()
        for number in range(2, 6):
            await upstream.send(b"%d" % number)
        upstream.broadcast.close()
    assert received == [b"2", b"3", b"4", b"5"]


async def test_cancelling_a_read_loses_nothing() -> None:
    upstream = await started()
    subscription = upstream.broadcast.subscribe()
    with trio.move_on_after(0) as scope:
        await subscription.receive()
    assert scope.cancelled_caught
    await upstream.send(b"1")
    with trio.CancelScope() as scope:
        scope.cancel()
        await subscription.receive()
    upstream.broadcast.close()
    got = await rest(subscription)
    assert got == ([b"1"] if scope.cancelled_caught else [])


async def test_a_new_attempt_is_read_from_its_start_by_who_has_seen_nothing() -> None:
    upstream = await started()
    fresh = upstream.broadcast.subscribe()
    await upstream.give_up()
    await upstream.attempt()
    late = upstream.broadcast.subscribe()
    await upstream.send(b"1")
    upstream.broadcast.close()
    assert await rest(fresh) == [b"1"]
    assert await rest(late) == [b"1"]


@pytest.mark.parametrize("lagging", [False, True])
async def test_a_new_attempt_after_frames_were_seen_is_told(lagging: bool) -> None:
    upstream = await started(buffer_runs=1)
    subscription = upstream.broadcast.subscribe()
    await upstream.send(b"1")
    assert frames_of(await subscription.receive()) == [b"1"]
    await upstream.give_up()
    await upstream.attempt()
    for _ in range(3 if lagging else 1):
        await upstream.send(b"new")
    with pytest.raises(AttemptGivenUpError) as error:
        await subscription.receive()
    assert error.value.failure.status == 409


async def test_a_cursor_of_a_given_up_attempt_is_told() -> None:
    upstream = await started()
    await upstream.send(b"1", b"2")
    await upstream.give_up()
    await upstream.attempt()
    await upstream.send(b"new")
    subscription = upstream.broadcast.subscribe(FrameCursor(1, 2))
    with pytest.raises(AttemptGivenUpError):
        await subscription.receive()


async def test_watchers_are_counted() -> None:
    upstream = await started()
    one, two = upstream.broadcast.subscribe(), upstream.broadcast.subscribe()
    assert upstream.telemetry.watchers == 2
    one.close()
    one.close()
    assert upstream.telemetry.watchers == 1
    await upstream.send(b"1")
    two.close()
    upstream.broadcast.close()
    assert upstream.telemetry.watchers == 0


async def test_closing_ends_a_read_in_another_task() -> None:
    upstream = await started()
    subscription = upstream.broadcast.subscribe()
    async with trio.open_nursery() as nursery:

        async def read() -> None:
            assert await subscription.receive() == []

        nursery.start_soon(read)
        await wait_all_tasks_blocked()
        subscription.close()
    with pytest.raises(trio.ClosedResourceError):
        await subscription.receive()


async def test_replaying_a_job_that_has_ended() -> None:
    upstream = await started()
    await upstream.send(b"1", b"2")
    await upstream.send(b"3")
    replay = Replay(JOB, upstream.log, last=FrameCursor(1, 3), telemetry=upstream.telemetry)
    assert await rest(replay.subscribe()) == [b"1", b"2", b"3"]
    assert await rest(replay.subscribe(FrameCursor(1, 1))) == [b"2", b"3"]
    assert await rest(replay.subscribe(FrameCursor(1, 3))) == []


async def test_a_job_without_an_attempt_has_an_empty_stream() -> None:
    upstream = Upstream()
    await upstream.accept()
    replay = Replay(JOB, upstream.log, last=FrameCursor(0, 0), telemetry=upstream.telemetry)
    assert await rest(replay.subscribe()) == []


async def test_a_job_that_is_forgotten_while_it_is_read() -> None:
    upstream, (behind, current) = await watched(1, watchers=2)
    await upstream.send(b"1")
    await upstream.send(b"2")
    for _ in range(2):
        await current.receive()
    assert frames_of(await behind.receive()) == [b"1"]
    upstream.broadcast.close()
    await upstream.log.forget(JOB)
    assert await rest(current) == []
    with pytest.raises(JobNotFoundError):
        await rest(behind)
    replay = Replay(JOB, upstream.log, last=FrameCursor(1, 2), telemetry=upstream.telemetry)
    with pytest.raises(JobNotFoundError):
        await replay.subscribe().receive()


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("send"), st.integers(1, 4)),
        st.tuples(st.just("read"), st.integers(0, 2)),
        st.tuples(st.just("resume"), st.integers(0, 2)),
    ),
    max_size=40,
)


@given(steps=STEPS, buffer_runs=st.integers(1, 5))
@settings(max_examples=80, deadline=None)
def test_whatever_happens_each_frame_comes_once_in_order(
    steps: list[tuple[str, int]], buffer_runs: int
) -> None:
    async def play() -> None:
        upstream = await started(buffer_runs)
        subscriptions = [upstream.broadcast.subscribe() for _ in range(3)]
        received: list[list[bytes]] = [[], [], []]
        sent: list[bytes] = []
        for step, number in steps:
            if step == "send":
                frames = [b"%d" % (len(sent) + offset) for offset in range(number)]
                sent += frames
                await upstream.send(*frames)
            elif step == "read" and len(received[number]) < len(sent):
                received[number] += frames_of(await subscriptions[number].receive())
            elif step == "resume":
                cursor = subscriptions[number].cursor
                subscriptions[number].close()
                subscriptions[number] = upstream.broadcast.subscribe(cursor)
        upstream.broadcast.close()
        for number, subscription in enumerate(subscriptions):
            received[number] += await rest(subscription)
            subscription.close()
        assert received == [sent] * 3
        assert upstream.telemetry.watchers == 0

    trio.run(play)
