"""The broadcast alone: replay, live, lagging, resuming and attempts that were given up."""

from collections.abc import Sequence

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import wait_all_tasks_blocked

from actors.broadcast import AttemptGivenUpError, Broadcast, Nudged, Replay, Subscription
from actors.errors import JobNotFoundError
from events.log.base import FrameCursor, FrameRun
from events.log.memory import MemoryLog
from events.types import AttemptFailed, AttemptStarted, Event, Failure, JobAccepted, Mode, NextStep
from tests.support.world import CountingTelemetry

JOB = "job"
ACCEPTED = JobAccepted(at=0, owner="", model="m", mode=Mode.STREAM, body=b"")


class Upstream:
    """What an actor does: log first, then publish."""

    def __init__(self, buffer_runs: int = 4) -> None:
        self.log = MemoryLog()
        self.telemetry = CountingTelemetry()
        self.broadcast = Broadcast(JOB, self.log, buffer_runs=buffer_runs, telemetry=self.telemetry)
        self._seq = 0
        self._frames = 0

    async def _append(self, event: Event) -> None:
        self._seq = await self.log.append(JOB, [event], self._seq)

    async def accept(self) -> None:
        await self._append(ACCEPTED)

    async def attempt(self) -> None:
        attempt = self.broadcast.attempt + 1
        await self._append(AttemptStarted(at=0, attempt=attempt, provider="p", upstream_model="m"))
        self.broadcast.attempt = attempt
        self._frames = 0

    async def give_up(self) -> None:
        failure = Failure(502, "api_error", "gone")
        await self._append(
            AttemptFailed(at=0, attempt=self.broadcast.attempt, failure=failure, next=NextStep.RETRY)
        )

    async def send(self, *frames: bytes) -> None:
        attempt = self.broadcast.attempt
        self._seq = await self.log.append_frames(JOB, attempt, frames, self._seq, 0)
        self.broadcast.publish(FrameRun(attempt, self._frames + 1, frames))
        self._frames += len(frames)


async def started(buffer_runs: int = 4) -> Upstream:
    upstream = Upstream(buffer_runs)
    await upstream.accept()
    await upstream.attempt()
    return upstream


async def watched(buffer_runs: int, watchers: int = 1) -> tuple[Upstream, list[Subscription]]:
    """With watchers that were there before the first attempt, and so have nothing to replay."""
    upstream = Upstream(buffer_runs)
    await upstream.accept()
    subscriptions = [upstream.broadcast.subscribe() for _ in range(watchers)]
    await upstream.attempt()
    return upstream, subscriptions


def frames_of(runs: Sequence[FrameRun]) -> list[bytes]:
    return [frame for run in runs for frame in run.frames]


async def rest(subscription: Subscription) -> list[bytes]:
    """Every frame to the end of the stream."""
    frames: list[bytes] = []
    while runs := await subscription.receive():
        frames += frames_of(runs)
    return frames


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


SHORT_CUTS = st.lists(
    st.tuples(st.sampled_from(["send", "pause", "nudge", "cancel"]), st.booleans(), st.booleans()),
    max_size=40,
)


@given(steps=SHORT_CUTS, buffer_runs=st.integers(1, 3))
@settings(max_examples=150, deadline=None)
def test_with_a_short_cut_each_frame_comes_once_in_order(
    steps: list[tuple[str, bool, bool]], buffer_runs: int
) -> None:
    async def play() -> None:
        upstream = await started(buffer_runs)
        subscription = upstream.broadcast.subscribe()
        received: list[bytes] = []
        taken: list[FrameRun] = []
        sent: list[bytes] = []
        slow = takes = False

        def sink(run: FrameRun) -> bool:
            if takes:
                taken.append(run)
                received.extend(run.frames)
            return takes

        async def watch(scope: trio.CancelScope) -> None:
            with scope:
                while True:
                    try:
                        runs = await subscription.receive()
                    except Nudged:
                        continue
                    received.extend(frames_of(runs))
                    if not runs:
                        break
                    while slow:  # noqa: ASYNC110 - it is a reader that takes its time
                        await trio.lowlevel.checkpoint()

        subscription.short_cut(sink)
        async with trio.open_nursery() as nursery:
            scope = trio.CancelScope()
            nursery.start_soon(watch, scope)
            for step, is_slow, sink_takes in steps:
                slow, takes = is_slow, sink_takes
                if step == "send":
                    sent.append(b"%d" % len(sent))
                    await upstream.send(sent[-1])
                elif step == "pause":
                    for _ in range(5):
                        await trio.lowlevel.checkpoint()
                elif step == "nudge":
                    subscription.nudge()
                else:
                    # Cancelled, and not come to know it: what is sent now is not for its sink.
                    scope.cancel()
                    count = len(taken)
                    for _ in range(5):
                        await trio.lowlevel.checkpoint()
                    takes = True
                    sent.append(b"%d" % len(sent))
                    await upstream.send(sent[-1])
                    assert len(taken) == count
                    scope = trio.CancelScope()
                    nursery.start_soon(watch, scope)
            slow = False
            upstream.broadcast.close()
        assert received == sent
        subscription.close()

    trio.run(play)


async def test_a_short_cut_takes_what_is_waited_for_and_nothing_else(nursery: trio.Nursery) -> None:
    upstream = await started()
    subscription = upstream.broadcast.subscribe()
    taken: list[bytes] = []

    def sink(run: FrameRun) -> bool:
        taken.extend(run.frames)
        return True

    subscription.short_cut(sink)
    await upstream.send(b"1")
    assert taken == []
    assert frames_of(await subscription.receive()) == [b"1"]
    nursery.start_soon(subscription.receive)
    await wait_all_tasks_blocked()
    await upstream.send(b"2", b"3")
    assert taken == [b"2", b"3"]
    assert subscription.cursor == FrameCursor(1, 3)


async def test_frames_of_another_attempt_take_no_short_cut(nursery: trio.Nursery) -> None:
    upstream = await started()
    subscription = upstream.broadcast.subscribe()
    taken: list[FrameRun] = []

    def sink(run: FrameRun) -> bool:
        taken.append(run)
        return True

    async def told() -> None:
        with pytest.raises(AttemptGivenUpError):
            await subscription.receive()
        over.set()

    over = trio.Event()
    subscription.short_cut(sink)
    nursery.start_soon(told)
    await wait_all_tasks_blocked()
    await upstream.send(b"1")
    await upstream.give_up()
    await upstream.attempt()
    await upstream.send(b"anew")
    await over.wait()
    assert [run.frames for run in taken] == [(b"1",)]
