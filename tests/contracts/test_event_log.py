"""What every event log promises, whatever it keeps its events in. See :mod:`events.log.base`.

The logs it is tried on are in ``event_log_adapters.py``.
"""

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from events.errors import (
    DuplicateKeyError,
    IllegalTransition,
    LogUnavailableError,
    SequenceConflict,
    UnknownJobError,
)
from events.log.base import EventLog, FrameCursor, JobFilter
from events.state import JobState
from events.types import Event, FramesReceived, JobCancelled, JobDetached, JobExpired
from tests.contracts.event_log_adapters import ADAPTERS, TEST_TIMEOUT_S, OpenLog
from tests.contracts.event_log_checks import (
    check_frames,
    check_job,
    check_lists,
    check_pages,
    read_all,
)
from tests.contracts.event_log_model import (
    OPERATIONS,
    LogModel,
    Operation,
    accepted,
    completed,
    failed,
    perform,
    started,
)

each_adapter = pytest.mark.parametrize("open_log", ADAPTERS.values(), ids=list(ADAPTERS))
few = settings(max_examples=30, deadline=None)


# --- against a model -------------------------------------------------------------------------------


FILTERS = st.builds(
    JobFilter,
    owner=st.sampled_from([None, "ann", "bob"]),
    states=st.none() | st.frozensets(st.sampled_from(JobState), min_size=1, max_size=3),
    model=st.sampled_from([None, "m", "n"]),
)


@each_adapter
@few
@given(
    operations=st.lists(OPERATIONS, min_size=10, max_size=60),
    filters=st.lists(FILTERS, min_size=1, max_size=3),
    limit=st.integers(1, 4),
)
async def test_it_is_what_the_model_is(
    open_log: OpenLog, operations: list[Operation], filters: list[JobFilter], limit: int
) -> None:
    model = LogModel()
    async with open_log() as log:
        for number, operation in enumerate(operations):
            await perform(log, model, operation, at=float(number + 1))
            await check_job(log, model, operation.job_id)
        await check_lists(log, model)
        for job_id in model.jobs:
            await check_frames(log, model, job_id)
        for where in filters:
            await check_pages(log, model, where, limit)


@each_adapter
@few
@given(
    runs=st.lists(st.lists(st.binary(min_size=1, max_size=9), min_size=1, max_size=5), max_size=8),
    starts=st.lists(st.integers(0, 12), min_size=1, max_size=4),
    slow=st.booleans(),
)
async def test_who_follows_reads_what_is_written(
    open_log: OpenLog, runs: list[list[bytes]], starts: list[int], slow: bool
) -> None:
    followed: dict[int, list[Event]] = {}
    async with open_log() as log:
        await log.append("job", [accepted(1.0), started(2.0, 1)], 0)

        async def follow(index: int, after: int, task_status: trio.TaskStatus[None]) -> None:
            found: list[Event] = []
            with log.follow("job", after) as follower:
                task_status.started()
                while events := await follower.receive():
                    assert [stored.seq for stored in events] == list(
                        range(after + 1, after + 1 + len(events))
                    )
                    after += len(events)
                    found += [stored.event for stored in events]
                    if slow:
                        await trio.testing.wait_all_tasks_blocked()
            followed[index] = found

        with trio.fail_after(TEST_TIMEOUT_S):
            async with trio.open_nursery() as nursery:
                for index, after in enumerate(starts):
                    await nursery.start(
                        lambda task_status, index=index, after=after: follow(
                            index, after, task_status=task_status
                        )
                    )
                seq = 2
                for run in runs:
                    seq = await log.append_frames("job", 1, run, seq, 3.0)
                await log.append("job", [completed(4.0, 1)], seq)
        for index, after in enumerate(starts):
            assert followed[index] == await read_all(log, "job", after)


# --- writing ---------------------------------------------------------------------------------------


async def test_several_events_at_once_are_written_all_or_not_at_all(log: EventLog) -> None:
    assert await log.append("job", [accepted(1.0), started(2.0, 1)], 0) == 2
    with pytest.raises(IllegalTransition):
        await log.append("job", [completed(3.0, 1), started(4.0, 2)], 2)
    assert await read_all(log, "job") == [accepted(1.0), started(2.0, 1)]
    assert (await log.snapshot("job")).state is JobState.PROCESSING
    assert await log.append("job", [completed(3.0, 1)], 2) == 3


async def test_a_conflict_says_what_was_expected_and_what_is_there(log: EventLog) -> None:
    await log.append("job", [accepted(1.0), started(2.0, 1)], 0)
    for write in (
        log.append("job", [completed(3.0, 1)], 1),
        log.append_frames("job", 1, [b"f"], 1, 3.0),
    ):
        with pytest.raises(SequenceConflict) as caught:
            await write
        assert (caught.value.expected, caught.value.actual) == (1, 2)


async def test_of_two_writers_one_wins(log: EventLog) -> None:
    await log.append("job", [accepted(1.0), started(2.0, 1)], 0)
    outcomes: list[object] = []

    async def write(event: Event) -> None:
        try:
            outcomes.append(await log.append("job", [event], 2))
        except SequenceConflict as conflict:
            outcomes.append(conflict.actual)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(write, completed(3.0, 1))
        nursery.start_soon(write, failed(3.0))
    assert outcomes == [3, 3]
    assert len(await log.read("job")) == 3


@pytest.mark.parametrize("frames", [False, True])
async def test_a_cancelled_write_is_done_or_not_done(log: EventLog, frames: bool) -> None:
    await log.append("job", [accepted(1.0), started(2.0, 1)], 0)
    with trio.CancelScope() as scope:
        scope.cancel()
        if frames:
            await log.append_frames("job", 1, [b"a", b"b"], 2, 3.0)
        else:
            await log.append("job", [failed(3.0)], 2)
    # What was under way when it was cancelled settles before the job's next write.
    with trio.CancelScope() as again:
        await log.append("other", [accepted(1.0)], 0)
    assert not again.cancelled_caught
    events = await read_all(log, "job")
    assert len(events) in (2, 3)
    assert (await log.snapshot("job")).last_seq == len(events)
    if len(events) == 2:
        assert await log.append("job", [failed(4.0)], 2) == 3
    with pytest.raises(SequenceConflict):
        await log.append("job", [failed(4.0)], 2)


async def test_frames_are_numbered_on_within_their_attempt(log: EventLog) -> None:
    await log.append("job", [accepted(1.0), started(2.0, 1)], 0)
    assert await log.append_frames("job", 1, [b"a", b"b"], 2, 3.0) == 3
    assert await log.append_frames("job", 1, [b"c"], 3, 4.0) == 4
    await log.append("job", [started(5.0, 2)], 4)
    assert await log.append_frames("job", 2, [b"d"], 5, 6.0) == 6
    runs = [event for event in await read_all(log, "job") if isinstance(event, FramesReceived)]
    assert [(run.attempt, run.first, run.last) for run in runs] == [(1, 1, 2), (1, 3, 3), (2, 1, 1)]
    for attempt in (1, 3):
        with pytest.raises(IllegalTransition):
            await log.append_frames("job", attempt, [b"e"], 6, 7.0)


async def test_the_last_frames_may_come_with_the_end(log: EventLog) -> None:
    await log.append("job", [accepted(1.0), started(2.0, 1)], 0)
    seq = await log.append_frames("job", 1, [b"a", b"b"], 2, 3.0)
    last = FramesReceived(at=4.0, attempt=1, first=3, frames=(b"c", b"d"))
    assert await log.append("job", [last, completed(4.0, 1)], seq) == seq + 2
    run = await log.read_frames("job", FrameCursor(1, 1))
    assert run is not None
    assert (run.first, run.frames) == (2, (b"b", b"c", b"d"))
    assert (await log.snapshot("job")).frames == 4
    assert (await read_all(log, "job"))[-2] == last


async def test_a_closed_log_takes_nothing(log: EventLog) -> None:
    await log.append("job", [accepted(1.0), started(2.0, 1)], 0)
    await log.aclose()
    with pytest.raises(LogUnavailableError):
        await log.append("job", [completed(3.0, 1)], 2)
    with pytest.raises(LogUnavailableError):
        await log.append_frames("job", 1, [b"f"], 2, 3.0)
    await log.aclose()


# --- idempotency keys ------------------------------------------------------------------------------


async def test_a_key_is_its_owners_alone(log: EventLog) -> None:
    await log.append("first", [accepted(1.0, key="k")], 0)
    await log.append("foreign", [accepted(1.0, key="k", owner="bob")], 0)
    with pytest.raises(DuplicateKeyError) as caught:
        await log.append("second", [accepted(2.0, key="k")], 0)
    assert caught.value.existing_job_id == "first"
    with pytest.raises(UnknownJobError):
        await log.snapshot("second")


@pytest.mark.parametrize("how", ["expired", "forgotten"])
async def test_a_key_is_free_again_once_its_job_is_gone(log: EventLog, how: str) -> None:
    await log.append("first", [accepted(1.0, key="k"), failed(2.0)], 0)
    with pytest.raises(DuplicateKeyError):
        await log.append("second", [accepted(3.0, key="k")], 0)
    if how == "expired":
        await log.append("first", [JobExpired(at=4.0)], 2)
    else:
        await log.forget("first")
    assert await log.append("second", [accepted(5.0, key="k")], 0) == 1


# --- following -------------------------------------------------------------------------------------


async def test_following_ends_with_the_job_however_it_ends(log: EventLog) -> None:
    endings: list[Event] = [completed(3.0, 1), failed(3.0), JobCancelled(at=3.0, by="ann", reason="r")]
    for number, ending in enumerate(endings):
        job_id = f"job-{number}"
        await log.append(job_id, [accepted(1.0), started(2.0, 1), ending], 0)
        with log.follow(job_id, 1) as follower:
            assert [stored.seq for stored in await follower.receive()] == [2, 3]
            assert await follower.receive() == []
            assert await follower.receive() == []
        # From behind the end there is nothing to wait for.
        with log.follow(job_id, 3) as follower:
            assert await follower.receive() == []


async def test_who_follows_hears_of_each_event_as_it_comes(log: EventLog) -> None:
    await log.append("job", [accepted(1.0)], 0)
    heard: list[int] = []

    async def follow(task_status: trio.TaskStatus[None]) -> None:
        with log.follow("job") as follower:
            task_status.started()
            while events := await follower.receive():
                heard.extend(stored.seq for stored in events)

    async def hears(seq: int) -> None:
        with trio.fail_after(5):
            while heard != list(range(1, seq + 1)):  # noqa: ASYNC110 - the log is what is under test
                await trio.sleep(0.001)

    async with trio.open_nursery() as nursery:
        await nursery.start(follow)
        await hears(1)
        await log.append("job", [started(2.0, 1)], 1)
        await hears(2)
        for seq in (3, 4):
            await log.append_frames("job", 1, [b"frame"], seq - 1, 3.0)
            await hears(seq)
        await log.append("job", [completed(4.0, 1)], 4)
        await hears(5)


async def test_a_cancelled_follower_has_missed_nothing(log: EventLog) -> None:
    await log.append("job", [accepted(1.0)], 0)
    with log.follow("job", 1) as follower:
        for seq in range(1, 4):
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(follower.receive)
                    await trio.testing.wait_all_tasks_blocked(0.01)
                    scope.cancel()
            event = started(2.0, 1) if seq == 1 else JobDetached(at=2.0, result_ttl_s=9.0)
            await log.append("job", [event], seq)
            assert [stored.seq for stored in await follower.receive()] == [seq + 1]


async def test_nobody_follows_an_unknown_job(log: EventLog) -> None:
    with log.follow("job") as follower, pytest.raises(UnknownJobError):
        await follower.receive()


async def test_a_forgotten_job_keeps_no_follower_waiting(log: EventLog) -> None:
    await log.append("job", [accepted(1.0)], 0)
    outcome: list[object] = []

    async def follow(task_status: trio.TaskStatus[None]) -> None:
        with log.follow("job", 1) as follower:
            task_status.started()
            try:
                outcome.append(await follower.receive())
            except UnknownJobError:
                outcome.append([])

    async with trio.open_nursery() as nursery:
        await nursery.start(follow)
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert outcome == []
        await log.forget("job")
    assert outcome == [[]]
