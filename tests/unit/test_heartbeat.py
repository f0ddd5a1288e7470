"""Streams are told that they have been silent."""

import pytest
import trio
import trio.testing

from actors.timers import Timers
from service.heartbeat import Beat, Heartbeat


class Stream:
    """Notes when it was nudged."""

    def __init__(self, heartbeat: Heartbeat) -> None:
        self.nudged_at: list[float] = []
        self.begun_at = trio.current_time()
        self.beat: Beat = heartbeat.watch(lambda: self.nudged_at.append(trio.current_time() - self.begun_at))


async def test_a_silent_stream_is_nudged_each_interval(
    autojump_clock: trio.testing.MockClock, timers: Timers
) -> None:
    heartbeat = Heartbeat(timers, 15)
    await trio.sleep(100)
    stream = Stream(heartbeat)
    await trio.sleep(50)
    assert stream.nudged_at == pytest.approx([15, 30, 45])


async def test_what_was_sent_puts_the_nudge_off_by_a_whole_interval(
    autojump_clock: trio.testing.MockClock, timers: Timers
) -> None:
    heartbeat = Heartbeat(timers, 15)
    busy, idle = Stream(heartbeat), Stream(heartbeat)
    for _ in range(5):
        await trio.sleep(4)
        busy.beat.sent()
    await trio.sleep(19)
    assert busy.nudged_at == pytest.approx([35])
    assert idle.nudged_at == pytest.approx([15, 30])


async def test_no_nudge_after_the_stop(autojump_clock: trio.testing.MockClock, timers: Timers) -> None:
    heartbeat = Heartbeat(timers, 15)
    stopped, other = Stream(heartbeat), Stream(heartbeat)
    stopped.beat.stop()
    stopped.beat.stop()
    await trio.sleep(20)
    assert stopped.nudged_at == []
    assert other.nudged_at == pytest.approx([15])


async def test_streams_that_come_and_go_leave_no_timers(
    autojump_clock: trio.testing.MockClock, timers: Timers
) -> None:
    heartbeat = Heartbeat(timers, 15)
    kept = [Stream(heartbeat) for _ in range(10)]
    most = 0
    for _ in range(10_000):
        Stream(heartbeat).beat.stop()
        most = max(most, len(timers))
    assert most <= 2 * len(kept) + timers.SLACK + 1
    await trio.sleep(16)
    assert len(timers) == len(kept)
    assert all(len(stream.nudged_at) == 1 for stream in kept)
