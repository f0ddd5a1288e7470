from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from events.errors import IllegalTransition
from events.projections import JobSnapshot, apply, project
from events.state import JobState, project_state
from events.types import (
    AttemptFailed,
    AttemptStarted,
    Event,
    Failure,
    FramesReceived,
    JobAccepted,
    JobCancelled,
    JobCompleted,
    JobDetached,
    JobExpired,
    JobFailed,
    Mode,
    NextStep,
)
from tests.unit.strategies import EVENTS, events, unhurried

ATTACHED = JobAccepted(at=100.0, owner="ci", model="m", mode=Mode.STREAM, body=b"{}", request_id="req_1")
DETACHED = replace(ATTACHED, mode=Mode.ASYNC, detached=True, result_ttl_s=60.0, batch_id="msgbatch_1")
STARTED = AttemptStarted(at=101.0, attempt=1, provider="p", upstream_model="u")
FRAMES = FramesReceived(at=102.0, attempt=1, first=1, frames=(b"a", b"b"))
REFUSED = Failure(429, "rate_limit_error", "slow down")
FAILED_ONCE = AttemptFailed(at=103.0, attempt=1, failure=REFUSED, next=NextStep.RETRY)
USAGE = {"output_tokens": 3}
COMPLETED = JobCompleted(at=110.0, attempt=1, message=b'{"id":"msg_1"}', usage=USAGE)
FAILED = JobFailed(at=110.0, failure=Failure(500, "api_error", "broke"), usage=USAGE)
CANCELLED = JobCancelled(at=110.0, by="ci", reason="asked", usage=USAGE)
ENDINGS = [COMPLETED, FAILED, CANCELLED]


def told(*history: Event) -> JobSnapshot:
    return project("j", history)


def test_an_accepted_job() -> None:
    assert told(DETACHED) == JobSnapshot(
        job_id="j",
        owner="ci",
        model="m",
        mode=Mode.ASYNC,
        state=JobState.PENDING,
        detached=True,
        result_ttl_s=60.0,
        created_at=100.0,
        last_seq=1,
        request_id="req_1",
        batch_id="msgbatch_1",
    )


def test_the_first_attempt_starts_the_job_even_at_the_epoch() -> None:
    at_zero = replace(STARTED, at=0.0)
    later = replace(STARTED, at=105.0, attempt=2)
    snapshot = told(replace(ATTACHED, at=0.0), at_zero, later)
    assert (snapshot.started_at, snapshot.attempt, snapshot.state) == (0.0, 2, JobState.PROCESSING)


def test_frames_are_counted_within_their_attempt() -> None:
    more = replace(FRAMES, first=3, frames=(), count=4)
    assert told(ATTACHED, STARTED, FRAMES).frames == 2
    assert told(ATTACHED, STARTED, FRAMES, more).frames == 6
    assert told(ATTACHED, STARTED, FRAMES, more, replace(STARTED, attempt=2)).frames == 0


def test_the_last_failure_shows_until_another_attempt_begins() -> None:
    assert told(ATTACHED, STARTED, FAILED_ONCE).failure == REFUSED
    retried: list[Event] = [ATTACHED, STARTED, FAILED_ONCE, replace(STARTED, attempt=2)]
    assert told(*retried).failure is None
    assert told(*retried, COMPLETED).failure is None
    assert told(*retried, FAILED).failure == FAILED.failure


@pytest.mark.parametrize("ending", ENDINGS, ids=lambda ending: type(ending).__name__)
def test_a_detached_result_is_kept_from_its_end_an_attached_one_not(ending: Event) -> None:
    kept, gone = told(DETACHED, STARTED, ending), told(ATTACHED, STARTED, ending)
    assert (kept.ended_at, kept.expires_at) == (110.0, 170.0)
    assert (gone.ended_at, gone.expires_at) == (110.0, 110.0)
    assert kept.ended
    assert kept.usage == gone.usage == USAGE


def test_a_ttl_without_detachment_keeps_nothing() -> None:
    assert told(replace(ATTACHED, result_ttl_s=60.0), STARTED, COMPLETED).expires_at == 110.0


@pytest.mark.parametrize("before", [[], [STARTED]], ids=["pending", "processing"])
def test_detaching_later_counts_from_the_end_too(before: list[Event]) -> None:
    detached = told(ATTACHED, *before, JobDetached(at=104.0, result_ttl_s=30.0))
    assert (detached.detached, detached.result_ttl_s, detached.expires_at) == (True, 30.0, None)
    ended = told(ATTACHED, *before, JobDetached(at=104.0, result_ttl_s=30.0), FAILED)
    assert ended.expires_at == 140.0


def test_a_completed_job_has_its_message() -> None:
    snapshot = told(DETACHED, STARTED, COMPLETED)
    assert (snapshot.state, snapshot.message, snapshot.last_seq) == (
        JobState.COMPLETED,
        COMPLETED.message,
        3,
    )


def test_a_cancelled_job_says_why() -> None:
    assert told(ATTACHED, CANCELLED).failure == Failure(409, "conflict_error", "the job was cancelled: asked")


def test_an_expired_job_keeps_its_counts_and_no_content() -> None:
    snapshot = told(DETACHED, STARTED, FRAMES, COMPLETED, JobExpired(at=150.0))
    assert (snapshot.state, snapshot.message, snapshot.expires_at) == (JobState.EXPIRED, b"", 150.0)
    assert (snapshot.usage, snapshot.frames, snapshot.ended_at) == (USAGE, 2, 110.0)
    assert snapshot.ended


def test_an_empty_history_is_no_job() -> None:
    with pytest.raises(ValueError, match="at least one event"):
        project("j", [])


def test_a_second_acceptance_is_refused() -> None:
    with pytest.raises(IllegalTransition):
        told(ATTACHED, ATTACHED)


@st.composite
def histories(draw: st.DrawFn) -> list[Event]:
    """Legal for the most part, by taking most events from what may follow."""
    middle = [EVENTS[kind] for kind in (JobDetached, FramesReceived, AttemptStarted, AttemptFailed)]
    history = [draw(EVENTS[JobAccepted]), draw(EVENTS[AttemptStarted])]
    history += draw(st.lists(st.one_of(*middle), max_size=5))
    return history + draw(st.lists(events, max_size=2))


@unhurried
@given(histories())
def test_any_history_folds_as_its_state_does_and_a_bad_step_changes_nothing(history: list[Event]) -> None:
    snapshot: JobSnapshot | None = None
    seen: list[Event] = []
    for event in history:
        before = replace(snapshot) if snapshot else None
        try:
            wanted = project_state([*seen, event])
        except IllegalTransition:
            with pytest.raises(IllegalTransition):
                apply(snapshot, "j", event)
            assert snapshot == before
            continue
        seen.append(event)
        snapshot = apply(snapshot, "j", event)
        assert (snapshot.state, snapshot.last_seq) == (wanted, len(seen))
        assert snapshot.ended == (snapshot.ended_at is not None) == (snapshot.expires_at is not None)
        assert snapshot.ended or not snapshot.message
    assert project("j", seen) == snapshot
