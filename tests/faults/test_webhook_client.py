"""One call of an endpoint that fails in every way, on real sockets."""

import ssl
from collections.abc import Sequence
from ipaddress import ip_address

import pytest
import trio
import trustme
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from actors.webhooks.addresses import Address, Resolve
from actors.webhooks.client import (
    MAX_BODY_BYTES,
    READ_BYTES,
    Answered,
    EndpointClient,
    NotCalled,
    NotReached,
    Outcome,
    retry_after_s,
)
from tests.fake_upstream import Exchange, FakeUpstream, Script, open_upstream

HEADERS = (("webhook-id", "whd_1"), ("webhook-signature", "v1,abc v1,def"))
OK = b"HTTP/1.1 204 No Content\r\n\r\n"
TIMEOUT_S = 10.0


def client_for(url: str, tls: ssl.SSLContext | None = None, resolve: Resolve | None = None) -> EndpointClient:
    if resolve is None:
        return EndpointClient(url, allow_private=True, timeout_s=TIMEOUT_S, tls=tls)
    return EndpointClient(url, allow_private=True, timeout_s=TIMEOUT_S, tls=tls, resolve=resolve)


def resolving_to(*texts: str) -> Resolve:
    async def resolve(host: str, port: int) -> list[Address]:
        return [ip_address(text) for text in texts]

    return resolve


async def post(upstream: FakeUpstream, path: str = "/hook?x=1") -> Outcome:
    return await client_for(upstream.url + path).post(HEADERS, '{"a":1}')


def sends(*pieces: bytes, then_stalls: bool = False) -> Script:
    async def script(exchange: Exchange) -> None:
        for piece in pieces:
            await exchange.send(piece)
        if then_stalls:
            await exchange.stall()

    return script


async def test_what_is_sent() -> None:
    async with open_upstream(sends(OK)) as upstream:
        assert await post(upstream) == Answered(204)
    (request,) = upstream.requests
    assert (request.method, request.path, request.body) == ("POST", "/hook?x=1", b'{"a":1}')
    assert dict(request.headers) == {
        "host": upstream.url.removeprefix("http://"),
        "content-type": "application/json",
        "content-length": "7",
        "user-agent": "messagesd",
        "connection": "close",
        **dict(HEADERS),
    }


async def test_each_call_has_a_connection_of_its_own() -> None:
    async def keeps(exchange: Exchange) -> None:
        await exchange.send(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
        exchange.keep_alive()

    async with open_upstream(keeps) as upstream:
        client = client_for(upstream.url)
        assert [await client.post(HEADERS, "{}") for _ in range(3)] == [Answered(200)] * 3
        await upstream.wait_open(0)
    assert upstream.connections == 3


@pytest.mark.parametrize("status", [200, 301, 302, 307, 400, 408, 410, 429, 500, 503, 599])
async def test_an_answer_is_an_answer_and_no_redirect_is_followed(status: int) -> None:
    head = f"HTTP/1.1 {status} X\r\nlocation: http://127.0.0.1:1/\r\ncontent-length: 0\r\n\r\n".encode()
    async with open_upstream(sends(head)) as upstream:
        assert await post(upstream) == Answered(status)
    assert upstream.connections == 1


async def test_retry_after_is_taken_along() -> None:
    async with open_upstream(
        sends(b"HTTP/1.1 429 X\r\nRetry-After: 7\r\ncontent-length: 0\r\n\r\n")
    ) as upstream:
        assert await post(upstream) == Answered(429, "7")


async def hangs_up(exchange: Exchange) -> None:
    return


@pytest.mark.parametrize(
    "script",
    [
        hangs_up,
        sends(b"HTTP/1.1 200"),
        sends(b"nonsense\r\n\r\n"),
        sends(b"HTTP/1.1 20 X\r\n\r\n"),
        sends(b"HTTP/1.1 101 X\r\n\r\n"),
        sends(b"HTTP/1.1 200 OK\r\nx: " + b"y" * 200_000 + b"\r\n\r\n"),
        sends(b"\x15\x03\x01\x00\x02\x02\x0a"),
    ],
    ids=[
        "hangs up",
        "in the head",
        "nonsense",
        "no status",
        "an upgrade",
        "a head without end",
        "speaks TLS",
    ],
)
async def test_no_answer_is_told_without_an_address(script: Script) -> None:
    async with open_upstream(script) as upstream:
        outcome = await post(upstream)
    assert isinstance(outcome, NotReached)
    assert "127.0.0.1" not in outcome.reason


async def test_nobody_listens() -> None:
    async with open_upstream(sends(OK)) as upstream:
        pass
    assert await post(upstream) == NotReached("no connection")


async def test_the_name_cannot_be_resolved() -> None:
    async def resolve(host: str, port: int) -> list[Address]:
        raise OSError("no such name")

    assert await client_for("http://hooks.test/", resolve=resolve).post(HEADERS, "{}") == NotReached(
        "its name cannot be resolved"
    )
    # No name that DNS can hold.
    assert await client_for(f"http://{'x' * 64}.test/").post(HEADERS, "{}") == NotReached(
        "its name cannot be resolved"
    )


async def test_a_stall_ends_with_the_try(autojump_clock: MockClock) -> None:
    autojump_clock.autojump_threshold = 0.02
    for script in (sends(then_stalls=True), sends(b"HTTP/1.1 200 OK\r\nx", then_stalls=True)):
        async with open_upstream(script) as upstream:
            started = trio.current_time()
            assert await post(upstream) == NotReached("no answer within 10 s")
            assert trio.current_time() - started == pytest.approx(TIMEOUT_S, abs=0.01)
            await upstream.gone.wait()


async def test_a_handshake_that_does_not_come_ends_with_the_try(autojump_clock: MockClock) -> None:
    autojump_clock.autojump_threshold = 0.02
    async with open_upstream(sends(OK), greets=False) as upstream:
        client = client_for(upstream.url, tls=ssl.create_default_context())
        assert await client.post(HEADERS, "{}") == NotReached("no answer within 10 s")
        await upstream.gone.wait()


async def test_no_more_than_a_kilobyte_of_an_answer_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    receive_some = trio.SocketStream.receive_some

    async def counting(stream: trio.SocketStream, max_bytes: int | None = None) -> bytes | bytearray:
        data = await receive_some(stream, max_bytes)
        if max_bytes == READ_BYTES:
            # The client's side of the connection: the other one asks for more at once.
            read.append(len(data))
        return data

    monkeypatch.setattr(trio.SocketStream, "receive_some", counting)
    head = b"HTTP/1.1 200 OK\r\ncontent-length: 1000000000\r\n\r\n"

    async def pours(exchange: Exchange) -> None:
        await exchange.send(head)
        while True:
            await exchange.send(b"x" * 65_536)

    async with open_upstream(pours) as upstream:
        with trio.fail_after(5):
            assert await post(upstream) == Answered(200)
            await upstream.gone.wait()
    assert 0 < sum(read) - len(head) <= MAX_BODY_BYTES


async def test_a_body_that_drips_changes_nothing(autojump_clock: MockClock) -> None:
    autojump_clock.autojump_threshold = 0.02

    async def drips(exchange: Exchange) -> None:
        await exchange.send(b"HTTP/1.1 200 OK\r\ncontent-length: 900\r\n\r\n")
        while True:
            await trio.sleep(0.4)
            await exchange.send(b"x")

    async with open_upstream(drips) as upstream:
        started = trio.current_time()
        assert await post(upstream) == Answered(200)
        assert trio.current_time() - started == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize(
    "cut",
    [
        b"HTTP/1.1 200 OK\r\ncontent-length: 900\r\n\r\nhalf",
        b"HTTP/1.1 503 X\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    ],
)
async def test_an_answer_that_breaks_off_after_its_head_counts(cut: bytes) -> None:
    async with open_upstream(sends(cut)) as upstream:
        outcome = await post(upstream)
    assert outcome == Answered(int(cut.split()[1]))


async def test_cancelling_hangs_up() -> None:
    async with open_upstream(sends(then_stalls=True)) as upstream, trio.open_nursery() as nursery:
        nursery.start_soon(post, upstream)
        await upstream.asked.wait()
        nursery.cancel_scope.cancel()
    assert upstream.connections == 1


# --- names ------------------------------------------------------------------------------------------


async def test_a_private_address_is_not_called() -> None:
    async with open_upstream(sends(OK)) as upstream:
        client = EndpointClient(upstream.url, allow_private=False, timeout_s=TIMEOUT_S)
        assert await client.post(HEADERS, "{}") == NotCalled(
            "its name resolves to an address that is not public"
        )
    assert upstream.connections == 0


async def test_the_address_that_was_checked_is_the_one_called() -> None:
    """DNS rebinding: the name is asked once a try; what it would say next is never heard."""
    answers = ["127.0.0.1"]
    asked: list[tuple[str, int]] = []

    async def rebinds(host: str, port: int) -> list[Address]:
        asked.append((host, port))
        return [ip_address(answers.pop(0))]

    async with open_upstream(sends(OK)) as upstream:
        port = int(upstream.url.rpartition(":")[2])
        client = client_for(f"http://hooks.test:{port}/", resolve=rebinds)
        assert await client.post(HEADERS, "{}") == Answered(204)
        assert asked == [("hooks.test", port)]
        assert upstream.requests[0].headers["host"] == f"hooks.test:{port}"

        # The next try asks anew, and checks anew.
        answers.append("10.0.0.1")
        strict = EndpointClient(
            f"http://hooks.test:{port}/", allow_private=False, timeout_s=TIMEOUT_S, resolve=rebinds
        )
        assert isinstance(await strict.post(HEADERS, "{}"), NotCalled)
    assert upstream.connections == 1


async def test_the_next_address_is_tried() -> None:
    async with open_upstream(sends(OK)) as upstream:
        url = upstream.url.replace("127.0.0.1", "hooks.test")
        # Nobody listens at the first two: one refuses, one has no route.
        client = client_for(url, resolve=resolving_to("127.0.0.9", "::1", "127.0.0.1"))
        assert await client.post(HEADERS, "{}") == Answered(204)


def certificates(*names: str) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """The contexts of a server with these names, and of a client that trusts it."""
    authority = trustme.CA()
    server, client = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH), ssl.create_default_context()
    authority.issue_cert(*names).configure_cert(server)
    authority.configure_trust(client)
    return server, client


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["hooks.test"], Answered(204)),
        (["other.test", "127.0.0.1"], NotReached("its certificate cannot be verified")),
    ],
)
async def test_tls_is_with_the_name_not_with_the_address(names: Sequence[str], expected: Outcome) -> None:
    server, trusting = certificates(*names)
    said: list[str | None] = []
    server.sni_callback = lambda _socket, name, _context: said.append(name)
    async with open_upstream(sends(OK), tls=server) as upstream:
        url = upstream.url.replace("127.0.0.1", "hooks.test")
        client = client_for(url, tls=trusting, resolve=resolving_to("127.0.0.1"))
        assert await client.post(HEADERS, "{}") == expected
    assert said == ["hooks.test"]


async def test_a_certificate_of_an_unknown_authority_is_refused() -> None:
    server, _ = certificates("hooks.test")
    async with open_upstream(sends(OK), tls=server) as upstream:
        url = upstream.url.replace("127.0.0.1", "hooks.test")
        client = client_for(url, tls=ssl.create_default_context(), resolve=resolving_to("127.0.0.1"))
        assert await client.post(HEADERS, "{}") == NotReached("its certificate cannot be verified")
    assert upstream.requests == []


# --- Retry-After ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, 0.0),
        ("7", 7.0),
        (" 120 ", 120.0),
        ("-1", 0.0),
        ("1.5", 0.0),
        ("9" * 10, 0.0),
        ("soon", 0.0),
        ("Mon, 0 Jan 10000000000 0:0:0 GMT", 0.0),
        ("Thu, 01 Jan 1970 00:17:10 GMT", 30.0),
        ("Thu, 01 Jan 1970 00:17:10 -0000", 30.0),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0),
    ],
)
def test_retry_after_is_seconds_or_a_date(value: str | None, seconds: float) -> None:
    assert retry_after_s(value, now=1_000.0) == seconds


@given(st.text() | st.from_regex(r"[A-Z][a-z]{2}, [0-9]{1,3} Jan [0-9]{1,12} [0-9:]{1,9} [+-]?[A-Z0-9]{1,6}"))
def test_whatever_it_says_it_is_a_time_to_come(value: str) -> None:
    assert retry_after_s(value, now=1_000.0) >= 0.0
