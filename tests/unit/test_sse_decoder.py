from collections.abc import Iterable
from itertools import pairwise

import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from actors.errors import UpstreamProtocolError
from actors.providers.base import Frame
from actors.providers.sse_decoder import SSEDecoder, encode_frame
from tests.unit.strategies import json_values, texts, unhurried

LARGE = 1 << 20
PING = b'event: ping\ndata: {"type":"ping"}\n\n'


def decode(chunks: Iterable[bytes], max_frame_bytes: int = LARGE) -> tuple[list[Frame], bool]:
    """The frames, and whether the decoder refused to go on."""
    decoder = SSEDecoder(max_frame_bytes)
    frames: list[Frame] = []
    try:
        for chunk in chunks:
            frames += decoder.feed(chunk)
        decoder.close()
    except UpstreamProtocolError:
        return frames, True
    return frames, False


def decode_all(data: bytes) -> list[Frame]:
    frames, refused = decode([data])
    assert not refused
    return frames


def reference(data: bytes) -> list[tuple[bytes, bytes]]:
    """The standard's steps, taken literally: (event type buffer, data) of every dispatched event."""
    lines: list[bytes] = []
    line, position = b"", 3 if data.startswith(b"\xef\xbb\xbf") else 0
    while position < len(data):
        byte = data[position : position + 1]
        position += 1
        if byte not in (b"\r", b"\n"):
            line += byte
            continue
        if byte == b"\r" and data[position : position + 1] == b"\n":
            position += 1
        lines.append(line)
        line = b""
    events, event, buffer = [], b"", b""
    for line in lines:
        if line == b"":
            if buffer != b"":
                events.append((event, buffer[:-1]))
            event = buffer = b""
        elif b":" in line:
            field, value = line[: line.index(b":")], line[line.index(b":") + 1 :]
            value = value[1:] if value[:1] == b" " else value
            if field == b"event":
                event = value
            elif field == b"data":
                buffer += value + b"\n"
        elif line == b"data":
            buffer += b"\n"
        elif line == b"event":
            event = b""
    return events


def expected(event: bytes, data: bytes) -> tuple[str, bytes]:
    """What our protocol makes of a dispatched event."""
    try:
        parsed = orjson.loads(data)
    except orjson.JSONDecodeError:
        return event.decode("utf-8", "replace") or "message", data
    named = parsed.get("type") if isinstance(parsed, dict) else None
    usable = isinstance(named, str) and named and not set(named) & {"\r", "\n"}
    name = event.decode("utf-8", "replace") or (named if usable else "message")
    return str(name), data.replace(b"\n", b" ")


def cut(data: bytes, places: Iterable[int]) -> list[bytes]:
    at = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[a:b] for a, b in pairwise(at)]


json_data = json_values.map(orjson.dumps) | st.dictionaries(
    st.just("type") | texts, json_values, max_size=2
).map(lambda value: orjson.dumps(value, option=orjson.OPT_INDENT_2))
one_line = st.binary(max_size=6).map(lambda raw: raw.replace(b"\r", b"").replace(b"\n", b""))
names = st.sampled_from([b"ping", b"", b" x", "é".encode(), b"\xff"])
lines = st.one_of(
    st.builds(lambda value: b"data: " + value, one_line),
    st.builds(lambda value: b"data:" + value, one_line),
    st.builds(lambda value: b"event: " + value, names),
    st.sampled_from([b"", b"", b": note", b"id: 7", b"retry: 10", b"data", b"event", b"other: 1", b"dat"]),
    one_line,
)
canonical = st.builds(
    lambda name, data: b"event: " + name + b"\ndata: " + data + b"\n\n", names, json_values.map(orjson.dumps)
)
pretty = json_data.map(lambda data: b"".join(b"data: %b\n" % part for part in data.split(b"\n")) + b"\n")
ends = st.sampled_from([b"\n", b"\r\n", b"\r"])
mixed_lines = st.lists(st.tuples(lines, ends), max_size=12).map(
    lambda drawn: b"".join(line + end for line, end in drawn)
)
streams = st.builds(
    lambda bom, parts, tail: bom + b"".join(parts) + tail,
    st.sampled_from([b"", b"", b"\xef\xbb\xbf", b"\xef\xbb"]),
    st.lists(
        canonical | mixed_lines | st.builds(lambda b, end: b.replace(b"\n", end), canonical | pretty, ends),
        max_size=5,
    ),
    one_line,
)
places = st.lists(st.integers(min_value=0, max_value=1 << 16), max_size=10)


@unhurried
@given(streams, places)
@example(b"data: 1\r\n\r\ndata: 2\r\n\r\n", [8, 10])
def test_any_split_gives_the_same_frames(stream: bytes, where: list[int]) -> None:
    whole = decode([stream])
    assert decode(cut(stream, where)) == whole
    assert decode(stream[i : i + 1] for i in range(len(stream))) == whole


@unhurried
@given(streams, places, st.integers(min_value=1, max_value=40))
@example(b"x\r\n", [2], 1)
def test_any_split_meets_the_bound_at_the_same_frame(stream: bytes, where: list[int], bound: int) -> None:
    whole = decode([stream], bound)
    assert decode(cut(stream, where), bound) == whole
    assert decode((stream[i : i + 1] for i in range(len(stream))), bound) == whole


@unhurried
@given(streams)
def test_agrees_with_the_standard(stream: bytes) -> None:
    frames = [(frame.event, frame.data) for frame in decode_all(stream)]
    wanted = [expected(event, data) for event, data in reference(stream)]
    assert [name for name, _ in frames] == [name for name, _ in wanted]
    for (_, data), (_, want) in zip(frames, wanted, strict=True):
        assert data == want


@unhurried
@given(streams)
def test_the_wire_decodes_to_the_frame(stream: bytes) -> None:
    frames = decode_all(stream)
    assert decode_all(b"".join(frame.wire for frame in frames)) == frames


@unhurried
@given(texts.filter(lambda name: not set(name) & {"\r", "\n"} and name != ""), json_data)
def test_encoded_frames_decode(event: str, data: bytes) -> None:
    (frame,) = decode_all(encode_frame(event, data))
    assert frame.event == event
    assert orjson.loads(frame.data) == orjson.loads(data)


def test_a_canonical_frame_keeps_its_bytes() -> None:
    wire = b'event: content_block_delta\ndata: { "type" :"content_block_delta","index":0}\n\n'
    assert decode_all(wire) == [
        Frame("content_block_delta", b'{ "type" :"content_block_delta","index":0}', wire)
    ]


@pytest.mark.parametrize(
    ("stream", "event", "data"),
    [
        (b'data: {"type":"ping"}\n\n', "ping", b'{"type":"ping"}'),
        (b'data:{"type":"ping"}\n\n', "ping", b'{"type":"ping"}'),
        (b'data: {\ndata:  "type": "ping"}\n\n', "ping", b'{  "type": "ping"}'),
        (b"data: [DONE]\n\n", "message", b"[DONE]"),
        (b'data: {"type":7}\n\n', "message", b'{"type":7}'),
        (b'data: {"type":"a\\nevent: b"}\n\n', "message", b'{"type":"a\\nevent: b"}'),
        (b'data: {"type":"ping"}\nevent: pong\n\n', "pong", b'{"type":"ping"}'),
        (b"event: a\nevent: b\ndata: 1\n\n", "b", b"1"),
        (b"event: x\ndata: a\ndata: b\n\n", "x", b"a\nb"),
        (b": hello\r\nid: 1\r\nevent: x\r\ndata: 1\r\n\r\n", "x", b"1"),
        (b"event: x\rdata: 1\r\r", "x", b"1"),
        (b"\xef\xbb\xbfevent: x\ndata: 1\n\n", "x", b"1"),
        (b"\n\n\nevent: x\ndata: 1\n\n", "x", b"1"),
    ],
)
def test_one_frame(stream: bytes, event: str, data: bytes) -> None:
    (frame,) = decode_all(stream)
    assert (frame.event, frame.data) == (event, data)
    assert frame.wire == encode_frame(event, data)


def test_a_frame_without_data_is_not_dispatched() -> None:
    assert decode_all(b"event: ping\n\n: comment\n\nid: 3\n\n" + PING)[0].wire == PING


def test_a_cr_ends_the_frame_at_once() -> None:
    decoder = SSEDecoder(LARGE)
    assert [frame.data for frame in decoder.feed(b"data: 1\r\n\r")] == [b"1"]
    assert decoder.feed(b"\n") == []
    assert not decoder.pending


@pytest.mark.parametrize(
    ("stream", "pending"),
    [
        (b"", False),
        (PING, False),
        (PING + b": bye\n", False),
        (PING + b"event: ping\n", False),
        (PING + b"event: ping\ndata: {}", True),
        (PING + b"data: {}\n", True),
    ],
)
def test_an_unfinished_frame_is_discarded_and_told(stream: bytes, pending: bool) -> None:
    decoder = SSEDecoder(LARGE)
    decoder.feed(stream)
    decoder.close()
    assert decoder.pending is pending
    with pytest.raises(ValueError, match="closed"):
        decoder.feed(b"\n\n")


def test_the_bound_is_exact() -> None:
    size = len(PING) - 2
    assert [frame.wire for frame in decode([PING, PING], size)[0]] == [PING, PING]
    assert decode([PING, PING], size - 1) == ([], True)
    crlf = PING.replace(b"\n", b"\r\n")
    assert decode([crlf, crlf], size)[1] is False


def test_frames_before_one_too_large_are_returned_first() -> None:
    decoder = SSEDecoder(len(PING))
    assert len(decoder.feed(PING + b"data: " + b"x" * 100)) == 1
    with pytest.raises(UpstreamProtocolError, match="more than"):
        decoder.feed(PING)
    with pytest.raises(UpstreamProtocolError):
        decoder.close()


def test_what_is_over_the_bound_is_not_held() -> None:
    decoder = SSEDecoder(100)
    decoder.feed(b"data: " + b"x" * 90)
    with pytest.raises(UpstreamProtocolError):
        decoder.feed(b"x" * 10_000)
    assert len(decoder._held) == 0


@pytest.mark.timeout(30)
def test_single_bytes_take_linear_time() -> None:
    # Searching the held frame anew for each of its bytes would take minutes.
    size = 1 << 20
    decoder = SSEDecoder(2 * size)
    decoder.feed(b"event: x\ndata: ")
    for _ in range(size):
        decoder.feed(b"y")
    decoder.feed(b"\n")
    (frame,) = decoder.feed(b"\n")
    assert len(frame.data) == size


def test_an_event_name_cannot_smuggle_lines() -> None:
    with pytest.raises(ValueError, match="one line"):
        encode_frame("ping\ndata: {}", b"{}")


def test_the_bound_is_positive() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        SSEDecoder(0)
