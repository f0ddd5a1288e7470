"""Splicing changes one value and no other byte."""

import json
import sys
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.providers.fallbacks import drop_fallbacks, own_fallbacks
from actors.providers.splice import set_model, set_stream, without_items

SPACE = st.text(alphabet=" \t\r\n", max_size=3)
KEYS = st.sampled_from(["model", "stream", "messages", "", 'a"b', "é", "{", "max_tokens"]) | st.text(
    st.characters(exclude_categories=["Cs"]), max_size=4
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3)
)


@st.composite
def spelled(draw: st.DrawFn, value: Any) -> str:
    """JSON text of a value with odd white space and either way of writing text."""
    if isinstance(value, dict):
        members = [
            draw(SPACE) + draw(spelled(k)) + draw(SPACE) + ":" + draw(SPACE) + draw(spelled(v))
            for k, v in value.items()
        ]
        return "{" + ",".join(member + draw(SPACE) for member in members) + "}"
    if isinstance(value, list):
        return "[" + ",".join(draw(SPACE) + draw(spelled(v)) + draw(SPACE) for v in value) + "]"
    if isinstance(value, str) and value and draw(st.booleans()):
        units = value.encode("utf-16-be")
        return '"' + "".join(f"\\u{units[i : i + 2].hex()}" for i in range(0, len(units), 2)) + '"'
    return json.dumps(value, ensure_ascii=draw(st.booleans()))


@st.composite
def objects(draw: st.DrawFn) -> tuple[list[tuple[str, Any]], list[str]]:
    """Members of an object, doubles included, and the same spelled with the space around the value."""
    members = draw(st.lists(st.tuples(KEYS, VALUES), max_size=5))
    return members, [
        draw(SPACE) + draw(spelled(k)) + draw(SPACE) + ":" + draw(SPACE) + "%" + draw(SPACE)
        for k, _ in members
    ]


@given(st.data(), objects(), SPACE, SPACE)
def test_replaces_that_value_and_no_other_byte(
    data: st.DataObject, spelling: tuple[list[tuple[str, Any]], list[str]], before: str, after: str
) -> None:
    members, frames = spelling
    values = [data.draw(spelled(value)) for _, value in members]

    def text(values: list[str]) -> bytes:
        body = ",".join(_put(frame, value) for frame, value in zip(frames, values, strict=True))
        return (before + "{" + body + "}" + after).encode()

    expected = [
        '"new/é"'.encode().decode() if key == "model" and value != "new/é" else old
        for (key, value), old in zip(members, values, strict=True)
    ]
    result = set_model(text(values), "new/é")
    if any(key == "model" for key, _ in members):
        assert result == text(expected).replace('"new/é"'.encode(), b'"new/\\u00e9"')
    assert orjson.loads(result)["model"] == "new/é"
    everything = json.loads(result, object_pairs_hook=list)
    assert [pair for pair in everything if pair[0] != "model"] == [
        pair for pair in json.loads(text(values), object_pairs_hook=list) if pair[0] != "model"
    ]


def _put(frame: str, value: str) -> str:
    head, _, tail = frame.rpartition("%")
    return head + value + tail


def test_nested_members_of_that_name_stay() -> None:
    body = b'{"a":{"model":"x","stream":false},"b":[{"model":"y"}],"model":"z"}'
    assert set_model(body, "n") == b'{"a":{"model":"x","stream":false},"b":[{"model":"y"}],"model":"n"}'


def test_all_doubles_are_replaced() -> None:
    assert (
        set_model(b'{"model":"a","x":1,"mod\\u0065l":"b"}', "n") == b'{"model":"n","x":1,"mod\\u0065l":"n"}'
    )


def test_number_spellings_and_order_stay() -> None:
    body = b'{ "temperature" : 1.0e0,"top_p":0.50, "stream": false ,"max_tokens":10 }\n'
    assert set_stream(body, True) == body.replace(b"false", b"true")


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"{}", b'{"stream":true}'),
        (b" { } ", b' {"stream":true } '),
        (b'{"a":1\n}\n', b'{"a":1,"stream":true\n}\n'),
        (b'{"a":[]}', b'{"a":[],"stream":true}'),
    ],
)
def test_a_missing_member_is_added_at_the_end(body: bytes, expected: bytes) -> None:
    assert set_stream(body, True) == expected


@pytest.mark.parametrize("body", [b"{}", b'{"stream":false}', b'{"stream": null }', b'{"a":{"stream":true}}'])
def test_a_body_that_does_not_stream_is_returned_as_it_is(body: bytes) -> None:
    assert set_stream(body, False) is body


def test_a_right_model_is_returned_as_it_is() -> None:
    body = b'{"model":"cl\\u0061ude"}'
    assert set_model(body, "claude") is body


def test_deep_nesting_and_long_strings_exhaust_nothing() -> None:
    depth = sys.getrecursionlimit() * 50
    escapes = b'\\n\\"{[' * 300_000
    body = b'{"a":' + b"[" * depth + b"]" * depth + b',"s":"' + escapes + b'","model":"old"}'
    assert set_model(body, "new") == body.replace(b'"old"', b'"new"')


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"\xef\xbb\xbf{}", b'{"a"}', b'{"a":[1', b'{"a":["x', b'{"a":1']
)
def test_what_is_no_object_is_refused(body: bytes) -> None:
    with pytest.raises(ValueError, match="not a JSON object"):
        set_model(body, "m")


@pytest.mark.parametrize(
    ("body", "left"),
    [
        (b'{"a":1.0, "fallbacks": ["x", "y"], "b":2}', b'{"a":1.0, "b":2}'),
        (b'{ "a" : 1 , "fallbacks" : ["x"] }', b'{ "a" : 1 }'),
        (b'{"fallbacks":["x"]}', b"{}"),
        (
            b'{"fallbacks": ["x", {"model":"y"} , "default","z" ]}',
            b'{"fallbacks": [{"model":"y"} , "default" ]}',
        ),
        (
            b'{"fallbacks":[["x"],"x"],"m":{"fallbacks":["x"]}}',
            b'{"fallbacks":[["x"]],"m":{"fallbacks":["x"]}}',
        ),
        (b'{"fallb\\u0061cks":["x"],"m":1,"fallbacks":["y"]}', b'{"m":1}'),
    ],
)
def test_our_fallbacks_are_taken_out(body: bytes, left: bytes) -> None:
    assert drop_fallbacks(body) == left


@pytest.mark.parametrize(
    "body",
    [
        b'{"fallbacks": "default"}',
        b'{"fallbacks":[]}',
        b'{"fallbacks" :[ {"model": "m"} ]}',
        b'{"fallbacks":{"x":"y"}}',
        b'{"fallbacks":null}',
        b"{}",
    ],
)
def test_the_upstreams_fallbacks_stay(body: bytes) -> None:
    assert drop_fallbacks(body) is body
    assert own_fallbacks(orjson.loads(body)) == ()


@given(st.data())
def test_without_items_equals_doing_it_to_the_object(data: st.DataObject) -> None:
    key = "fallbacks"
    value = data.draw(st.dictionaries(KEYS, VALUES, max_size=3))
    items: list[Any] = data.draw(st.lists(st.text(max_size=2) | VALUES, max_size=4))
    value[key] = items
    body = data.draw(spelled(value)).encode()
    expected = dict(value)
    expected[key] = [item for item in items if not isinstance(item, str)]
    if items and not expected[key]:
        del expected[key]
    left = without_items(body, key, lambda item: isinstance(item, str))
    assert json.loads(left) == expected
    assert list(json.loads(left)) == list(expected)
