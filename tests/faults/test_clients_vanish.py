"""Clients that go away, or stop reading: what they held is let go, and nobody else notices.

Real sockets and the real clock: that the kernel tells us in time is part of what is tested.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import orjson
import pytest
import trio

from events.log.base import JobFilter
from events.state import JobState
from service.main import FLUSH_GRACE_S, Gateway
from tests.e2e.daemon import running
from tests.e2e.wire import BODY, Wire, connect, open_stream, post, request
from tests.fake_upstream import STREAM_HEAD, Exchange, FakeUpstream, Script, message_frames, open_upstream

CLOSE_BOUND_S = 0.5
"""From the last watcher's leaving to the upstream connection's end."""
TEST_TIMEOUT_S = 20
MARGIN_S = 1.0
"""For a machine that is busy with something else."""
STREAM = {**BODY, "stream": True}
SMALL_BUFFER_BYTES = 4096


async def silent(exchange: Exchange) -> None:
    """Take the request, and say nothing."""
    await exchange.stall()


async def headers_only(exchange: Exchange) -> None:
    """Begin a stream, without a frame."""
    await exchange.send(STREAM_HEAD)
    await exchange.stall()


async def begun(exchange: Exchange) -> None:
    """Begin a stream, and stall in its middle."""
    await exchange.send(STREAM_HEAD)
    for frame in message_frames("one two three")[:4]:
        await exchange.send_chunk(frame)
    await exchange.stall()


@asynccontextmanager
async def through(script: Script) -> AsyncIterator[tuple[Gateway, FakeUpstream]]:
    """A gateway in front of an upstream that follows ``script``."""
    with trio.fail_after(TEST_TIMEOUT_S):
        async with open_upstream(script) as upstream:
            provider = {"name": "up", "kind": "anthropic", "base_url": upstream.url}
            async with running(providers=[provider]) as gateway:
                yield gateway, upstream


async def states(gateway: Gateway) -> list[JobState]:
    return [job.state for job in (await gateway.log.page(JobFilter(), limit=100)).jobs]


async def assert_let_go(gateway: Gateway, upstream: FakeUpstream) -> None:
    """The upstream connection ends within the bound, and the job is recorded as cancelled."""
    with trio.fail_after(CLOSE_BOUND_S):
        await upstream.gone.wait()
        await upstream.wait_open(0)
    await until_idle(gateway)
    assert await states(gateway) == [JobState.CANCELLED]


async def until_idle(gateway: Gateway) -> None:
    with trio.fail_after(CLOSE_BOUND_S):
        while gateway.supervisor.in_flight:  # noqa: ASYNC110 - no event is set for tests
            await trio.sleep(0.002)


# --- gone ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["fin", "rst"])
@pytest.mark.parametrize(
    ("script", "body", "first"),
    [
        (silent, BODY, b""),
        (silent, STREAM, b""),
        (headers_only, STREAM, b""),
        (begun, STREAM, b'"two '),
    ],
    ids=["plain", "stream-no-answer", "stream-no-frame", "stream-begun"],
)
async def test_the_upstream_is_closed_in_time(
    script: Script, body: dict[str, Any], first: bytes, how: str
) -> None:
    async with through(script) as (gateway, upstream):
        wire = Wire(await open_stream(gateway.url))
        await wire.send(post(body))
        await upstream.asked.wait()
        if first:
            await wire.read_until(first)
        if how == "rst":
            wire.reset()
        else:
            await wire.stream.aclose()
        await assert_let_go(gateway, upstream)


@pytest.mark.parametrize("body", [BODY, STREAM], ids=["plain", "stream"])
async def test_a_client_that_had_more_to_ask(body: dict[str, Any]) -> None:
    # Requests that wait behind the first must not hide that the client is gone.
    async with through(silent) as (gateway, upstream):
        async with connect(gateway.url) as wire:
            await wire.send(post(body) * 3)
            await upstream.asked.wait()
        await assert_let_go(gateway, upstream)
        assert len(upstream.requests) == 1


async def test_pipelined_requests_wait_for_their_turn() -> None:
    async def one_by_one(exchange: Exchange) -> None:
        assert supervisor.in_flight == 1
        await begun_and_ended(exchange)

    async with through(one_by_one) as (gateway, upstream):
        supervisor = gateway.supervisor
        async with connect(gateway.url) as wire:
            await wire.send(post(STREAM) * 3)
            for _ in range(3):
                assert b"message_stop" in (await wire.answer()).body
        assert len(upstream.requests) == 3
        await until_idle(gateway)


async def begun_and_ended(exchange: Exchange) -> None:
    await exchange.send(STREAM_HEAD)
    for frame in message_frames("one two three"):
        await exchange.send_chunk(frame)
    await exchange.send(b"0\r\n\r\n")


async def test_only_the_last_watcher_takes_the_job_along() -> None:
    async with through(begun) as (gateway, upstream), connect(gateway.url) as second:
        async with connect(gateway.url) as first:
            await first.send(post(STREAM))
            await first.read_until(b'"two ')
            job_id = (await gateway.log.unfinished())[0].job_id
            await second.send(request("GET", f"/v1/jobs/{job_id}/stream"))
            await second.read_until(b'"two ')
        with trio.move_on_after(CLOSE_BOUND_S) as waited:
            await upstream.gone.wait()
        assert waited.cancelled_caught
        assert gateway.supervisor.in_flight == 1
        await second.stream.aclose()
        await assert_let_go(gateway, upstream)


@pytest.mark.parametrize(
    ("body", "header"),
    [
        (BODY, ("x-bf-async", "true")),
        (BODY, ("x-bf-detach", "true")),
        (STREAM, ("x-bf-detach", "true")),
    ],
    ids=["async", "plain-detached", "stream-detached"],
)
async def test_a_detached_job_goes_on(body: dict[str, Any], header: tuple[str, str]) -> None:
    go_on = trio.Event()

    async def waits(exchange: Exchange) -> None:
        await go_on.wait()
        await begun_and_ended(exchange)

    async with through(waits) as (gateway, upstream):
        async with connect(gateway.url) as wire:
            await wire.send(post(body, header))
            await upstream.asked.wait()
        await trio.sleep(0.1)
        job_id = (await gateway.log.unfinished())[0].job_id
        async with connect(gateway.url) as poller:
            await poller.send(post(b"", ("x-bf-async-id", job_id), ("prefer", "wait=5")))
        go_on.set()
        await until_idle(gateway)
        assert await states(gateway) == [JobState.COMPLETED]
        async with connect(gateway.url) as wire:
            answer = await wire.ask(post(b"", ("x-bf-async-id", job_id)))
            assert answer.json()["content"] == [{"type": "text", "text": "one two three"}]


# --- there, but not reading ------------------------------------------------------------------------

FLOOD_FRAMES = 60_000
FLOOD = {"name": "echo", "kind": "echo", "frames": FLOOD_FRAMES}


async def test_one_that_stops_reading_delays_nobody() -> None:
    body = {**STREAM, "max_tokens": FLOOD_FRAMES + 1}
    drain_s = 0.3
    with trio.fail_after(TEST_TIMEOUT_S):
        async with running(providers=[FLOOD], jobs={"drain_s": drain_s}) as gateway:
            stalled = Wire(await open_stream(gateway.url, receive_buffer_bytes=SMALL_BUFFER_BYTES))
            await stalled.send(post(body, ("x-bf-detach", "true")))
            head = await stalled.read_until(b"\r\n\r\n")
            job_id = head.partition(b"x-bf-async-id: ")[2].partition(b"\r\n")[0].decode()
            async with connect(gateway.url) as reader:
                answer = await reader.ask(request("GET", f"/v1/jobs/{job_id}/stream"), method="GET")
            numbers = [line for line in answer.body.split(b"\n") if line.startswith(b"id: ")]
            # message_start, block start; block stop, message_delta, message_stop.
            assert numbers == [b"id: 1-%d" % number for number in range(1, FLOOD_FRAMES + 6)]
            # The other one still sits on what it does not take: the kernel's buffers are smaller.
            assert gateway.supervisor.in_flight == 0
            async with connect(gateway.url) as wire:
                assert (await wire.ask(request("GET", "/healthz"), method="GET")).status == 200
            left_at = trio.current_time()
        assert trio.current_time() - left_at < drain_s + FLUSH_GRACE_S + MARGIN_S
        await stalled.stream.aclose()


async def test_one_that_stops_reading_does_not_hold_up_shutdown() -> None:
    """Its job still runs when the daemon is told to go."""
    body = endless("word " * 2000)
    drain_s = 0.3
    with trio.fail_after(TEST_TIMEOUT_S):
        async with running(providers=[ENDLESS], jobs={"drain_s": drain_s}) as gateway:
            stalled = Wire(await open_stream(gateway.url, receive_buffer_bytes=SMALL_BUFFER_BYTES))
            await stalled.send(post(body))
            await stalled.read_until(b"message_start")
            await trio.sleep(0.3)
            assert gateway.supervisor.in_flight == 1
            left_at = trio.current_time()
        took_s = trio.current_time() - left_at
        assert drain_s <= took_s < drain_s + FLUSH_GRACE_S + MARGIN_S
        assert gateway.supervisor.in_flight == 0
        await stalled.stream.aclose()


ENDLESS = {"name": "echo", "kind": "echo", "frames": 1_000_000, "frame_delay_s": 0.001}


def endless(text: str) -> dict[str, Any]:
    """A stream that does not end within a test; one frame says ``text``."""
    word = text.replace(" ", "_")
    return {**STREAM, "max_tokens": 2_000_000, "messages": [{"role": "user", "content": word}]}


@pytest.mark.parametrize("detach", ["true", "false"])
async def test_one_that_reads_now_and_then_gets_every_byte(detach: str) -> None:
    """Its socket takes parts of frames, or nothing, while the upstream goes on."""
    words, text = 300, "x" * 20_000
    body = {**STREAM, "max_tokens": words + 1, "messages": [{"role": "user", "content": text}]}
    provider = {"name": "echo", "kind": "echo", "frames": words, "frame_delay_s": 0.001}
    with trio.fail_after(TEST_TIMEOUT_S):
        async with (
            running(providers=[provider]) as gateway,
            connect(gateway.url, receive_buffer_bytes=SMALL_BUFFER_BYTES) as slow,
        ):
            await slow.send(post(body, ("x-bf-detach", detach)))
            for _ in range(5):
                # Long enough for the kernel's buffers to fill, short enough for the rest to come live.
                await trio.sleep(0.06)
                await slow.read_some(400_000)
            answer = await slow.answer()
    events = [frame.partition(b"data: ")[2] for frame in answer.body.split(b"\n\n") if b"data: " in frame]
    deltas = [orjson.loads(data) for data in events if b"content_block_delta" in data]
    assert [delta["delta"]["text"].strip() for delta in deltas] == [text] * words
    assert orjson.loads(events[-1]) == {"type": "message_stop"}


@pytest.mark.skipif(not hasattr(trio.socket, "TCP_USER_TIMEOUT"), reason="needs TCP_USER_TIMEOUT (Linux)")
async def test_one_that_stops_reading_is_cut_off_and_its_job_stopped() -> None:
    send_timeout_s = 1.0
    with trio.fail_after(TEST_TIMEOUT_S):
        async with (
            running(providers=[ENDLESS], server={"send_timeout_s": send_timeout_s}) as gateway,
            connect(gateway.url, receive_buffer_bytes=SMALL_BUFFER_BYTES) as stalled,
        ):
            await stalled.send(post(endless("word " * 2000)))
            await stalled.read_until(b"message_start")
            while gateway.supervisor.in_flight:  # noqa: ASYNC110 - no event is set for tests
                await trio.sleep(0.02)
            assert await states(gateway) == [JobState.CANCELLED]
