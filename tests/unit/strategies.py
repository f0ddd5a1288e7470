"""What hypothesis draws from in more than one test."""

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st

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

# A shared machine may stall any one example.
unhurried = settings(deadline=None)

moments = st.floats(min_value=0, max_value=4e9)
seconds = st.floats(min_value=0, max_value=604_800)
texts = st.text(max_size=20)
numbers = st.integers(min_value=1, max_value=1 << 31)
contents = st.binary(max_size=40) | texts.map(str.encode)
# orjson reads integers up to 64 bits as such.
scalars = (
    st.none()
    | st.booleans()
    | st.integers(min_value=-(1 << 63), max_value=(1 << 64) - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts
)
json_values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
json_objects: st.SearchStrategy[dict[str, Any]] = st.dictionaries(texts, json_values, max_size=4)
usages = st.dictionaries(st.sampled_from(["input_tokens", "output_tokens", "b64"]), json_values, max_size=3)
headers = st.lists(st.tuples(texts, texts), max_size=3).map(tuple)
failures = st.builds(Failure, st.integers(400, 599), texts, texts, headers)
optional_texts = st.none() | texts


def _runs(frames: tuple[bytes, ...], first: int, count: int, at: float, attempt: int) -> FramesReceived:
    return FramesReceived(
        at=at, attempt=attempt, first=first, frames=frames, count=count if not frames else len(frames)
    )


EVENTS: dict[type[Event], st.SearchStrategy[Event]] = {
    JobAccepted: st.builds(
        JobAccepted,
        at=moments,
        owner=texts,
        model=texts,
        mode=st.sampled_from(Mode),
        body=contents,
        detached=st.booleans(),
        result_ttl_s=seconds,
        headers=headers,
        request_id=texts,
        idempotency_key=optional_texts,
        batch_id=optional_texts,
        custom_id=optional_texts,
        webhook=optional_texts,
    ),
    JobDetached: st.builds(JobDetached, at=moments, result_ttl_s=seconds),
    AttemptStarted: st.builds(
        AttemptStarted, at=moments, attempt=numbers, provider=texts, upstream_model=texts, key_name=texts
    ),
    FramesReceived: st.builds(
        _runs,
        frames=st.lists(contents, max_size=4).map(tuple),
        first=numbers,
        count=numbers,
        at=moments,
        attempt=numbers,
    ),
    AttemptFailed: st.builds(
        AttemptFailed,
        at=moments,
        attempt=numbers,
        failure=failures,
        next=st.sampled_from(NextStep),
        retry_after_s=st.none() | seconds,
    ),
    JobCompleted: st.builds(
        JobCompleted,
        at=moments,
        attempt=numbers,
        message=contents,
        usage=usages,
        upstream_request_id=optional_texts,
    ),
    JobFailed: st.builds(JobFailed, at=moments, failure=failures, usage=usages),
    JobCancelled: st.builds(
        JobCancelled, at=moments, by=texts, reason=texts, usage=usages, lapsed=st.booleans()
    ),
    JobExpired: st.builds(JobExpired, at=moments),
}
"""Arbitrary events of every type."""

events = st.one_of(*EVENTS.values())
