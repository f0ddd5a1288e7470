"""What is told of a call that nobody keeps is in the file by then, however much of it could still wait."""

from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from actors.commands import CancelJob
from events.log.sqlite import SqliteLog
from service.main import Gateway
from service.sse import COMMENT
from tests.scenarios.restarts import Place, asks, describe, no_writes, place
from tests.support.gateway import poll, request, start
from tests.support.providers import FakeProvider
from tests.unit.sqlite_files import rows

__all__ = ["place"]

FEED = {"accept": "text/event-stream"}
HEARTBEAT_S = 0.05


def let_all_wait(gateway: Gateway) -> None:
    """From now on nothing goes to the disk by its age."""
    assert isinstance(gateway.log, SqliteLog)
    gateway.log._commit._flush_interval_s = gateway.log._commit._frames_interval_s = 3600.0


def states(path: Path) -> list[str]:
    """What the file says of the jobs in it."""
    return [state for (state,) in rows(path, "SELECT state FROM jobs")]


def last_seqs(path: Path) -> list[int]:
    """The last event the file has of each of them."""
    return [seq for (seq,) in rows(path, "SELECT last_seq FROM jobs")]


async def ended_call(gateway: Gateway, **fields: object) -> str:
    """A plain call that was answered; its job."""
    answer = await request(gateway.url, "POST", "/v1/messages", {}, asks("hello", **fields))
    assert answer.status == 200
    return answer.job_id


def running(gateway: Gateway) -> str:
    """The job under way."""
    (job_id,) = gateway.supervisor._running
    return job_id


async def test_a_record(place: Place) -> None:
    async with place.life(FakeProvider()) as gateway:
        let_all_wait(gateway)
        job_id = await ended_call(gateway)
        assert states(place.path) == []
        assert (await describe(gateway, job_id))["status"] == "completed"
        assert states(place.path) == ["completed"]


async def test_the_end_of_an_attempt(place: Place) -> None:
    provider = FakeProvider(stall_at="last_frame")
    async with (
        place.life(provider) as gateway,
        start(gateway.url, "POST", "/v1/messages", {}, asks("hello")) as call,
    ):
        let_all_wait(gateway)
        await provider.stalled.wait()
        job_id = running(gateway)
        assert states(place.path) == []
        assert (await poll(gateway.url, job_id)).headers["x-bf-async-status"] == "processing"
        assert states(place.path) == ["processing"]
        async with trio.open_nursery() as nursery:
            ends: list[str] = []

            async def wait_for_it() -> None:
                polled = await poll(gateway.url, job_id, prefer="wait=60")
                ends.extend([polled.headers["x-bf-async-status"], *states(place.path)])

            nursery.start_soon(wait_for_it)
            await wait_all_tasks_blocked()
            provider.release.set()
        assert ends == ["completed", "completed"]
        assert (await call.answer()).status == 200


async def test_a_cancellation(place: Place) -> None:
    provider = FakeProvider(stall_at="last_frame")
    async with (
        place.life(provider) as gateway,
        start(gateway.url, "POST", "/v1/messages", {}, asks("hello")) as call,
    ):
        let_all_wait(gateway)
        await provider.stalled.wait()
        answer = await request(gateway.url, "POST", f"/v1/jobs/{running(gateway)}/cancel")
        assert answer.json["status"] == "cancelled"
        assert states(place.path) == ["cancelled"]
        assert (await call.answer()).status == 409


async def test_events(place: Place) -> None:
    async with place.life(FakeProvider()) as gateway:
        let_all_wait(gateway)
        # Its acceptance is on record before its first frame, its end is not.
        job_id = await ended_call(gateway, stream=True)
        answer = await request(gateway.url, "GET", f"/v1/jobs/{job_id}/events")
        assert answer.json["data"][-1]["type"] == "JobCompleted"
        assert states(place.path) == ["completed"]


async def test_events_as_they_come_which_no_heartbeat_loses(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.routes.jobs.RECORD_RETRY_S", 0.01)
    provider = FakeProvider(stall_at="last_frame")
    async with (
        place.life(provider, jobs={"heartbeat_s": HEARTBEAT_S}) as gateway,
        start(gateway.url, "POST", "/v1/messages", {}, asks("hello")) as call,
    ):
        let_all_wait(gateway)
        await provider.stalled.wait()
        job_id = running(gateway)
        async with start(gateway.url, "GET", f"/v1/jobs/{job_id}/events", FEED) as feed:
            assert (await feed.head()).status == 200
            assert [event.event for event in await feed.events(2)] == ["JobAccepted", "AttemptStarted"]
            with no_writes(gateway):
                provider.release.set()
                assert (await call.answer()).status == 200
                for _ in range(3):
                    assert await feed.chunk() == COMMENT
                assert states(place.path) == ["processing"]
            while (last := await feed.chunk()) == COMMENT:
                continue
            assert b"event: JobCompleted" in last
            assert states(place.path) == ["completed"]
            assert await feed.chunk() == b""


async def test_what_cannot_be_recorded_is_not_told(place: Place) -> None:
    async with place.life(FakeProvider()) as gateway:
        let_all_wait(gateway)
        job_id = await ended_call(gateway)
        with no_writes(gateway):
            answer = await request(gateway.url, "GET", f"/v1/jobs/{job_id}")
            assert (answer.status, answer.error_type) == (529, "overloaded_error")
            assert answer.headers["retry-after"] == "5"
        assert (await describe(gateway, job_id))["status"] == "completed"


async def test_the_events_of_a_stream_under_way(place: Place) -> None:
    provider = FakeProvider(stall_at="mid_stream")
    async with place.life(provider) as gateway:
        let_all_wait(gateway)
        async with start(gateway.url, "POST", "/v1/messages", {}, asks("hello", stream=True)):
            await provider.stalled.wait()
            job_id = running(gateway)
            told = (await request(gateway.url, "GET", f"/v1/jobs/{job_id}/events")).json["data"]
            assert told[-1]["type"] == "FramesReceived"
            assert last_seqs(place.path) == [told[-1]["seq"]]


async def test_the_events_of_a_stream_as_they_come(place: Place) -> None:
    provider = FakeProvider(stall_at="mid_stream")
    async with place.life(provider) as gateway:
        let_all_wait(gateway)
        async with start(gateway.url, "POST", "/v1/messages", {}, asks("hello", stream=True)):
            await provider.stalled.wait()
            async with start(gateway.url, "GET", f"/v1/jobs/{running(gateway)}/events", FEED) as feed:
                while b"FramesReceived" not in (told := await feed.chunk()):
                    continue
                assert int(told.rpartition(b"id: ")[2].partition(b"\n")[0]) in last_seqs(place.path)


async def test_the_end_of_a_stream_to_who_else_watches_it(place: Place) -> None:
    provider = FakeProvider(stall_at="last_frame")
    async with place.life(provider) as gateway:
        let_all_wait(gateway)
        async with start(gateway.url, "POST", "/v1/messages", {}, asks("hello", stream=True)):
            await provider.stalled.wait()
            async with start(gateway.url, "GET", f"/v1/jobs/{running(gateway)}/stream") as watcher:
                assert (await watcher.head()).status == 200
                provider.release.set()
                while b"message_stop" not in await watcher.chunk():
                    continue
                assert states(place.path) == ["completed"]


async def test_the_cancellation_of_a_stream_to_who_else_watches_it(place: Place) -> None:
    provider = FakeProvider(stall_at="last_frame")
    async with place.life(provider) as gateway:
        let_all_wait(gateway)
        async with start(gateway.url, "POST", "/v1/messages", {}, asks("hello", stream=True)):
            await provider.stalled.wait()
            job_id = running(gateway)
            async with start(gateway.url, "GET", f"/v1/jobs/{job_id}/stream") as watcher:
                assert (await watcher.head()).status == 200
                actor = gateway.supervisor.actor(job_id, None)
                assert actor is not None
                actor.tell(CancelJob(by="somebody", reason="enough"))
                while b"event: error" not in await watcher.chunk():
                    continue
                assert states(place.path) == ["cancelled"]
