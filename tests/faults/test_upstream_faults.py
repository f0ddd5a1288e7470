"""Upstreams that misbehave: the right error, in time, and nothing left open.

The sockets are real and on loopback; the clock is a mock that jumps only after a little real silence, so
that bytes under way arrive first.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import orjson
import pytest
import trio
import trio.testing
from trio.testing import MockClock

from actors.errors import (
    ProviderError,
    UnsupportedError,
    UpstreamConnectionError,
    UpstreamProtocolError,
    UpstreamStatusError,
    UpstreamTimeoutError,
)
from actors.providers.anthropic import AnthropicProvider
from actors.providers.base import ForwardCall, Frame, ProviderCall
from actors.providers.options import AnthropicOptions
from tests.fake_upstream import (
    LAST_CHUNK,
    STREAM_HEAD,
    Exchange,
    FakeUpstream,
    Script,
    answer,
    frame,
    message,
    message_frames,
    open_upstream,
)

KEY = "sk-upstream-secret"
CLOSE_BOUND_S = 0.5
FIELDS = {"model": "m", "max_tokens": 5, "messages": [{"role": "user", "content": "hi"}]}
CALL = ProviderCall(body=orjson.dumps(FIELDS), fields=FIELDS, model="m")


@pytest.fixture
def clock() -> MockClock:
    return MockClock(autojump_threshold=0.05)


@asynccontextmanager
async def provider_for(
    script: Script, **options: Any
) -> AsyncIterator[tuple[AnthropicProvider, FakeUpstream]]:
    """A provider and the upstream it calls. On leaving, no connection but idle ones may be open."""
    greets = options.pop("greets", True)
    async with open_upstream(script, greets=greets) as upstream:
        provider = AnthropicProvider(
            AnthropicOptions(name="p", base_url=upstream.url, api_key=KEY, **options), trust_env=False
        )
        try:
            yield provider, upstream
        finally:
            await provider.aclose()
        with trio.fail_after(20):
            await upstream.wait_open(0)


async def drain(provider: AnthropicProvider) -> list[Frame]:
    frames: list[Frame] = []
    async with provider.open_stream(CALL) as source:
        while batch := await source.receive():
            frames += batch
    return frames


async def plain(provider: AnthropicProvider) -> Any:
    return await provider.complete(CALL)


Ask = Callable[[AnthropicProvider], Awaitable[Any]]
BOTH = pytest.mark.parametrize("ask", [plain, drain])


def shows_nothing(error: ProviderError, upstream: FakeUpstream) -> None:
    text = error.message + repr(error.headers)
    assert KEY not in text
    assert "127.0.0.1" not in text
    assert upstream.url.rpartition(":")[2] not in text


def sends(*pieces: bytes) -> Script:
    async def script(exchange: Exchange) -> None:
        for piece in pieces:
            await exchange.send(piece)

    return script


def stalls_after(*pieces: bytes) -> Script:
    async def script(exchange: Exchange) -> None:
        for piece in pieces:
            await exchange.send(piece)
        await exchange.stall()

    return script


async def never(exchange: Exchange) -> None:
    raise AssertionError("no request was expected")


# --- no answer -------------------------------------------------------------------------------------


@BOTH
async def test_hangs_up_before_the_status(ask: Ask) -> None:
    async with provider_for(sends()) as (provider, upstream):
        with pytest.raises(UpstreamConnectionError) as caught:
            await ask(provider)
        assert caught.value.status == 502
        assert len(upstream.requests) == 1
        shows_nothing(caught.value, upstream)


@BOTH
async def test_nobody_listens(ask: Ask) -> None:
    async with provider_for(never) as (provider, upstream):
        pass
    provider = AnthropicProvider(AnthropicOptions(name="p", base_url=upstream.url), trust_env=False)
    with pytest.raises(UpstreamConnectionError) as caught:
        await ask(provider)
    shows_nothing(caught.value, upstream)
    await provider.aclose()


@BOTH
@pytest.mark.parametrize(
    "garbage", [b"SSH-2.0-OpenSSH_9.6\r\n\r\n", b"\x00\xff" * 500, b"HTTP/1.1 abc\r\n\r\n", b"a" * 200_000]
)
async def test_garbage_for_a_status_line(ask: Ask, garbage: bytes) -> None:
    async with provider_for(sends(garbage)) as (provider, upstream):
        with pytest.raises(UpstreamProtocolError) as caught:
            await ask(provider)
        assert caught.value.status == 502
        shows_nothing(caught.value, upstream)


async def test_a_head_without_end_is_refused() -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.send(b"HTTP/1.1 200 OK\r\n")
        while True:
            await exchange.send(b"x-pad: " + b"y" * 1000 + b"\r\n")

    async with provider_for(script) as (provider, _):
        with pytest.raises(UpstreamProtocolError):
            await plain(provider)


@BOTH
async def test_silence_before_the_status(ask: Ask, clock: MockClock) -> None:
    async with provider_for(stalls_after(), first_byte_timeout_s=40) as (provider, upstream):
        start = trio.current_time()
        with pytest.raises(UpstreamTimeoutError, match="first byte timeout") as caught:
            await ask(provider)
        assert trio.current_time() - start == pytest.approx(40, abs=1)
        assert (caught.value.status, caught.value.error_type) == (504, "timeout_error")
        await upstream.gone.wait()


@BOTH
async def test_half_a_head_is_silence_too(ask: Ask, clock: MockClock) -> None:
    async with provider_for(stalls_after(b"HTTP/1.1 20"), first_byte_timeout_s=40) as (provider, upstream):
        with pytest.raises(UpstreamTimeoutError, match="first byte timeout"):
            await ask(provider)
        await upstream.gone.wait()


@BOTH
async def test_a_handshake_that_does_not_come(ask: Ask, clock: MockClock) -> None:
    async with provider_for(never, greets=False, connect_timeout_s=7) as (provider, upstream):
        start = trio.current_time()
        with pytest.raises(UpstreamTimeoutError, match="connect timeout"):
            await ask(provider)
        assert trio.current_time() - start == pytest.approx(7, abs=1)
        await upstream.gone.wait()


async def test_an_upstream_that_does_not_read(clock: MockClock) -> None:
    async def script(exchange: Exchange) -> None:
        raise AssertionError("the body never arrives whole")

    big = orjson.dumps(FIELDS | {"pad": "x" * 50_000_000})
    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = listeners[0].socket.getsockname()[1]
        provider = AnthropicProvider(
            AnthropicOptions(name="p", base_url=f"http://127.0.0.1:{port}", idle_timeout_s=9),
            trust_env=False,
        )
        nursery.start_soon(trio.serve_listeners, _ignore, listeners)
        with pytest.raises(UpstreamTimeoutError, match="took no data"):
            await provider.complete(ProviderCall(body=big, fields=FIELDS, model="m"))
        await provider.aclose()
        nursery.cancel_scope.cancel()


async def _ignore(stream: trio.SocketStream) -> None:
    async with stream:
        await trio.sleep_forever()


async def test_no_free_connection(clock: MockClock) -> None:
    options = {"max_connections": 1, "connect_timeout_s": 3}
    async with (
        provider_for(stalls_after(), **options) as (provider, upstream),
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(plain, provider)
        await upstream.asked.wait()
        with pytest.raises(UpstreamTimeoutError, match="connect timeout"):
            await plain(provider)
        nursery.cancel_scope.cancel()


# --- an answer that breaks off ---------------------------------------------------------------------

HEAD_OF_BODY = (
    b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 500\r\n\r\n" + b'{"type"'
)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


START = STREAM_HEAD + chunk(message_frames("one two")[0])


@pytest.mark.parametrize(("ask", "sent"), [(plain, HEAD_OF_BODY), (drain, START)])
async def test_hangs_up_in_the_middle(ask: Ask, sent: bytes) -> None:
    async with provider_for(sends(sent)) as (provider, upstream):
        with pytest.raises(UpstreamProtocolError, match="broke off") as caught:
            await ask(provider)
        assert len(upstream.requests) == 1
        shows_nothing(caught.value, upstream)


@pytest.mark.parametrize(("ask", "sent"), [(plain, HEAD_OF_BODY), (drain, START)])
async def test_silence_in_the_middle(ask: Ask, sent: bytes, clock: MockClock) -> None:
    async with provider_for(stalls_after(sent), idle_timeout_s=20) as (provider, upstream):
        start = trio.current_time()
        with pytest.raises(UpstreamTimeoutError, match="idle timeout"):
            await ask(provider)
        assert trio.current_time() - start == pytest.approx(20, abs=1)
        await upstream.gone.wait()


async def test_an_answer_that_never_ends(clock: MockClock) -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.send(START)
        while True:
            await exchange.send_chunk(frame("ping"))
            await trio.sleep(10)

    options = {"idle_timeout_s": 20, "total_timeout_s": 100}
    async with provider_for(script, **options) as (provider, _):
        start = trio.current_time()
        with pytest.raises(UpstreamTimeoutError, match="total timeout"):
            await drain(provider)
        assert trio.current_time() - start == pytest.approx(100, abs=1)


async def test_garbage_between_chunks() -> None:
    async with provider_for(sends(START, b"not a chunk length\r\n")) as (provider, _):
        with pytest.raises(UpstreamProtocolError):
            await drain(provider)


async def test_frames_before_the_break_are_delivered() -> None:
    async with provider_for(sends(START)) as (provider, _), provider.open_stream(CALL) as source:
        assert [f.event for f in await source.receive()] == ["message_start"]
        with pytest.raises(UpstreamProtocolError):
            await source.receive()


async def test_an_end_without_message_stop_is_an_end() -> None:
    async with provider_for(sends(START, LAST_CHUNK)) as (provider, _):
        assert [f.event for f in await drain(provider)] == ["message_start"]


async def test_an_error_frame_is_passed_without_secrets() -> None:
    async with provider_for(_error_frame) as (provider, upstream):
        frames = await drain(provider)
        assert frames[-1].event == "error"
        for text in (frames[-1].data, frames[-1].wire):
            assert KEY.encode() not in text
            assert upstream.url.encode() not in text
        error = orjson.loads(frames[-1].data)["error"]
        assert error["type"] == "overloaded_error"
        assert error["message"].startswith("Overloaded at ")


async def _error_frame(exchange: Exchange) -> None:
    url = f"http://{exchange.request.headers['host']}"
    await exchange.send(START)
    text = f"Overloaded at {url} with {KEY}"
    await exchange.send_chunk(frame("error", error={"type": "overloaded_error", "message": text}))
    await exchange.send(LAST_CHUNK)


# --- too much --------------------------------------------------------------------------------------


@BOTH
async def test_an_answer_announced_too_large(ask: Ask) -> None:
    async with provider_for(sends(answer(200, b"{}" * 600)), max_response_bytes=1000) as (provider, _):
        with pytest.raises(UpstreamProtocolError, match="larger than 1000 bytes"):
            await ask(provider)


async def test_an_answer_that_grows_too_large() -> None:
    head = STREAM_HEAD.replace(b"text/event-stream; charset=utf-8", b"application/json")
    async with provider_for(sends(head, *[chunk(b" " * 600)] * 2), max_response_bytes=1000) as (provider, _):
        with pytest.raises(UpstreamProtocolError, match="larger than 1000 bytes"):
            await plain(provider)


async def test_a_frame_without_end() -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.send(STREAM_HEAD)
        while True:
            await exchange.send_chunk(b"data: " + b"x" * 10_000)

    async with provider_for(script, max_frame_bytes=50_000) as (provider, upstream):
        with pytest.raises(UpstreamProtocolError, match="50000 bytes"):
            await drain(provider)
        with trio.fail_after(CLOSE_BOUND_S):
            await upstream.gone.wait()


async def test_a_compressed_answer_is_refused() -> None:
    body = answer(200, b"\x1f\x8b", "application/json", "content-encoding: gzip")
    async with provider_for(sends(body)) as (provider, upstream):
        with pytest.raises(UpstreamProtocolError, match="compressed"):
            await plain(provider)
        assert upstream.requests[0].headers["accept-encoding"] == "identity"


# --- something else --------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize(
    "other",
    [
        answer(200, b"<html>hello</html>", "text/html"),
        answer(200, b"<html>hello</html>"),
        answer(200, b"[1]"),
        answer(200, b'{"type":"completion"}'),
        answer(200, b""),
        answer(204, b""),
        answer(301, b"", "text/html", "location: http://127.0.0.1:1/elsewhere"),
        answer(307, b"{}", "application/json", "location: /v1/other"),
    ],
)
async def test_not_what_was_asked_for(ask: Ask, other: bytes) -> None:
    async with provider_for(sends(other)) as (provider, upstream):
        with pytest.raises(UpstreamProtocolError) as caught:
            await ask(provider)
        assert caught.value.status == 502
        assert len(upstream.requests) == 1
        shows_nothing(caught.value, upstream)


async def test_a_message_for_a_stream() -> None:
    async with provider_for(sends(answer(200, orjson.dumps(message("hi"))))) as (provider, _):
        with pytest.raises(UpstreamProtocolError, match="event stream"):
            await drain(provider)


async def test_an_error_envelope_with_status_200() -> None:
    body = orjson.dumps({"type": "error", "error": {"type": "rate_limit_error", "message": "slow down"}})
    async with provider_for(sends(answer(200, body))) as (provider, _):
        with pytest.raises(UpstreamStatusError, match="slow down") as caught:
            await plain(provider)
        assert caught.value.status == 429


# --- it says no ------------------------------------------------------------------------------------


def envelope(type_: str, text: str) -> bytes:
    return orjson.dumps({"type": "error", "error": {"type": type_, "message": text}})


@BOTH
@pytest.mark.parametrize(
    ("status", "body", "type_", "text"),
    [
        (429, envelope("rate_limit_error", "Number of tokens"), "rate_limit_error", "Number of tokens"),
        (400, envelope("new_kind_error", "prompt is too long"), "new_kind_error", "prompt is too long"),
        (
            401,
            envelope("authentication_error", "invalid x-api-key"),
            "authentication_error",
            "invalid x-api-key",
        ),
        (
            400,
            b'{"error":{"code":400,"message":"too long","type":"exceed_context_size_error"}}',
            "invalid_request_error",
            "too long",
        ),
        (
            401,
            b'{"error":{"message":"Invalid API Key","type":"authentication_error"}}',
            None,
            "Invalid API Key",
        ),
        (529, b"<html>", "overloaded_error", "the upstream answered with status 529"),
        (503, b"", "api_error", "the upstream answered with status 503"),
        (418, b'{"error":"teapot"}', "invalid_request_error", "the upstream answered with status 418"),
        (500, b'{"error":{"message":7}}', "api_error", "the upstream answered with status 500"),
    ],
)
async def test_status_type_and_text_are_kept(
    ask: Ask, status: int, body: bytes, type_: str | None, text: str
) -> None:
    async with provider_for(sends(answer(status, body))) as (provider, _):
        with pytest.raises(UpstreamStatusError) as caught:
            await ask(provider)
        error = caught.value
        assert (error.status, error.error_type, error.message) == (
            status,
            type_ or "authentication_error",
            text,
        )


@BOTH
async def test_retry_headers_are_kept_and_no_others(ask: Ask) -> None:
    reply = answer(
        429,
        envelope("rate_limit_error", "slow down"),
        "application/json",
        "Retry-After: 7",
        "retry-after-ms: 6500",
        "x-should-retry: true",
        "Anthropic-RateLimit-Requests-Remaining: 0",
        "anthropic-organization-id: org",
        "set-cookie: a=b",
        "server: secret-host",
        "anthropic-ratelimit-odd: caf\xe9",
    )
    async with provider_for(sends(reply)) as (provider, _):
        with pytest.raises(UpstreamStatusError) as caught:
            await ask(provider)
        assert dict(caught.value.headers) == {
            "retry-after": "7",
            "retry-after-ms": "6500",
            "x-should-retry": "true",
            "anthropic-ratelimit-requests-remaining": "0",
        }


@BOTH
async def test_an_error_text_is_scrubbed(ask: Ask) -> None:
    async def script(exchange: Exchange) -> None:
        host = exchange.request.headers["host"]
        text = f"{KEY} refused by http://{host}/v1/messages ({host.upper()})"
        await exchange.send(answer(403, envelope("permission_error", text)))

    async with provider_for(script) as (provider, upstream):
        with pytest.raises(UpstreamStatusError, match="refused by") as caught:
            await ask(provider)
        shows_nothing(caught.value, upstream)


@BOTH
async def test_an_error_whose_body_breaks_off_keeps_its_status(ask: Ask) -> None:
    reply = b"HTTP/1.1 429 X\r\nretry-after: 3\r\ncontent-length: 90\r\n\r\n{"
    async with provider_for(sends(reply)) as (provider, _):
        with pytest.raises(UpstreamStatusError) as caught:
            await ask(provider)
        assert (caught.value.status, dict(caught.value.headers)) == (429, {"retry-after": "3"})


# --- cancelled -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ask", "sent"), [(plain, b""), (drain, b""), (plain, HEAD_OF_BODY), (drain, START)])
async def test_cancelling_closes_the_connection(ask: Ask, sent: bytes) -> None:
    async with provider_for(stalls_after(sent)) as (provider, upstream):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, provider)
            await upstream.asked.wait()
            await trio.testing.wait_all_tasks_blocked(0.02)
            nursery.cancel_scope.cancel()
            start = trio.current_time()
        assert trio.current_time() - start < CLOSE_BOUND_S
        with trio.fail_after(CLOSE_BOUND_S):
            await upstream.gone.wait()


async def test_cancelling_in_a_handshake_closes_the_connection() -> None:
    async with provider_for(never, greets=False) as (provider, upstream):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(plain, provider)
            await upstream.asked.wait()
            await trio.testing.wait_all_tasks_blocked(0.02)
            nursery.cancel_scope.cancel()
        with trio.fail_after(CLOSE_BOUND_S):
            await upstream.gone.wait()


async def test_leaving_a_stream_early_closes_the_connection() -> None:
    async with provider_for(stalls_after(START)) as (provider, upstream):
        async with provider.open_stream(CALL) as source:
            assert await source.receive()
        with trio.fail_after(CLOSE_BOUND_S):
            await upstream.gone.wait()


async def test_cancelled_calls_leave_room_for_others() -> None:
    calls = 0

    async def script(exchange: Exchange) -> None:
        nonlocal calls
        calls += 1
        if calls <= 4:
            await exchange.stall()
        await exchange.send(answer(200, orjson.dumps(message("hi"))))

    async with provider_for(script, max_connections=2) as (provider, upstream):
        for _ in range(2):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(plain, provider)
                nursery.start_soon(drain, provider)
                with trio.fail_after(5):
                    await upstream.wait_open(2)
                await trio.testing.wait_all_tasks_blocked(0.02)
                nursery.cancel_scope.cancel()
            with trio.fail_after(CLOSE_BOUND_S):
                await upstream.wait_open(0)
        with trio.fail_after(2):
            assert (await provider.complete(CALL)).usage["output_tokens"] == 1


# --- connections that are kept ---------------------------------------------------------------------


async def test_connections_are_kept_and_replaced_when_stale() -> None:
    served = 0

    async def script(exchange: Exchange) -> None:
        nonlocal served
        served += 1
        if served == 3:
            return  # hangs up on a request that came over a kept connection
        exchange.keep_alive()
        await exchange.send(answer(200, orjson.dumps(message("hi"))))

    async with provider_for(script) as (provider, upstream):
        await plain(provider)
        await plain(provider)
        assert upstream.connections == 1
        await plain(provider)
        assert upstream.connections == 2
        assert len(upstream.requests) == 4


async def test_a_fresh_connection_is_not_tried_twice() -> None:
    async def script(exchange: Exchange) -> None:
        if len(upstream.requests) == 1:
            exchange.keep_alive()
            await exchange.send(answer(200, orjson.dumps(message("hi"))))

    async with provider_for(script) as (provider, upstream):
        await plain(provider)
        with pytest.raises(UpstreamConnectionError):
            await plain(provider)
        assert len(upstream.requests) == 3


async def test_idle_connections_are_bounded_and_closed_at_the_end() -> None:
    all_asked = trio.Event()

    async def script(exchange: Exchange) -> None:
        exchange.keep_alive()
        if len(upstream.requests) == 4:
            all_asked.set()
        await all_asked.wait()
        await exchange.send(answer(200, orjson.dumps(message("hi"))))

    async with provider_for(script, max_idle_connections=1) as (provider, upstream):
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(plain, provider)
        with trio.fail_after(5):
            await upstream.wait_open(1)
        await plain(provider)
        assert upstream.connections == 4


async def test_no_cookie_is_kept() -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.send(answer(200, orjson.dumps(message("hi")), "application/json", "set-cookie: a=b"))

    async with provider_for(script) as (provider, upstream):
        await plain(provider)
        await plain(provider)
        assert "cookie" not in upstream.requests[1].headers


# --- the wildcard ----------------------------------------------------------------------------------


async def test_forward_passes_any_status_on() -> None:
    async def script(exchange: Exchange) -> None:
        host = exchange.request.headers["host"]
        await exchange.send(answer(404, f"none at {host}".encode(), "text/plain", "request-id: r", "x-a: b"))

    async with provider_for(script) as (provider, upstream):
        headers = (("anthropic-beta", "b1"), ("content-type", "text/x"), ("authorization", "client"))
        result = await provider.forward(ForwardCall("POST", "/v1/messages/new", b"body", headers))
        assert (result.status, result.body) == (404, b"none at [removed]")
        assert dict(result.headers) == {"content-type": "text/plain", "request-id": "r"}
        (request,) = upstream.requests
        assert (request.method, request.path, request.body) == ("POST", "/v1/messages/new", b"body")
        assert request.headers["content-type"] == "text/x"
        assert request.headers["x-api-key"] == KEY
        assert "authorization" not in request.headers


@pytest.mark.parametrize(
    "path",
    [
        "/v1/messages/../models",
        "/v1/messages/%2e%2E/models",
        "/v1/messages/a/./b",
        "/v1/messages/..%2fmodels",
        "/v1/messages/..%5cmodels",
        "/v1/messages/a?b=c",
        "/v1/messages/a#b",
        "/v1/messages/a b",
        "/v1/messages/a\r\nx: y",
        "/v1/messages/",
        "/v1/models",
        "//evil/v1/messages/x",
    ],
)
async def test_forward_stays_where_it_may_be(path: str) -> None:
    async with provider_for(never) as (provider, upstream):
        with pytest.raises(UnsupportedError):
            await provider.forward(ForwardCall("POST", path, b"", ()))
        assert upstream.connections == 0
