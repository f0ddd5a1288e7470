"""Upstreams that misbehave: the right error, in time, and nothing left open.

The sockets are real and on loopback; the clock is a mock that jumps only after a little real silence, so
that bytes under way arrive first.
"""

import orjson
import pytest
import trio
import trio.testing
from trio.testing import MockClock

from actors.errors import (
    UpstreamConnectionError,
    UpstreamProtocolError,
    UpstreamTimeoutError,
)
from actors.providers.anthropic import AnthropicProvider
from actors.providers.base import ProviderCall
from actors.timers import Timers, open_timers
from tests.fake_upstream import (
    LAST_CHUNK,
    STREAM_HEAD,
    Exchange,
    answer,
    frame,
)
from tests.faults.upstream import (
    BOTH,
    CALL,
    CLOSE_BOUND_S,
    FIELDS,
    HEAD_OF_BODY,
    KEY,
    START,
    Ask,
    chunk,
    drain,
    never,
    options_for,
    plain,
    provider_for,
    sends,
    shows_nothing,
    stalls_after,
)

pytestmark = pytest.mark.usefixtures("transport")


@pytest.fixture
def clock() -> MockClock:
    return MockClock(autojump_threshold=0.05)


# --- no answer ---------------------------------------------------------------------------------


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
    provider = AnthropicProvider(options_for(upstream.url), timers=Timers(), trust_env=False)
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
    async with open_timers() as timers, trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = listeners[0].socket.getsockname()[1]
        provider = AnthropicProvider(
            options_for(f"http://127.0.0.1:{port}", idle_timeout_s=9),
            timers=timers,
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


# --- an answer that breaks off -----------------------------------------------------------------


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


# --- too much ----------------------------------------------------------------------------------


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
