"""Connections to an upstream: closed when cancelled, kept when they may be, replaced when stale."""

import orjson
import pytest
import trio
import trio.testing

from actors.errors import (
    UpstreamConnectionError,
    UpstreamProtocolError,
)
from actors.providers.transport import STALE_S
from tests.fake_upstream import (
    Exchange,
    answer,
    message,
)
from tests.faults.upstream import (
    CALL,
    CLOSE_BOUND_S,
    HEAD_OF_BODY,
    START,
    Ask,
    drain,
    never,
    plain,
    provider_for,
    stalls_after,
)

pytestmark = pytest.mark.usefixtures("transport")

# --- cancelled ---------------------------------------------------------------------------------


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


async def test_closing_the_provider_ends_the_calls_under_way() -> None:
    async with provider_for(stalls_after(START)) as (provider, upstream):
        async with provider.open_stream(CALL) as source:
            assert await source.receive()
            await provider.aclose()
            with pytest.raises(UpstreamProtocolError, match="broke off"):
                await source.receive()
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


async def test_a_call_that_waits_gets_the_connection_that_comes_free() -> None:
    async def script(exchange: Exchange) -> None:
        await trio.testing.wait_all_tasks_blocked(0.02)
        exchange.keep_alive()
        await exchange.send(answer(200, orjson.dumps(message("hi"))))

    async with provider_for(script, max_connections=1) as (provider, upstream):
        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                for _ in range(3):
                    nursery.start_soon(plain, provider)
        assert len(upstream.requests) == 3
        assert upstream.connections == 1


# --- connections that are kept -----------------------------------------------------------------


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


@pytest.fixture
def io_clock() -> trio.testing.MockClock:
    """Jumps once nothing has come over loopback for a moment."""
    return trio.testing.MockClock(autojump_threshold=0.05)


async def test_what_may_have_been_worked_on_is_not_sent_twice(io_clock: trio.testing.MockClock) -> None:
    async def script(exchange: Exchange) -> None:
        if len(upstream.requests) == 1:
            exchange.keep_alive()
            await exchange.send(answer(200, orjson.dumps(message("hi"))))
            return
        await trio.sleep(STALE_S + 1)  # and then it hangs up, on a kept connection

    async with provider_for(script) as (provider, upstream):
        await plain(provider)
        with pytest.raises(UpstreamConnectionError):
            await plain(provider)
        assert upstream.connections == 1
        assert len(upstream.requests) == 2


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
