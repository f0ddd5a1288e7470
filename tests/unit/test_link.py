"""The parser of an upstream's answers: whole or byte by byte, the same; and what it does not take."""

from typing import Any, cast

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.errors import UpstreamConnectionError, UpstreamProtocolError
from actors.providers.link import Link
from actors.providers.transport import MAX_HEAD_BYTES
from actors.timers import Timers

CHUNKED = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
SIZED = b"HTTP/1.1 200 OK\r\nX-Y:  z \r\nContent-Length: 5\r\n\r\nhello"
INTERIM = b"HTTP/1.1 100 Continue\r\nx: y\r\n\r\n"


def a_link() -> Link:
    link = Link(cast(Any, None), cast(Any, None), Timers())
    link.begin()
    return link


def chunked(pieces: list[bytes]) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces if piece) + b"0\r\n\r\n"


def feed(link: Link, data: bytes, cuts: set[int]) -> bytes:
    at = 0
    for cut in [*sorted(cut for cut in cuts if 0 < cut < len(data)), len(data)]:
        link.feed(data[at:cut])
        at = cut
    return b"".join(link.pieces)


def by_h11(data: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
    connection = h11.Connection(h11.CLIENT)
    connection.send(h11.Request(method="GET", target="/", headers=[("host", "a")]))
    connection.send(h11.EndOfMessage())
    connection.receive_data(data)
    body, head = b"", None
    while type(event := connection.next_event()) is not h11.EndOfMessage:
        if type(event) is h11.Response:
            head = event
        elif type(event) is h11.Data:
            body += bytes(event.data)
        else:
            assert type(event) is h11.InformationalResponse
    assert head is not None
    return head.status_code, [(name.decode(), value.decode()) for name, value in head.headers], body


@given(
    st.lists(st.binary(max_size=300), max_size=8), st.sets(st.integers(0, 2000), max_size=12), st.booleans()
)
def test_cut_anywhere_an_answer_is_what_h11_says_it_is(
    pieces: list[bytes], cuts: set[int], interim: bool
) -> None:
    data = (INTERIM if interim else b"") + CHUNKED + chunked(pieces)
    link = a_link()
    body = feed(link, data, cuts)
    assert (link.status, link.fields, body) == by_h11(data)
    assert link.complete
    assert link.reusable


@given(st.sets(st.integers(0, 200), max_size=70))
def test_an_answer_of_known_length(cuts: set[int]) -> None:
    link = a_link()
    assert feed(link, SIZED, cuts) == b"hello"
    assert link.fields == [("x-y", "z"), ("content-length", "5")]
    assert link.complete
    assert link.reusable


def test_one_link_takes_one_answer_after_the_other() -> None:
    link = a_link()
    for body in ([b"a", b"b"], [b"c"]):
        link.begin()
        assert feed(link, CHUNKED + chunked(body), set()) == b"".join(body)
        assert link.complete
        assert link.reusable


def test_an_answer_without_a_length_ends_with_its_connection() -> None:
    link = a_link()
    link.feed(b"HTTP/1.1 200 OK\r\n\r\nabc")
    before = link.complete
    link.feed(b"")
    assert not before
    assert link.complete
    assert not link.reusable
    assert link.pieces == [b"abc"]


@pytest.mark.parametrize("more", [b"x", SIZED, b"HTTP/1.1 2"])
def test_what_follows_an_answer_unasked_keeps_its_link_from_being_used_again(more: bytes) -> None:
    link = a_link()
    assert feed(link, SIZED + more, {len(SIZED)})[:5] == b"hello"
    assert link.status == 200
    assert link.complete
    assert not link.reusable


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n",
    ],
)
def test_a_link_its_upstream_will_close_is_not_used_again(head: bytes) -> None:
    link = a_link()
    link.feed(head)
    assert link.complete
    assert not link.reusable


@pytest.mark.parametrize(
    "data",
    [
        b"SSH-2.0-OpenSSH\r\n",
        b"HTTP/1.1 abc OK\r\n\r\n",
        b"HTTP/1.1 200 OK\nContent-Length: 0\n\n",
        b"HTTP/1.1 200 OK\r\nA: b\x00c\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA: b\r\n c\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA: " + b"b" * MAX_HEAD_BYTES,
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
    ],
)
def test_what_is_not_an_answer(data: bytes) -> None:
    link = a_link()
    with pytest.raises(UpstreamProtocolError, match="not HTTP"):
        feed(link, data, set(range(0, len(data), 1000)))


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/2.0 200 OK\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n",
    ],
)
def test_framing_that_is_not_understood(head: bytes) -> None:
    link = a_link()
    link.feed(head)
    assert link.has_head
    with pytest.raises(UpstreamProtocolError, match="not HTTP"):
        link.check_framing()


@pytest.mark.parametrize(
    "body",
    [
        b"zz\r\nhi\r\n",
        b"ffffffffffffffffff\r\nhi\r\n",
        b"2\r\nhiX",
        b"2;" + b"e" * MAX_HEAD_BYTES + b"e" * 1000,
        b"0\r\nTrailer: " + b"t" * MAX_HEAD_BYTES + b"t" * 1000,
    ],
)
def test_a_body_that_breaks_off_or_never_goes_on(body: bytes) -> None:
    link = a_link()
    link.feed(CHUNKED)
    with pytest.raises(UpstreamProtocolError, match="middle of its answer"):
        feed(link, body, set(range(0, len(body), 1000)))


@pytest.mark.parametrize("data", [CHUNKED, CHUNKED + b"2\r\nhi\r\n", SIZED[:-1]])
def test_an_answer_cut_short(data: bytes) -> None:
    link = a_link()
    link.feed(data)
    with pytest.raises(UpstreamProtocolError, match="middle of its answer"):
        link.feed(b"")


def test_the_end_before_any_answer_and_in_its_head_are_told_apart() -> None:
    link = a_link()
    with pytest.raises(UpstreamConnectionError):
        link.feed(b"")
    link = a_link()
    link.feed(SIZED[:10])
    with pytest.raises(UpstreamProtocolError, match="not HTTP"):
        link.feed(b"")
