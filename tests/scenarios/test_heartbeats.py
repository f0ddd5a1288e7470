"""Pings: after exactly so much silence, again and again, and never while frames flow."""

import io

import trio
from trio.testing import MockClock

from tests.support.gateway import BODY, kinds, open_fake_gateway, post, request, start
from tests.support.providers import FakeProvider

STREAM = {**BODY, "stream": True}


async def test_a_ping_after_every_silence(http_clock: MockClock) -> None:
    fake = FakeProvider(deltas=2, stall_at="mid_stream")
    async with open_fake_gateway(fake) as gateway:
        async with start(gateway.url, "POST", "/v1/messages", {}, STREAM) as call:
            await call.head()
            events = await call.events(2 + 1 + 4)
            assert [(e.event, e.at) for e in events[3:]] == [
                ("ping", 15),
                ("ping", 30),
                ("ping", 45),
                ("ping", 60),
            ]
            await trio.sleep_until(70)
            fake.release.set()
            rest = await call.events()
        assert "ping" not in kinds(rest)
        assert kinds(rest)[-1] == "message_stop"
        assert {event.at for event in rest} == {70}


async def test_a_ping_is_what_the_api_sends(http_clock: MockClock) -> None:
    async with open_fake_gateway(FakeProvider(delay_s=20)) as gateway:
        async with start(gateway.url, "POST", "/v1/messages", {}, STREAM) as call:
            await call.head()
            await call.events(2)
            ping = await call.event()
        assert ping is not None
        assert (ping.event, ping.data, ping.id) == ("ping", {"type": "ping"}, None)


async def test_no_ping_while_frames_flow(http_clock: MockClock) -> None:
    async with open_fake_gateway(FakeProvider(deltas=10, delay_s=14)) as gateway:
        async with start(gateway.url, "POST", "/v1/messages", {}, STREAM) as call:
            await call.head()
            events = await call.events()
        assert trio.current_time() == 11 * 14
        assert "ping" not in kinds(events)


async def test_silence_counts_from_the_last_frame(http_clock: MockClock) -> None:
    async with open_fake_gateway(FakeProvider(deltas=3, delay_s=20), jobs={"heartbeat_s": 8}) as gateway:
        async with start(gateway.url, "POST", "/v1/messages", {}, STREAM) as call:
            await call.head()
            events = await call.events()
        pings = [event.at for event in events if event.event == "ping"]
        assert pings == [28, 36, 48, 56, 68, 76]


async def test_the_first_byte_may_take_long_without_a_ping(http_clock: MockClock) -> None:
    """Before the first frame there is no stream yet: a failure still gets its own status."""
    fake = FakeProvider(first_delay_s=100, raise_at={"last_frame": RuntimeError("boom")}, deltas=0)
    async with (
        open_fake_gateway(fake) as gateway,
        start(gateway.url, "POST", "/v1/messages", {}, STREAM) as call,
    ):
        assert (await call.head()).status == 200
        assert trio.current_time() == 100
        assert kinds(await call.events()) == ["message_start", "content_block_start", "error"]


async def test_a_resumed_stream_pings_before_its_first_frame(http_clock: MockClock) -> None:
    fake = FakeProvider(stall_at="mid_stream", deltas=2)
    async with open_fake_gateway(fake, jobs={"heartbeat_s": 5}) as gateway:
        job_id = (await post(gateway.url, {"x-bf-async": "true"})).job_id
        await fake.stalled.wait()
        await trio.sleep_until(2)
        path = f"/v1/jobs/{job_id}/stream?starting_after=1-3"
        async with start(gateway.url, "GET", path) as call:
            assert (await call.head()).status == 200
            events = await call.events(2)
        assert [(event.event, event.at) for event in events] == [("ping", 7), ("ping", 12)]
        await request(gateway.url, "POST", f"/v1/jobs/{job_id}/cancel", body={})


async def test_the_event_feed_is_kept_alive_by_comments(http_clock: MockClock) -> None:
    fake = FakeProvider(stall_at="connect")
    lines = io.StringIO()
    async with open_fake_gateway(fake, lines=lines) as gateway:
        job_id = (await post(gateway.url, {"x-bf-async": "true"})).job_id
        await fake.stalled.wait()
        headers = {"accept": "text/event-stream"}
        async with start(gateway.url, "GET", f"/v1/jobs/{job_id}/events", headers) as call:
            await call.head()
            text = await call.chunk()
            assert text.count(b"\nevent: ") == 2
            comments = [(await call.chunk(), trio.current_time()) for _ in range(3)]
            assert comments == [(b":\n\n", 15), (b":\n\n", 30), (b":\n\n", 45)]
            await request(gateway.url, "POST", f"/v1/jobs/{job_id}/cancel", body={})
            (last,) = await call.events()
            assert (last.id, last.event, last.at) == ("3", "JobCancelled", 45)
    assert "Traceback" not in lines.getvalue()
