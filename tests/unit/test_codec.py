from dataclasses import fields
from typing import Any, get_args

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from events.codec import SCHEMA_VERSION, UPGRADES, Upgrade, decode, encode, public, rfc3339
from events.errors import CodecError
from events.types import (
    AttemptFailed,
    AttemptStarted,
    Event,
    Failure,
    FramesReceived,
    JobAccepted,
    JobCompleted,
    JobExpired,
    JobFailed,
    Mode,
    NextStep,
    StoredEvent,
)
from tests.unit.strategies import EVENTS, events, json_values, moments, texts, unhurried

ACCEPTED = JobAccepted(at=1.5, owner="ci", model="m", mode=Mode.ASYNC, body=b'{"model":"m"}')


def stored(event: Event) -> dict[str, Any]:
    parsed: dict[str, Any] = orjson.loads(encode(event))
    return parsed


def test_every_event_type_is_drawn() -> None:
    assert set(EVENTS) == set(get_args(Event))


@unhurried
@given(events)
def test_decode_gives_back_what_was_encoded(event: Event) -> None:
    back = decode(encode(event))
    assert back == event
    for field in fields(event):
        assert type(getattr(back, field.name)) is type(getattr(event, field.name))


@unhurried
@given(events, texts.map("x_".__add__), json_values)
def test_fields_of_a_later_release_are_ignored(event: Event, name: str, value: Any) -> None:
    later = stored(event)
    later["event"][name] = value
    assert decode(orjson.dumps(later)) == event


@unhurried
@given(st.binary() | json_values.map(orjson.dumps))
def test_garbage_is_a_codec_error(data: bytes) -> None:
    with pytest.raises(CodecError):
        decode(data)


@unhurried
@given(events, st.data())
def test_a_damaged_field_is_a_codec_error_or_another_event(event: Event, data: st.DataObject) -> None:
    damaged = stored(event)
    name = data.draw(st.sampled_from(sorted(damaged["event"])))
    damaged["event"][name] = data.draw(json_values)
    try:
        other = decode(orjson.dumps(damaged))
    except CodecError:
        return
    assert type(other) is type(event)
    assert decode(encode(other)) == other


def test_text_stays_text_and_other_bytes_become_base64() -> None:
    frames = FramesReceived(at=0, attempt=1, first=1, frames=("é".encode(), b"\xff\x00"))
    assert stored(frames)["event"]["frames"] == ["é", {"b64": "/wA="}]
    assert decode(encode(frames)) == frames


def test_usage_that_looks_like_content_is_left_alone() -> None:
    event = JobCompleted(at=0, attempt=1, message=b"", usage={"b64": "AAAA"})
    assert decode(encode(event)) == event


@pytest.mark.parametrize("version", [SCHEMA_VERSION + 1, 0, -1, None, "1", 1.0, True])
def test_an_unknown_version_is_refused(version: object) -> None:
    with pytest.raises(CodecError, match="version"):
        decode(orjson.dumps({**stored(ACCEPTED), "v": version}))


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(CodecError, match="unknown kind"):
        decode(orjson.dumps({**stored(ACCEPTED), "kind": "JobDreamed"}))


@pytest.mark.parametrize(
    ("name", "value"),
    [("mode", "telepathy"), ("at", "soon"), ("result_ttl_s", -1), ("body", 7), ("body", {"b64": "?"})],
)
def test_an_error_names_the_place_and_no_content(name: str, value: object) -> None:
    damaged = stored(ACCEPTED)
    damaged["event"][name] = value
    with pytest.raises(CodecError, match="stored JobAccepted") as caught:
        decode(orjson.dumps(damaged))
    assert "model" not in str(caught.value)
    assert str(value) not in str(caught.value)


def test_older_versions_are_upgraded_step_by_step() -> None:
    def name_the_owner(old: dict[str, Any]) -> dict[str, Any]:
        event = dict(old["event"])
        return {**old, "event": {**event, "owner": event.pop("key")}}

    def add_the_mode(older: dict[str, Any]) -> dict[str, Any]:
        return {**older, "event": {**older["event"], "mode": "async"}}

    upgrades: dict[int, Upgrade] = {0: name_the_owner, -1: add_the_mode}
    oldest = stored(ACCEPTED)
    oldest["v"] = -1
    oldest["event"]["key"] = oldest["event"].pop("owner")
    del oldest["event"]["mode"]
    assert decode(orjson.dumps(oldest), upgrades=upgrades) == ACCEPTED
    assert dict(UPGRADES) == {}
    with pytest.raises(CodecError, match="no upgrade"):
        decode(orjson.dumps(oldest))
    del oldest["event"]["key"]
    with pytest.raises(CodecError, match="version 0 is damaged"):
        decode(orjson.dumps(oldest), upgrades=upgrades)


def test_what_json_cannot_hold_is_refused() -> None:
    with pytest.raises(CodecError, match="AttemptStarted cannot be written"):
        encode(AttemptStarted(at=0, attempt=1, provider="\ud800", upstream_model="m"))


# --- the public view -----------------------------------------------------------------------------------


def test_an_accepted_job_in_public() -> None:
    event = JobAccepted(
        at=0.0015,
        owner="ci",
        model="m",
        mode=Mode.STREAM,
        body=b'{"model":"m","messages":[]}',
        headers=(("anthropic-beta", "a"), ("x-api-key", "secret"), ("anthropic-beta", "b")),
        request_id="req_1",
    )
    assert public(StoredEvent("j", 1, event)) == {
        "seq": 1,
        "at": "1970-01-01T00:00:00.001Z",
        "type": "JobAccepted",
        "owner": "ci",
        "model": "m",
        "mode": "stream",
        "body": {"model": "m", "messages": []},
        "detached": False,
        "result_ttl_s": 0.0,
        "headers": [["anthropic-beta", "a"], ["anthropic-beta", "b"]],
        "request_id": "req_1",
        "may_rerun": True,
    }


def test_failures_in_public() -> None:
    failure = Failure(429, "rate_limit_error", "slow down", (("retry-after", "3"),))
    wanted = {"status": 429, "type": "rate_limit_error", "message": "slow down"}
    attempt = AttemptFailed(at=0, attempt=1, failure=failure, next=NextStep.RETRY, retry_after_s=3)
    view = public(StoredEvent("j", 3, attempt))
    assert (view["failure"], view["next"], view["retry_after_s"]) == (wanted, "retry", 3)
    assert public(StoredEvent("j", 4, JobFailed(at=0, failure=failure)))["failure"] == wanted


def test_frames_in_public() -> None:
    view = public(StoredEvent("j", 2, FramesReceived(at=0, attempt=1, first=3, frames=(b"a\n\n", b"\xff"))))
    assert (view["frames"], view["first"], view["count"]) == (["a\n\n", "\ufffd"], 3, 2)


def test_redacted_content_is_absent() -> None:
    redacted: list[Event] = [
        JobAccepted(at=0, owner="", model="m", mode=Mode.PLAIN, body=b""),
        FramesReceived(at=0, attempt=1, first=1, frames=(), count=4),
        JobCompleted(at=0, attempt=1, message=b""),
    ]
    for event in redacted:
        assert not {"body", "frames", "message"} & public(StoredEvent("j", 1, event)).keys()


@pytest.mark.parametrize(
    ("content", "shown"),
    [
        (b'{"a":1}', {"a": 1}),
        (b"not json", "not json"),
        (b"\xff", "\ufffd"),
        (b"[" * 300 + b"]" * 300, "[" * 300 + "]" * 300),
    ],
    ids=["object", "text", "not UTF-8", "deeper than can be written"],
)
def test_content_is_parsed_where_it_parses(content: bytes, shown: object) -> None:
    assert public(StoredEvent("j", 1, JobCompleted(at=0, attempt=1, message=content)))["message"] == shown


@unhurried
@given(events, st.integers(1, 1 << 40))
def test_the_public_view_is_always_json(event: Event, seq: int) -> None:
    view = public(StoredEvent("j", seq, event))
    assert orjson.loads(orjson.dumps(view)) == view
    assert list(view)[:3] == ["seq", "at", "type"]
    assert None not in view.values()


@pytest.mark.parametrize(
    ("at", "text"),
    [
        (0.0, "1970-01-01T00:00:00.000Z"),
        (1_700_000_000.9999, "2023-11-14T22:13:20.999Z"),
        (1_700_000_000, "2023-11-14T22:13:20.000Z"),
        (1_709_164_800.5, "2024-02-29T00:00:00.500Z"),
    ],
)
def test_moments_are_rfc_3339(at: float, text: str) -> None:
    assert rfc3339(at) == text


@unhurried
@given(moments, moments)
def test_moments_sort_as_text(one: float, other: float) -> None:
    assert (rfc3339(one) <= rfc3339(other)) or one > other


def test_an_expired_job_says_no_more_than_that() -> None:
    assert public(StoredEvent("j", 9, JobExpired(at=0))).keys() == {"seq", "at", "type"}
