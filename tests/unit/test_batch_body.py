"""The body of a batch, however the network cuts it up."""

from contextlib import suppress
from itertools import pairwise
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.providers.splice import member
from service.batch_body import BatchBodyReader, RawRequest, RequestTooLargeError
from service.errors import InvalidRequestError
from tests.unit.strategies import json_objects, json_values

MAX_BYTES = 1 << 20
few = settings(max_examples=40, deadline=None)
_SPACES = st.sampled_from([b"", b" ", b"\n\t "])


def read(body: bytes, *, cuts: list[int] | None = None, max_bytes: int = MAX_BYTES) -> list[RawRequest]:
    reader = BatchBodyReader(max_request_bytes=max_bytes)
    edges = [0, *sorted(cut % (len(body) + 1) for cut in cuts or []), len(body)]
    found: list[RawRequest] = []
    for start, end in pairwise(edges):
        found += reader.feed(body[start:end])
    assert reader.finish() == len(found)
    return found


@st.composite
def bodies(draw: st.DrawFn) -> tuple[bytes, list[bytes]]:
    """A body, and the bytes of each of its requests."""
    elements = draw(st.lists(json_objects, max_size=5))
    raw = [
        orjson.dumps(element, option=draw(st.sampled_from([0, orjson.OPT_INDENT_2]))) for element in elements
    ]
    space = draw(_SPACES)
    members = [b'"requests"' + space + b":" + space + b"[" + space + (space + b"," + space).join(raw) + b"]"]
    for key in draw(st.lists(st.sampled_from(["a", 'q"\\', "é"]), max_size=2, unique=True)):
        other = orjson.dumps(key) + b":" + orjson.dumps(draw(json_values))
        members.insert(draw(st.integers(0, len(members))), other)
    return space + b"{" + (space + b"," + space).join(members) + space + b"}" + space, raw


@few
@given(bodies(), st.lists(st.integers(0, 10_000), max_size=6))
def test_its_requests_are_the_clients_bytes_wherever_it_was_cut(
    body: tuple[bytes, list[bytes]], cuts: list[int]
) -> None:
    text, raw = body
    found = read(text, cuts=cuts)
    assert [one.raw for one in found] == raw
    assert [one.place for one in found] == list(range(len(raw)))


@few
@given(bodies())
def test_byte_by_byte_it_is_the_same(body: tuple[bytes, list[bytes]]) -> None:
    text, raw = body
    assert [one.raw for one in read(text, cuts=list(range(len(text))))] == raw


@few
@given(bodies(), st.integers(0, 10_000), st.binary(min_size=1, max_size=4))
def test_a_damaged_body_is_the_clients_error_or_still_json(
    body: tuple[bytes, list[bytes]], at: int, damage: bytes
) -> None:
    text, _ = body
    place = at % len(text)
    broken = text[:place] + damage + text[place:]
    found: list[RawRequest] = []
    with suppress(InvalidRequestError):
        found = read(broken)
    # What is within the requests is checked one by one, later.
    for one in found:
        assert one.raw.startswith(b"{")
        assert one.raw in broken


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"", "it breaks off"),
        (b"[]", "{ expected"),
        (b'{"requests": [{}', "it breaks off"),
        (b'{"requests": [{"a": "b', "it breaks off"),
        (b'{"requests": [{}]', "it breaks off"),
        (b'{"requests": [{}]} {', "more follows after its end"),
        (b'{"requests": [{} {}]}', ", or ] expected"),
        (b'{"requests": [{},]}', "requests.1: Input should be an object"),
        (b'{"requests": [{}, 7]}', "requests.1: Input should be an object"),
        (b'{"requests": {}}', "requests: Input should be a valid list"),
        (b'{"requests": [], "requests": []}', "given twice"),
        (b'{"requests" []}', ": expected"),
        (b'{"a": 1 "requests": []}', ", or } expected"),
        (b'{"a": tru, "requests": []}', "not valid JSON"),
        (b'{"a\xff": 1, "requests": []}', "not valid JSON"),
        (b"{requests: []}", "a key expected"),
        (b"{}", "requests: Field required"),
        (b'{"a": 1}', "requests: Field required"),
    ],
)
def test_what_is_wrong_is_said(body: bytes, text: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        read(body)
    assert text in caught.value.message


def test_deep_nesting_needs_no_stack() -> None:
    deep = b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    assert read(b'{"requests":[' + deep + b"]}", cuts=[50_000, 150_000])[0].raw == deep


@pytest.mark.parametrize("body", [b'{"requests":[{"a":"%b"}]}', b'{"a":"%b","requests":[]}', b'{"%b":1}'])
def test_a_value_that_grows_too_large_is_refused_before_it_is_all_here(body: bytes) -> None:
    reader = BatchBodyReader(max_request_bytes=1000)
    text = body % (b"x" * 1_000_000)
    chunks = [text[start : start + 500] for start in range(0, 70_000, 500)]
    with pytest.raises(RequestTooLargeError) as caught:
        list(map(reader.feed, chunks))
    assert caught.value.status == 413


@few
@given(st.dictionaries(st.sampled_from(["params", "b", "c"]), json_values, min_size=1))
def test_a_member_is_cut_out_as_it_is(fields: dict[str, Any]) -> None:
    body = orjson.dumps(fields, option=orjson.OPT_INDENT_2)
    for key, value in fields.items():
        assert orjson.loads(member(body, key)) == value
        assert member(body, key) in body
    with pytest.raises(KeyError):
        member(body, "absent")


def test_of_a_member_given_twice_the_last_one_counts() -> None:
    assert member(b'{"params": 1, "params": {"a":  2}}', "params") == b'{"a":  2}'
