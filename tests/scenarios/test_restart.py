"""What is the same after a restart: results, deadlines, streams; what a shutdown and a full disk leave."""

import sqlite3
from contextlib import closing
from urllib.parse import urlsplit

import pytest
import trio

from events.log.base import FrameCursor
from events.types import (
    FramesReceived,
    JobAccepted,
    JobCompleted,
)
from service.main import Gateway
from tests.scenarios.restarts import (
    ASYNC,
    Place,
    Recorder,
    asks,
    describe,
    event_kinds,
    no_writes,
    place,
    result,
    submit,
    until_logged,
    watch,
)
from tests.support.gateway import Call, kinds, poll, request, start
from tests.support.providers import FakeProvider, text_of

__all__ = ["place"]

# --- results, deadlines, streams -------------------------------------------------------------------


async def test_results_and_deadlines_are_as_before(place: Place) -> None:
    provider = FakeProvider()
    async with place.life(provider, crash=True) as gateway:
        short = await submit(gateway, x_bf_async_job_result_ttl="60")
        long = await submit(gateway, x_bf_async_job_result_ttl="1000")
        before = [(await result(gateway, job_id)).body for job_id in (short, long)]
        record = await describe(gateway, long)
        await request(gateway.url, "DELETE", f"/v1/jobs/{await _another(gateway)}")
    place.wall_s += 30
    async with place.life(provider, crash=True) as gateway:
        assert [(await result(gateway, job_id)).body for job_id in (short, long)] == before
        assert await describe(gateway, long) == record
        assert len((await request(gateway.url, "GET", "/v1/jobs")).json["data"]) == 2
    place.wall_s += 31
    async with place.life(provider) as gateway:
        assert (await poll(gateway.url, short)).status == 404
        assert (await request(gateway.url, "GET", f"/v1/jobs/{short}")).status == 404
        assert (await result(gateway, long)).body == before[1]
        assert [job["id"] for job in (await request(gateway.url, "GET", "/v1/jobs")).json["data"]] == [long]
    assert len(provider.calls) == 3


async def _another(gateway: Gateway) -> str:
    job_id = await submit(gateway)
    await result(gateway, job_id)
    return job_id


async def test_a_stream_is_replayed_from_disk(place: Place) -> None:
    async with place.life(FakeProvider(deltas=20), crash=True) as gateway:
        job_id = await submit(gateway)
        await result(gateway, job_id)
        _, before = await watch(gateway, job_id)
    async with place.life() as gateway:
        _, after = await watch(gateway, job_id)
        assert [event[:3] for event in after] == [event[:3] for event in before]
        assert [event.id for event in after] == [f"1-{number}" for number in range(1, 26)]
        _, rest = await watch(gateway, job_id, "1-7")
        assert [event[:3] for event in rest] == [event[:3] for event in before[7:]]
        assert (await watch(gateway, job_id, "1-25"))[0].status == 204
        assert (await watch(gateway, job_id, "1-26"))[0].status == 409


async def test_a_cursor_of_the_attempt_that_was_cut_off(place: Place) -> None:
    first = FakeProvider(deltas=4, stall_at="mid_stream")
    async with place.life(first, crash=True) as gateway:
        job_id = await submit(gateway)
        await first.stalled.wait()
        async with start(gateway.url, "GET", f"/v1/jobs/{job_id}/stream") as call:
            await call.head()
            seen = await call.events(4)
    second = FakeProvider(deltas=4, stall_at="connect")
    async with place.life(second) as gateway:
        cursor = seen[-1].id or ""
        assert cursor == "1-4"
        # Also before the next attempt has any frame.
        await second.until_called(1)
        assert (await watch(gateway, job_id, cursor))[0].status == 409
        second.release.set()
        await result(gateway, job_id)
        head, _ = await watch(gateway, job_id, cursor)
        assert (head.status, head.error_type) == (409, "conflict_error")
        assert "given up" in head.json["error"]["message"]
        _, events = await watch(gateway, job_id)
    assert [event.id for event in events] == [f"2-{number}" for number in range(1, 10)]
    assert kinds(events)[-1] == "message_stop"


async def test_an_end_is_not_shown_before_it_is_recorded(place: Place) -> None:
    provider = FakeProvider(deltas=2, stall_at="last_frame")
    async with place.life(provider, crash=True) as gateway:
        job_id = await submit(gateway)
        await provider.stalled.wait()
        async with start(gateway.url, "GET", f"/v1/jobs/{job_id}/stream") as call:
            await call.head()
            seen = await call.events(4)
            with no_writes(gateway):
                provider.release.set()
                await provider.until_closed()
                await until_logged(place, "job.commit_delayed")
        assert "message_stop" not in kinds(seen)
        run = await gateway.log.read_frames(job_id, FrameCursor(1, 0))
        assert run is not None
        assert len(run.frames) == 4
    async with place.life(FakeProvider(deltas=2)) as gateway:
        message = (await result(gateway, job_id)).json
        assert message["content"][0]["text"] == text_of(2)
        _, events = await watch(gateway, job_id)
        assert [event.id for event in events] == [f"2-{number}" for number in range(1, 8)]


# --- leaving and coming back -----------------------------------------------------------------------


async def test_a_shutdown_leaves_detached_jobs_for_the_next_start(place: Place) -> None:
    first = FakeProvider(stall_at="mid_stream")
    async with place.life(first, jobs={"drain_s": 0.1}) as gateway:
        job_id = await submit(gateway)
        await first.stalled.wait()
        call = await _hold(gateway, job_id)
    async with call.stream:
        events = await call.events()
    assert events[-1].event == "error"
    assert "goes on at its next start" in events[-1].data["error"]["message"]
    assert "message_stop" not in kinds(events)
    second = FakeProvider(stall_at="mid_stream")
    async with place.life(second, jobs={"drain_s": 0.1}) as gateway:
        await second.stalled.wait()
    async with place.life() as gateway:
        assert (await result(gateway, job_id)).json["content"][0]["text"] == text_of(3)
        assert (await describe(gateway, job_id))["attempts"] == 3


async def _hold(gateway: Gateway, job_id: str) -> Call:
    parts = urlsplit(gateway.url)
    call = Call(await trio.open_tcp_stream(parts.hostname or "", parts.port or 0), parts.netloc)
    await call.send("GET", f"/v1/jobs/{job_id}/stream")
    assert (await call.head()).status == 200
    return call


async def test_a_job_left_by_a_shutdown_is_still_there(place: Place) -> None:
    first = FakeProvider(stall_at="connect")
    async with place.life(first, crash=True) as gateway:
        jobs = [await submit(gateway) for _ in range(2)]
        await first.until_called(2)
    second = FakeProvider(stall_at="connect")
    async with place.life(second, jobs={"max_resumed": 1, "drain_s": 60.0}) as gateway:
        await second.until_called(1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(gateway.supervisor.drain, 60.0)
            waiting = gateway.supervisor.actor(jobs[1], None)
            assert waiting is not None
            # The one that waits for its turn is left at once, the one at work has a minute.
            await waiting.ended.wait()
            for job_id in jobs:
                answer = await poll(gateway.url, job_id)
                assert (answer.status, answer.headers["x-bf-async-status"]) == (200, "processing")
                assert answer.headers["retry-after"] == "1"
            head, events = await watch(gateway, jobs[1])
            assert (head.status, events) == (503, [])
            second.release.set()
    async with place.life() as gateway:
        assert [(await result(gateway, job_id)).status for job_id in jobs] == [200, 200]
        assert [(await describe(gateway, job_id))["attempts"] for job_id in jobs] == [2, 2]


# --- privacy ---------------------------------------------------------------------------------------


async def test_without_stored_bodies_content_goes_once_it_was_read(place: Place) -> None:
    place.log = {"store_bodies": False}
    first = FakeProvider(stall_at="mid_stream")
    async with place.life(first, crash=True) as gateway:
        job_id = await submit(gateway, "for your eyes only")
        await first.stalled.wait()
    second = Recorder(deltas=40)
    async with place.life(second, crash=True) as gateway:
        actor = gateway.supervisor.actor(job_id, None)
        if actor is not None:
            await actor.ended.wait()
        # What it needed to be run again was there.
        assert second.asked == ["for your eyes only"]
        assert b"for your eyes only" in await _content(gateway, job_id)
    async with place.life(second) as gateway:
        assert (await result(gateway, job_id)).json["content"][0]["text"] == text_of(40)
        with trio.fail_after(10):
            while await _content(gateway, job_id):  # noqa: ASYNC110 - it goes once the answer has left
                await trio.sleep(0.01)
        assert (await poll(gateway.url, job_id)).status == 404
        assert (await describe(gateway, job_id))["status"] == "completed"
        assert (await event_kinds(gateway, job_id))[-1] == "JobCompleted"
    with closing(sqlite3.connect(place.path)) as file:
        assert file.execute("SELECT count(*) FROM events WHERE content IS NOT NULL").fetchone() == (0,)


async def _content(gateway: Gateway, job_id: str) -> bytes:
    found = b""
    for stored in await gateway.log.read(job_id):
        match stored.event:
            case JobAccepted(body=body):
                found += body
            case FramesReceived(frames=frames):
                found += b"".join(frames)
            case JobCompleted(message=message):
                found += message
    return found


# --- a disk that is full for a while ---------------------------------------------------------------


async def test_while_the_disk_is_full_nothing_accepted_is_lost(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actors.job.COMMIT_RETRY_S", 0.01)
    provider = FakeProvider(deltas=3, stall_at="last_frame")
    async with place.life(provider) as gateway:
        job_id = await submit(gateway)
        await provider.stalled.wait()
        with no_writes(gateway):
            refused = await request(gateway.url, "POST", "/v1/messages", ASYNC, asks("no room"))
            assert (refused.status, refused.error_type) == (529, "overloaded_error")
            assert "retry-after" in refused.headers
            assert "x-bf-async-id" not in refused.headers
            provider.release.set()
            await until_logged(place, "job.commit_delayed", times=3)
            assert (await poll(gateway.url, job_id)).headers["x-bf-async-status"] == "processing"
        assert (await result(gateway, job_id)).json["content"][0]["text"] == text_of(3)
        assert (await submit(gateway)) != job_id
        assert len((await request(gateway.url, "GET", "/v1/jobs")).json["data"]) == 2
