"""What is kept of an ended job in memory: as small as it can be, and all there."""

import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.attempt import Answer, completed
from events.log.base import FrameCursor
from events.log.content import trimmed
from events.log.memory_job import MemoryJob
from events.log.packed import PackedFrames
from events.projections import project
from events.types import AttemptStarted, Event, FramesReceived, JobCompleted, StoredEvent
from tests.unit.sqlite_files import accepted

FRAMES = st.lists(st.binary(min_size=1, max_size=9), min_size=1, max_size=5).map(tuple)
ATTEMPTS = st.lists(st.lists(FRAMES, max_size=5), min_size=1, max_size=3)
END = JobCompleted(at=9.0, attempt=1, message=b'{"id":"msg"}', usage={})


def history(attempts: list[list[tuple[bytes, ...]]]) -> list[Event]:
    """Attempts, each a start and its runs."""
    events: list[Event] = []
    for number, runs in enumerate(attempts, 1):
        events.append(AttemptStarted(at=2.0 * number, attempt=number, provider="p", upstream_model="u"))
        first = 1
        for frames in runs:
            events.append(FramesReceived(at=first / 3, attempt=number, first=first, frames=frames))
            first += len(frames)
    return [*events, END]


def job_of(events: list[Event]) -> MemoryJob:
    job = MemoryJob("j")
    job.stated = project("j", [accepted()])
    for event in events:
        job.add(event)
    return job


@given(ATTEMPTS)
def test_a_packed_job_reads_as_before(attempts: list[list[tuple[bytes, ...]]]) -> None:
    events = history(attempts)
    packed, loose = job_of(events), job_of(events)
    packed.pack()
    assert packed.content_bytes() == loose.content_bytes()
    for after in range(len(events) + 2):
        for limit in (1, 2, 1000):
            assert packed.read(after, limit) == loose.read(after, limit)
    for attempt in range(len(attempts) + 2):
        for frame in range(30):
            for max_bytes in (1, 10, 1000):
                after_frame = FrameCursor(attempt, frame)
                found = packed.read_frames(after_frame, max_bytes)
                run = loose.read_frames(after_frame, 1 << 20)
                assert (found is None) == (run is None)
                if found is not None and run is not None:
                    assert found == run._replace(frames=run.frames[: len(found.frames)])
                    # At least one, and no more than begin within the bytes that were asked for.
                    assert sum(map(len, found.frames[:-1])) < max_bytes
                    assert len(found.frames) == len(run.frames) or sum(map(len, found.frames)) >= max_bytes


@given(ATTEMPTS)
def test_a_packed_job_is_redacted_as_any_other(attempts: list[list[tuple[bytes, ...]]]) -> None:
    events = history(attempts)
    packed, loose = job_of(events), job_of(events)
    packed.pack()
    for job in (packed, loose):
        job.redact()
        assert job.current().last_seq == len(events)
    assert packed.content_bytes() == loose.content_bytes() == 0
    assert packed.read(0, 1000) == loose.read(0, 1000)
    assert all(packed.read_frames(FrameCursor(number, 0), 1000) is None for number in range(4))


def test_a_job_whose_content_is_gone_is_not_packed() -> None:
    gone = FramesReceived(at=1.0, attempt=1, first=1, frames=(), count=3)
    rest = FramesReceived(at=2.0, attempt=1, first=4, frames=(b"d",))
    job = job_of([gone, rest, END])
    job._runs[1].remove(gone)
    job.pack()
    assert [stored.event for stored in job.read(0, 10)] == [gone, rest, END]
    assert job.read_frames(FrameCursor(1, 0), 10) is None
    with pytest.raises(ValueError, match="only frames"):
        PackedFrames([StoredEvent("j", 1, gone)])


@contextmanager
def allocations() -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
    finally:
        tracemalloc.stop()


def test_a_packed_stream_takes_a_third_less_memory() -> None:
    with allocations():
        runs = [[b"%03d " % run + bytes(100)] for run in range(100)]
        job = job_of(history([[tuple(frames) for frames in runs]]))
        del runs
        loose = tracemalloc.get_traced_memory()[0]
        job.pack()
        assert tracemalloc.get_traced_memory()[0] < loose * 2 / 3
        assert len(job.read(0, 1000)) == 102


def test_a_message_is_kept_in_memory_of_its_own_size() -> None:
    with allocations():
        before = tracemalloc.get_traced_memory()[0]
        event = completed(Answer(b""), orjson.dumps({"text": "x" * 3000}), attempt=1, at=2.0)
        assert tracemalloc.get_traced_memory()[0] - before < 4000
    assert trimmed(event.message) == event.message
