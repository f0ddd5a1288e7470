"""Clients that hang up, and jobs cancelled over HTTP."""

import pytest
import trio
from trio.testing import MockClock

from tests.support.gateway import (
    BODY,
    connect,
    kinds,
    open_fake_gateway,
    poll,
    post,
    request,
    start,
)
from tests.support.providers import FakeProvider, Point

STREAM = {**BODY, "stream": True}


@pytest.mark.parametrize(
    ("stream", "point"),
    [
        (False, "connect"),
        (True, "connect"),
        (True, "first_frame"),
        (True, "mid_stream"),
    ],
)
async def test_the_client_hangs_up(stream: bool, point: Point, http_clock: MockClock) -> None:
    provider = FakeProvider(stall_at=point)
    async with open_fake_gateway(provider) as gateway:
        async with start(gateway.url, "POST", "/v1/messages", {}, STREAM if stream else BODY) as call:
            await provider.stalled.wait()
            if point == "mid_stream":
                assert (await call.head()).status == 200
                assert kinds(await call.events(2)) == ["message_start", "content_block_start"]
            await trio.sleep(5)
            assert provider.open_calls == 1
        hung_up_at = trio.current_time()
        await provider.until_closed()
        assert provider.calls[0].closed_at == hung_up_at
        assert provider.calls[0].cancelled
        (job,) = (await request(gateway.url, "GET", "/v1/jobs")).json["data"]
        assert job["status"] == "cancelled"
        events = (await request(gateway.url, "GET", f"/v1/jobs/{job['id']}/events")).json["data"]
        assert events[-1]["type"] == "JobCancelled"
        assert events[-1]["by"] == "client"
        assert gateway.log.held_bytes == 0
        assert gateway.supervisor.in_flight == 0


async def test_a_detached_stream_goes_on_without_its_client(http_clock: MockClock) -> None:
    provider = FakeProvider(delay_s=1)
    async with open_fake_gateway(provider) as gateway:
        headers = {"x-bf-detach": "true"}
        async with start(gateway.url, "POST", "/v1/messages", headers, STREAM) as call:
            job_id = (await call.head()).job_id
            first = await call.events(3)
        assert [event.id for event in first] == ["1-1", "1-2", "1-3"]
        path = f"/v1/jobs/{job_id}/stream"
        async with start(gateway.url, "GET", path, {"last-event-id": "1-3"}) as call:
            assert (await call.head()).status == 200
            rest = await call.events()
        assert [event.id for event in rest] == [f"1-{number}" for number in range(4, 9)]
        assert kinds(rest)[-1] == "message_stop"
        assert (await poll(gateway.url, job_id)).json["content"] == [{"type": "text", "text": "1 2 3 "}]
        assert len(provider.calls) == 1


async def test_a_watched_job_is_cancelled(http_clock: MockClock) -> None:
    provider = FakeProvider(stall_at="mid_stream")
    async with open_fake_gateway(provider) as gateway:
        async with start(gateway.url, "POST", "/v1/messages", {}, STREAM) as call:
            job_id = (await call.head()).job_id
            await provider.stalled.wait()
            answers = [
                await request(gateway.url, "POST", f"/v1/jobs/{job_id}/cancel", body={}) for _ in range(2)
            ]
            events = await call.events()
        assert [answer.status for answer in answers] == [200, 200]
        assert [answer.json["status"] for answer in answers] == ["cancelled", "cancelled"]
        assert "message_stop" not in kinds(events)
        assert kinds(events)[-1] == "error"
        assert events[-1].data["error"]["type"] == "conflict_error"
        assert events[-1].data["request_id"].startswith("req_")
        assert provider.calls[0].cancelled


async def test_a_plain_call_whose_job_is_cancelled(http_clock: MockClock) -> None:
    provider = FakeProvider(stall_at="connect")
    async with open_fake_gateway(provider) as gateway:
        async with start(gateway.url, "POST", "/v1/messages", {}, BODY) as call:
            await provider.stalled.wait()
            (job,) = (await request(gateway.url, "GET", "/v1/jobs")).json["data"]
            await request(gateway.url, "POST", f"/v1/jobs/{job['id']}/cancel", body={})
            answer = await call.answer()
        assert (answer.status, answer.error_type) == (409, "conflict_error")
        assert answer.headers["x-should-retry"] == "false"
        assert answer.headers["x-bf-async-status"] == "cancelled"


async def test_deleting_over_http(http_clock: MockClock) -> None:
    provider = FakeProvider(stall_at="mid_stream")
    async with open_fake_gateway(provider) as gateway:
        job_id = (await post(gateway.url, {"x-bf-async": "true"})).job_id
        await provider.stalled.wait()
        path = f"/v1/jobs/{job_id}"
        running = await request(gateway.url, "DELETE", path)
        assert (running.status, running.error_type) == (409, "conflict_error")
        provider.release.set()
        assert (await poll(gateway.url, job_id, prefer="wait=5")).headers["x-bf-async-status"] == "completed"
        gone = await request(gateway.url, "DELETE", path)
        assert (gone.status, gone.json) == (200, {"id": job_id, "type": "job_deleted"})
        for answer in (
            await request(gateway.url, "DELETE", path),
            await request(gateway.url, "GET", path),
            await request(gateway.url, "GET", f"{path}/events"),
            await request(gateway.url, "GET", f"{path}/stream"),
            await poll(gateway.url, job_id),
        ):
            assert (answer.status, answer.error_type) == (404, "not_found_error")
        assert gateway.log.held_bytes == 0
        assert gateway.supervisor.kept_bytes == 0


async def test_following_the_events_of_an_attached_job_is_watching_it(http_clock: MockClock) -> None:
    provider = FakeProvider(stall_at="mid_stream")
    async with open_fake_gateway(provider) as gateway:
        async with connect(gateway.url) as feed:
            async with start(gateway.url, "POST", "/v1/messages", {}, STREAM) as call:
                job_id = (await call.head()).job_id
                await provider.stalled.wait()
                await feed.send("GET", f"/v1/jobs/{job_id}/events", {"accept": "text/event-stream"})
                assert (await feed.head()).status == 200
            await trio.sleep(60)
            assert provider.open_calls == 1
        await provider.until_closed()
        assert provider.calls[0].cancelled
