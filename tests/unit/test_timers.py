"""Many deadlines, one task: each runs out when it should, and only the one set last."""

from functools import partial
from math import inf

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from actors.timers import Timers, open_timers

FAR = 1e9
STEPS = st.lists(
    st.tuples(
        st.integers(0, 2), st.sampled_from(["set", "clear", "stop"]), st.integers(-2, 9), st.integers(0, 4)
    ),
    max_size=25,
)


@given(steps=STEPS)
@settings(max_examples=150, deadline=None)
def test_each_runs_out_when_it_was_last_set_to(steps: list[tuple[int, str, int, int]]) -> None:
    """Beside a model that knows the deadlines and nothing of queues."""

    async def play() -> None:
        start = trio.current_time()
        seen: list[tuple[float, int]] = []
        expected: list[tuple[float, int]] = []
        due = [inf] * 3
        stopped = [False] * 3

        def run_out(number: int) -> None:
            seen.append((trio.current_time() - start, number))

        def expire_until(now: float) -> None:
            for at, number in sorted((at, number) for number, at in enumerate(due)):
                if at <= now:
                    expected.append((at, number))
                    due[number] = inf

        async with open_timers() as timers:
            made = [timers.timer(partial(run_out, number)) for number in range(3)]
            for number, step, seconds, pause_s in steps:
                now = trio.current_time() - start
                if step == "set":
                    # Never a moment of a step: who is first then is nobody's promise.
                    made[number].set(start + now + seconds + 0.25)
                    # What has passed runs out now.
                    due[number] = inf if stopped[number] else now + max(seconds + 0.25, 0)
                elif step == "clear":
                    made[number].at = due[number] = inf
                else:
                    made[number].stop()
                    due[number], stopped[number] = inf, True
                await trio.sleep(pause_s + 0.5)
                expire_until(now + pause_s + 0.5)
            await trio.sleep(20)
            expire_until(FAR)
        # All moments are quarters of seconds, which a float holds exactly.
        assert sorted(seen) == sorted(expected)
        assert [at for at, _ in seen] == sorted(at for at, _ in seen)

    trio.run(play, clock=MockClock(autojump_threshold=0))


async def test_an_earlier_deadline_is_seen_while_a_later_one_is_waited_for(
    autojump_clock: MockClock, timers: Timers
) -> None:
    start = trio.current_time()
    seen: list[float] = []
    late = timers.timer(lambda: seen.append(trio.current_time() - start))
    early = timers.timer(lambda: seen.append(trio.current_time() - start))
    late.set(start + 10)
    await trio.sleep(1)
    early.set(start + 3)
    await trio.sleep(20)
    assert seen == pytest.approx([3, 10])


async def test_moving_a_deadline_on_queues_nothing(autojump_clock: MockClock, timers: Timers) -> None:
    timer = timers.timer(lambda: None)
    for _ in range(1000):
        timer.set(trio.current_time() + 60)
        await trio.sleep(0.01)
        timer.at = inf
    assert len(timers) == 1
    await trio.sleep(100)
    assert len(timers) == 0


async def test_those_that_are_stopped_leave_little_behind(timers: Timers) -> None:
    most = 0
    for _ in range(5000):
        timer = timers.timer(lambda: None)
        timer.set(trio.current_time() + 3600)
        timer.stop()
        most = max(most, len(timers))
    assert most <= timers.SLACK + 1


async def test_those_that_are_set_earlier_again_and_again_leave_little_behind(
    autojump_clock: MockClock, timers: Timers
) -> None:
    """As links do: long for the head of an answer, then short for each read of its body."""
    made = [timers.timer(lambda: None) for _ in range(10)]
    most = 0
    for _ in range(200):
        for timer in made:
            timer.set(trio.current_time() + 600)
            timer.set(trio.current_time() + 1)
        await trio.sleep(1.5)
        most = max(most, len(timers))
    assert most <= 4 * len(made) + timers.SLACK + 1
