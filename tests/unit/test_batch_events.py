"""Batches as facts: their table of states, their fold, and both as bytes."""

from dataclasses import replace

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from events.batch_codec import (
    decode_batch,
    decode_batch_event,
    encode_batch,
    encode_batch_event,
)
from events.batches import (
    BATCH_TRANSITIONS,
    BatchAccepted,
    BatchCancelRequested,
    BatchEnded,
    BatchEvent,
    BatchState,
    ItemCounts,
    ItemResult,
    apply_batch,
    item_result,
    project_batch,
)
from events.errors import CodecError, IllegalTransition
from events.state import JobState
from tests.unit.strategies import moments, numbers, seconds, texts

few = settings(max_examples=30, deadline=None)
ACCEPTED = BatchAccepted(at=1.0, owner="ann", requests=3, expires_at=9.0, result_ttl_s=5.0, request_id="r")
CANCEL = BatchCancelRequested(at=2.0, by="ann")
ENDED = BatchEnded(at=3.0, counts=ItemCounts(succeeded=2, canceled=1))
EVENTS: dict[type[BatchEvent], BatchEvent] = {type(event): event for event in (ACCEPTED, CANCEL, ENDED)}
counts = st.builds(ItemCounts, **dict.fromkeys(ItemCounts.__dataclass_fields__, numbers))
events: st.SearchStrategy[BatchEvent] = st.one_of(
    st.builds(
        BatchAccepted,
        at=moments,
        owner=texts,
        requests=numbers,
        expires_at=moments,
        result_ttl_s=seconds,
        request_id=texts,
    ),
    st.builds(BatchCancelRequested, at=moments, by=texts),
    st.builds(BatchEnded, at=moments, counts=counts),
)


@pytest.mark.parametrize("state", [None, *BatchState])
@pytest.mark.parametrize("event", EVENTS.values(), ids=[kind.__name__ for kind in EVENTS])
def test_each_event_leads_where_the_table_says_or_nowhere(
    state: BatchState | None, event: BatchEvent
) -> None:
    batch = None if state is None else replace(apply_batch(None, "b", ACCEPTED), state=state)
    expected = BATCH_TRANSITIONS[state].get(type(event))
    if expected is None:
        with pytest.raises(IllegalTransition):
            apply_batch(batch, "b", event)
    else:
        assert apply_batch(batch, "b", event).state is expected


def test_a_batch_is_what_its_events_tell() -> None:
    batch = project_batch("b", [ACCEPTED, CANCEL, ENDED])
    assert (batch.state, batch.last_seq, batch.requests) == (BatchState.ENDED, 3, 3)
    assert (batch.cancel_initiated_at, batch.cancelled_by) == (2.0, "ann")
    assert (batch.ended_at, batch.counts, batch.results_until) == (3.0, ENDED.counts, 8.0)
    assert project_batch("b", [ACCEPTED]).results_until is None
    with pytest.raises(ValueError, match="at least one"):
        project_batch("b", [])


@few
@given(counts, st.sampled_from([result for result in ItemResult if result is not ItemResult.PROCESSING]))
def test_an_item_that_ends_keeps_the_sum(before: ItemCounts, result: ItemResult) -> None:
    after = before.moved(result)
    names = ItemCounts.__dataclass_fields__
    assert sum(getattr(after, name) for name in names) == sum(getattr(before, name) for name in names)
    assert getattr(after, result.value) == getattr(before, result.value) + 1


def test_only_what_was_cancelled_can_have_lapsed() -> None:
    assert {state: item_result(state, lapsed=False).value for state in JobState} == {
        "pending": "processing",
        "processing": "processing",
        "completed": "succeeded",
        "failed": "errored",
        "cancelled": "canceled",
        "expired": "expired",
    }
    assert item_result(JobState.CANCELLED, lapsed=True) is ItemResult.EXPIRED


@few
@given(events)
def test_an_event_comes_back_from_its_bytes(event: BatchEvent) -> None:
    assert decode_batch_event(encode_batch_event(event)) == event


@few
@given(st.lists(events.filter(lambda event: isinstance(event, BatchAccepted)), min_size=1, max_size=1))
def test_a_batch_comes_back_from_its_bytes(first: list[BatchEvent]) -> None:
    for story in (first, [*first, CANCEL], [*first, CANCEL, ENDED]):
        batch = project_batch("b", story)
        assert decode_batch(encode_batch(batch)) == batch


@pytest.mark.parametrize(
    "stored",
    [
        b"",
        b"[]",
        b'{"v": 2, "type": "BatchEnded", "event": {}}',
        b'{"v": 1, "type": "BatchMelted", "event": {}}',
        b'{"v": 1, "type": "BatchEnded", "event": {"at": 1}}',
        b'{"v": 1, "type": "BatchEnded"}',
    ],
)
def test_what_is_no_event_is_told(stored: bytes) -> None:
    with pytest.raises(CodecError):
        decode_batch_event(stored)
    with pytest.raises(CodecError):
        decode_batch(stored)


def test_fields_of_a_later_release_are_ignored() -> None:
    stored = orjson.loads(encode_batch_event(CANCEL))
    stored["event"]["colour"] = "grey"
    assert decode_batch_event(orjson.dumps(stored)) == CANCEL


def test_what_json_cannot_hold_is_refused() -> None:
    with pytest.raises(CodecError):
        encode_batch_event(BatchCancelRequested(at=1.0, by="\ud800"))
