from dataclasses import replace
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from events.codec import encode
from events.errors import CodecError
from events.log.content import content_of, without_content
from events.log.sqlite_rows import (
    ROW_BYTES,
    EventRow,
    event_rows,
    frames_of,
    job_row,
    message_seq,
    snapshot_of,
    stored_events,
)
from events.projections import JobSnapshot
from events.state import JobState
from events.types import Event, FramesReceived, JobAccepted, JobCompleted, JobDetached, JobExpired, Mode
from tests.unit.strategies import contents, events, failures, json_objects, moments, texts, unhurried

frame_lists = st.lists(st.lists(contents, min_size=1, max_size=3).map(tuple), min_size=1, max_size=5)


def run_of(frames: tuple[bytes, ...], first: int, attempt: int = 1) -> FramesReceived:
    return FramesReceived(at=float(first), attempt=attempt, first=first, frames=frames)


def runs_of(frame_runs: list[tuple[bytes, ...]]) -> list[FramesReceived]:
    runs: list[FramesReceived] = []
    for frames in frame_runs:
        runs.append(run_of(frames, runs[-1].last + 1 if runs else 1))
    return runs


@unhurried
@given(st.lists(events, min_size=1, max_size=6), st.integers(1, 1000))
def test_any_events_come_back_from_their_rows(history: list[Event], first_seq: int) -> None:
    rows = event_rows(first_seq, history)
    back = [stored for row in rows for stored in stored_events("j", row)]
    assert [stored.event for stored in back] == history
    assert [stored.seq for stored in back] == list(range(first_seq, first_seq + len(history)))


@unhurried
@given(st.lists(events, min_size=1, max_size=6))
def test_a_row_without_its_content_is_the_redacted_event(history: list[Event]) -> None:
    rows = event_rows(1, history)
    redacted = [stored for row in rows for stored in stored_events("j", row._replace(content=None))]
    assert [stored.event for stored in redacted] == [without_content(event) for event in history]
    assert not any(content_of(stored.event) for stored in redacted)


ACCEPTED = JobAccepted(at=1.0, owner="", model="m", mode=Mode.ASYNC, body=b"body")
DONE = JobCompleted(at=3.0, attempt=1, message=b"message")
DETACHED = JobDetached(at=2.0, result_ttl_s=1.0)


@pytest.mark.parametrize(
    ("history", "ends"),
    [
        ([DETACHED, DETACHED], [2]),
        ([ACCEPTED, DETACHED, DETACHED], [3]),
        ([DETACHED, ACCEPTED, DETACHED], [1, 3]),
        ([ACCEPTED, ACCEPTED], [1, 2]),
        ([ACCEPTED, DETACHED, run_of((b"a",), 1), DETACHED, DONE], [2, 3, 4, 5]),
        # A Message is looked up by the number of its row.
        ([DONE, JobExpired(at=4.0)], [1, 2]),
        ([replace(ACCEPTED, body=b"x" * ROW_BYTES), DETACHED], [1, 2]),
    ],
)
def test_events_without_content_share_the_row_before_them(history: list[Event], ends: list[int]) -> None:
    rows = event_rows(1, history)
    assert [row.seq for row in rows] == ends
    assert [stored.event for row in rows for stored in stored_events("j", row)] == history


@unhurried
@given(frame_lists)
def test_the_runs_of_a_flush_share_a_row_and_keep_their_boundaries(
    frame_runs: list[tuple[bytes, ...]],
) -> None:
    runs = runs_of(frame_runs)
    (row,) = event_rows(5, runs)
    assert (row.seq, row.attempt, row.last_frame) == (4 + len(runs), 1, runs[-1].last)
    assert [stored.event for stored in stored_events("j", row)] == runs
    assert frames_of(row) == (1, [frame for run in runs for frame in run.frames])


def test_a_new_attempt_a_gap_and_a_full_row_each_begin_a_row() -> None:
    big = run_of((b"x" * ROW_BYTES,), 3)
    rows = event_rows(1, [run_of((b"a", b"b"), 1), big, run_of((b"c",), 4), run_of((b"d",), 1, attempt=2)])
    assert [(row.seq, row.attempt, row.last_frame) for row in rows] == [(2, 1, 3), (3, 1, 4), (4, 2, 1)]
    rows = event_rows(1, [run_of((b"a",), 1), run_of((b"b",), 3)])
    assert [row.last_frame for row in rows] == [1, 3]


@pytest.mark.parametrize(
    "fact",
    [
        b"{}",
        b"no json",
        b"[]",
        b'{"v":2,"attempt":1,"first":1,"runs":[[0.5,[1]]]}',
        b'{"v":1,"attempt":1,"first":1,"runs":[]}',
        b'{"v":1,"attempt":1,"first":1,"runs":[[0.5,[2]]]}',
        b'{"v":1,"attempt":1,"first":0,"runs":[[0.5,[1]]]}',
        b'{"v":1,"attempt":1,"first":1,"runs":[[0.5]]}',
    ],
)
def test_damaged_frames_are_no_frames(fact: bytes) -> None:
    with pytest.raises(CodecError):
        frames_of(EventRow(1, 1, 1, fact, b"x"))


@pytest.mark.parametrize("fact", [b"", b"garbage", b"{}", encode(DETACHED) + b"\n", "garbage", None, 7])
def test_damaged_events_are_no_events(fact: Any) -> None:
    with pytest.raises(CodecError):
        stored_events("j", EventRow(1, None, None, fact, None))


snapshots = st.builds(
    JobSnapshot,
    job_id=texts,
    owner=texts,
    model=texts,
    mode=st.sampled_from(Mode),
    state=st.sampled_from(JobState),
    detached=st.booleans(),
    result_ttl_s=moments,
    created_at=moments,
    last_seq=st.integers(1, 1 << 40),
    started_at=st.none() | moments,
    ended_at=st.none() | moments,
    expires_at=st.none() | moments,
    attempt=st.integers(0, 1 << 31),
    frames=st.integers(0, 1 << 40),
    usage=json_objects,
    failure=st.none() | failures,
    message=contents,
    request_id=texts,
    may_rerun=st.booleans(),
    batch_id=st.none() | texts,
    custom_id=st.none() | texts,
    webhook=st.none() | texts,
    lapsed=st.booleans(),
)


@unhurried
@given(snapshots)
def test_a_job_comes_back_from_its_row(snapshot: JobSnapshot) -> None:
    row = job_row(7, snapshot, key="k", message_seq=3)
    assert row[0] == 7
    assert snapshot_of(row, snapshot.message) == snapshot


def test_a_damaged_job_row_is_told() -> None:
    snapshot = JobSnapshot(
        job_id="j",
        owner="",
        model="m",
        mode=Mode.PLAIN,
        state=JobState.PENDING,
        detached=False,
        result_ttl_s=0,
        created_at=0,
    )
    row = list(job_row(1, snapshot, key=None, message_seq=None))
    row[row.index("pending")] = "puzzled"
    with pytest.raises(CodecError):
        snapshot_of(row)
    with pytest.raises(CodecError):
        snapshot_of([*job_row(1, snapshot, key=None, message_seq=None)[:-2], b"{", None])
    assert snapshot_of(job_row(1, replace(snapshot, usage={}), key=None, message_seq=None)).usage == {}


def test_message_seq_is_where_the_message_is() -> None:
    completed = JobCompleted(at=1.0, attempt=1, message=orjson.dumps({}))
    assert message_seq(4, [completed, JobExpired(at=2.0)]) == 4
    assert message_seq(4, [replace(completed, message=b"")]) is None
