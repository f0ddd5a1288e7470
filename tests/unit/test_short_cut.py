"""A watcher that waits for nothing else is handed the next run there and then."""

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import wait_all_tasks_blocked

from actors.broadcast import AttemptGivenUpError, Nudged
from events.log.base import FrameCursor, FrameRun
from tests.unit.broadcasts import frames_of, started

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
