"""What is told of a call that nobody keeps is in the file by then, however much of it could still wait."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from actors.commands import CancelJob
from events.log.sqlite import SqliteLog
from service.main import Gateway
from service.sse import COMMENT
from tests.scenarios.restarts import Place, asks, describe, no_writes, place
from tests.support.gateway import Call, poll, request, start
from tests.support.providers import FakeProvider, Point
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


class UnderWay(NamedTuple):
    """A call whose upstream waits."""

    gateway: Gateway
    provider: FakeProvider
    http: Call
    job_id: str


@asynccontextmanager
async def under_way(
    place: Place, *, stall_at: Point = "last_frame", stream: bool = False, **sections: Any
) -> AsyncIterator[UnderWay]:
    """Someone's call, of which nothing goes to the disk by its age, until its upstream is released."""
    provider = FakeProvider(stall_at=stall_at)
    async with place.life(provider, **sections) as gateway:
        let_all_wait(gateway)
        async with start(gateway.url, "POST", "/v1/messages", {}, asks("hello", stream=stream)) as call:
            await provider.stalled.wait()
            (job_id,) = gateway.supervisor._running
            yield UnderWay(gateway, provider, call, job_id)


async def told(feed: Call) -> bytes:
    """The next events of a feed, after any heartbeats."""
    while (chunk := await feed.chunk()) == COMMENT:
        continue
    return chunk


async def test_a_record(place: Place) -> None:
    async with place.life(FakeProvider()) as gateway:
        let_all_wait(gateway)
        job_id = await ended_call(gateway)
        assert states(place.path) == []
        assert (await describe(gateway, job_id))["status"] == "completed"
        assert states(place.path) == ["completed"]


async def test_the_end_of_an_attempt(place: Place) -> None:
    async with under_way(place) as call:
        assert states(place.path) == []
        assert (await poll(call.gateway.url, call.job_id)).headers["x-bf-async-status"] == "processing"
        assert states(place.path) == ["processing"]
        async with trio.open_nursery() as nursery:
            ends: list[str] = []

            async def wait_for_it() -> None:
                polled = await poll(call.gateway.url, call.job_id, prefer="wait=60")
                ends.extend([polled.headers["x-bf-async-status"], *states(place.path)])

            nursery.start_soon(wait_for_it)
            await wait_all_tasks_blocked()
            call.provider.release.set()
        assert ends == ["completed", "completed"]
        assert (await call.http.answer()).status == 200


async def test_a_cancellation(place: Place) -> None:
    async with under_way(place) as call:
        answer = await request(call.gateway.url, "POST", f"/v1/jobs/{call.job_id}/cancel")
        assert answer.json["status"] == "cancelled"
        assert states(place.path) == ["cancelled"]
        assert (await call.http.answer()).status == 409


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
    async with (
        under_way(place, jobs={"heartbeat_s": HEARTBEAT_S}) as call,
        start(call.gateway.url, "GET", f"/v1/jobs/{call.job_id}/events", FEED) as feed,
    ):
        assert (await feed.head()).status == 200
        first = await told(feed)
        assert b"event: JobAccepted" in first
        assert b"event: AttemptStarted" in first
        with no_writes(call.gateway):
            call.provider.release.set()
            assert (await call.http.answer()).status == 200
            for _ in range(3):
                assert await feed.chunk() == COMMENT
            assert states(place.path) == ["processing"]
        assert b"event: JobCompleted" in await told(feed)
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
    async with under_way(place, stall_at="mid_stream", stream=True) as call:
        told = (await request(call.gateway.url, "GET", f"/v1/jobs/{call.job_id}/events")).json["data"]
        assert told[-1]["type"] == "FramesReceived"
        assert last_seqs(place.path) == [told[-1]["seq"]]


async def test_the_events_of_a_stream_as_they_come(place: Place) -> None:
    async with (
        under_way(place, stall_at="mid_stream", stream=True) as call,
        start(call.gateway.url, "GET", f"/v1/jobs/{call.job_id}/events", FEED) as feed,
    ):
        while b"FramesReceived" not in (told := await feed.chunk()):
            continue
        assert int(told.rpartition(b"id: ")[2].partition(b"\n")[0]) in last_seqs(place.path)


async def test_the_end_of_a_stream_to_who_else_watches_it(place: Place) -> None:
    async with (
        under_way(place, stream=True) as call,
        start(call.gateway.url, "GET", f"/v1/jobs/{call.job_id}/stream") as watcher,
    ):
        assert (await watcher.head()).status == 200
        call.provider.release.set()
        while b"message_stop" not in await watcher.chunk():
            continue
        assert states(place.path) == ["completed"]


async def test_the_cancellation_of_a_stream_to_who_else_watches_it(place: Place) -> None:
    async with (
        under_way(place, stream=True) as call,
        start(call.gateway.url, "GET", f"/v1/jobs/{call.job_id}/stream") as watcher,
    ):
        assert (await watcher.head()).status == 200
        actor = call.gateway.supervisor.actor(call.job_id, None)
        assert actor is not None
        actor.tell(CancelJob(by="somebody", reason="enough"))
        while b"event: error" not in await watcher.chunk():
            continue
        assert states(place.path) == ["cancelled"]
