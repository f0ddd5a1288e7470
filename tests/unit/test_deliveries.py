"""The life of a delivery: the table, the fold, the codec, and the body that is sent."""

from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from events.deliveries import (
    TRANSITIONS,
    DeliveryAccepted,
    DeliveryAttemptFailed,
    DeliveryEvent,
    DeliveryGivenUp,
    DeliverySkipped,
    DeliverySnapshot,
    DeliveryState,
    DeliverySucceeded,
    RedeliveryRequested,
    WebhookEvent,
    apply,
    decode,
    decode_snapshot,
    delivery_id,
    encode,
    encode_snapshot,
    payload,
    progress_id,
    progress_payload,
    project,
)
from events.errors import CodecError, IllegalTransition

ACCEPTED = DeliveryAccepted(
    at=1_000.5,
    endpoint="orders",
    event=WebhookEvent.FAILED,
    job_id="job-1",
    owner="ann",
    status="failed",
    status_code=529,
    result_url="/v1/jobs/job-1/result",
    result_expires_at=4_600.0,
)
FAILED = DeliveryAttemptFailed(
    at=1_001.0, next_attempt_at=1_031.0, error="it answered 500", status_code=500, duration_s=0.25
)
SUCCEEDED = DeliverySucceeded(at=1_031.5, status_code=204, duration_s=0.5)
GIVEN_UP = DeliveryGivenUp(at=1_002.0, error="no connection")
SKIPPED = DeliverySkipped(at=1_002.0, reason="the endpoint does not take this event")
AGAIN = RedeliveryRequested(at=2_000.0, by="root")
ALL: tuple[DeliveryEvent, ...] = (ACCEPTED, FAILED, SUCCEEDED, GIVEN_UP, SKIPPED, AGAIN)


def a_delivery_in(state: DeliveryState) -> DeliverySnapshot:
    histories: dict[DeliveryState, Sequence[DeliveryEvent]] = {
        DeliveryState.PENDING: [ACCEPTED, FAILED],
        DeliveryState.DELIVERED: [ACCEPTED, FAILED, SUCCEEDED],
        DeliveryState.FAILED: [ACCEPTED, FAILED, GIVEN_UP],
        DeliveryState.SKIPPED: [ACCEPTED, SKIPPED],
    }
    return project("whd_1", histories[state])


@pytest.mark.parametrize("state", [None, *DeliveryState])
@pytest.mark.parametrize("event", ALL, ids=lambda event: type(event).__name__)
def test_every_step_is_in_the_table_or_refused(state: DeliveryState | None, event: DeliveryEvent) -> None:
    before = None if state is None else a_delivery_in(state)
    follows = TRANSITIONS[state].get(type(event))
    if follows is None:
        with pytest.raises(IllegalTransition, match="does not follow"):
            apply(before, "whd_1", event)
        return
    after = apply(before, "whd_1", event)
    assert after.state is follows
    assert after.last_seq == (before.last_seq + 1 if before else 1)
    # A delivery has its next moment while it is open, and its last once it is closed.
    assert (after.next_attempt_at is None) == (after.ended_at is not None) == (not after.pending)


def test_the_samples_are_all_the_events_there_are() -> None:
    assert {type(event) for event in ALL} == set(get_args(DeliveryEvent))


def test_the_fold_counts_tries_in_all_and_of_the_round() -> None:
    history: list[DeliveryEvent] = [ACCEPTED, FAILED, FAILED, GIVEN_UP, AGAIN, FAILED]
    snapshot = project("whd_1", history)
    assert (snapshot.attempts, snapshot.round_attempts) == (4, 1)
    assert (snapshot.state, snapshot.next_attempt_at) == (DeliveryState.PENDING, FAILED.next_attempt_at)
    assert (snapshot.last_status_code, snapshot.last_error) == (500, "it answered 500")
    done = apply(snapshot, "whd_1", SUCCEEDED)
    assert (done.attempts, done.ended_at, done.last_status_code, done.last_error) == (5, 1_031.5, 204, None)
    assert apply(snapshot, "whd_1", GIVEN_UP).last_status_code is None


def test_a_history_begins_somewhere() -> None:
    with pytest.raises(ValueError, match="at least one event"):
        project("whd_1", [])


@pytest.mark.parametrize("event", ALL, ids=lambda event: type(event).__name__)
def test_events_are_read_as_they_were_written(event: DeliveryEvent) -> None:
    stored = orjson.loads(encode(event))
    assert (stored["v"], stored["type"]) == (1, type(event).__name__)
    assert decode(encode(event)) == event
    # A field that a later release added is passed over.
    assert decode(orjson.dumps(stored | {"mood": "good"})) == event


@given(state=st.sampled_from(DeliveryState), attempts=st.integers(0, 2**31), error=st.none() | st.text())
def test_snapshots_are_read_as_they_were_written(
    state: DeliveryState, attempts: int, error: str | None
) -> None:
    snapshot = replace(a_delivery_in(state), attempts=attempts, last_error=error)
    assert decode_snapshot(encode_snapshot(snapshot)) == snapshot


@pytest.mark.parametrize(
    "fact",
    [
        b"",
        b"[]",
        b"{}",
        b'{"v":2,"type":"DeliverySkipped","at":1,"reason":""}',
        b'{"v":1,"type":"JobAccepted","at":1}',
        b'{"v":1,"type":"DeliverySkipped","at":"soon","reason":""}',
    ],
)
def test_what_is_no_event_is_refused(fact: bytes) -> None:
    with pytest.raises(CodecError):
        decode(fact)
    with pytest.raises(CodecError):
        decode_snapshot(fact)


def test_the_id_is_that_of_the_job_and_the_event() -> None:
    first = delivery_id("job-1", WebhookEvent.COMPLETED)
    assert first == delivery_id("job-1", WebhookEvent.COMPLETED)
    assert first.startswith("whd_")
    others = {
        delivery_id("job-2", WebhookEvent.COMPLETED),
        delivery_id("job-1", WebhookEvent.FAILED),
        progress_id("job-1", "1-2"),
        progress_id("job-1", "1-3"),
    }
    assert len(others | {first}) == 5


def test_the_body_is_that_of_the_contract_and_the_same_on_every_try() -> None:
    first = project("whd_1", [ACCEPTED])
    assert orjson.loads(payload(first)) == {
        "event": "async_job.failed",
        "created_at": "1970-01-01T00:16:40.500Z",
        "data": {
            "job_id": "job-1",
            "request_type": "messages",
            "status": "failed",
            "status_code": 529,
            "result_url": "/v1/jobs/job-1/result",
            "result_expires_at": "1970-01-01T01:16:40.000Z",
        },
    }
    assert payload(project("whd_1", [ACCEPTED, FAILED, GIVEN_UP, AGAIN])) == payload(first)


def test_progress_has_the_cursor_to_resume_from() -> None:
    body = orjson.loads(progress_payload(at=1.0, job_id="job-1", result_url="/r", cursor="2-17"))
    assert body["event"] == "async_job.progress"
    assert (body["data"]["status"], body["data"]["status_code"]) == ("processing", 200)
    assert (body["data"]["cursor"], body["data"]["result_expires_at"]) == ("2-17", None)
