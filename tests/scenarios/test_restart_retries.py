"""Restarts among failing attempts: what is waited for goes on, and each bound counts its own."""

from typing import Any

import pytest
import trio
from trio.testing import MockClock

from actors.errors import UpstreamConnectionError
from actors.recovery import Attempts, attempts_of
from events.state import JobState
from service.main import Gateway
from tests.scenarios.restarts import (
    ASYNC,
    Place,
    asks,
    describe,
    event_kinds,
    place,
    result,
    submit,
    until_attempts,
    until_logged,
    watch,
)
from tests.support.gateway import poll, post, request
from tests.support.providers import FakeProvider, Point
from tests.support.scripted import Moody, says

__all__ = ["place"]

LATER = says(529, retry_after="25")
"""A wait in which a restart can fall."""
ALL: dict[str, Any] = {"jobs": {"drain_s": 0.2}}


class FailsOnceReleased(FakeProvider):
    """Stalls, and then asks for a wait."""

    async def at(self, point: Point) -> None:
        await super().at(point)
        if point == self.stall_at:
            raise LATER


async def until_waiting(gateway: Gateway, job_id: str, failures: int = 1) -> None:
    """Until so many of the job's attempts have failed."""
    with trio.fail_after(10):
        while (await event_kinds(gateway, job_id)).count("AttemptFailed") < failures:  # noqa: ASYNC110 - nothing tells
            await trio.lowlevel.checkpoint()


@pytest.mark.parametrize(("away_s", "left_s"), [(0, 25), (15, 10), (25, 0), (-3600, 25)])
async def test_what_is_left_of_a_wait_is_waited_for(
    place: Place, away_s: float, left_s: float, http_clock: MockClock
) -> None:
    """It holds no place meanwhile: a job that was only cut off goes first, and so do calls."""
    one: dict[str, Any] = {"providers": [{"name": "fake", "kind": "echo", "max_concurrency": 1}]}
    moody = Moody(moods=[("connect", LATER)], stall_at="connect")
    async with place.life(moody, crash=True, **one) as gateway:
        waits = await submit(gateway)
        await until_waiting(gateway, waits)
        cut_off = await submit(gateway)
        await moody.stalled.wait()
    place.wall_s += away_s
    fake = FakeProvider()
    async with place.life(fake, jobs={"max_resumed": 1}, **one) as gateway:
        started = trio.current_time()
        assert (await result(gateway, cut_off)).status == 200
        assert (await post(gateway.url)).status == 200
        assert trio.current_time() - started < 1
        assert (await poll(gateway.url, waits, prefer="wait=60")).status == 200
        assert left_s <= trio.current_time() - started < left_s + 1
        assert len(fake.calls) == 3


async def test_who_waits_is_left_and_cancelled_as_ever(place: Place, http_clock: MockClock) -> None:
    async with place.life(Moody(moods=[("connect", LATER)] * 2), crash=True) as gateway:
        first, second = [await submit(gateway, str(number)) for number in range(2)]
        for job_id in (first, second):
            await until_waiting(gateway, job_id)
    async with place.life(FakeProvider(), jobs={"drain_s": 20}) as gateway:
        answer = await request(gateway.url, "POST", f"/v1/jobs/{first}/cancel")
        assert answer.status == 200
        started = trio.current_time()
    assert trio.current_time() - started < 5
    place.wall_s += 25
    async with place.life(FakeProvider()) as gateway:
        assert (await describe(gateway, first))["status"] == "cancelled"
        assert (await result(gateway, second)).status == 200


@pytest.mark.parametrize("crash", [True, False])
async def test_a_wait_goes_on_as_the_next_attempt(place: Place, crash: bool) -> None:
    async with place.life(FakeProvider(raise_at={"connect": LATER}), crash=crash, **ALL) as gateway:
        job_id = await submit(gateway)
        await until_waiting(gateway, job_id)
    place.wall_s += 25
    async with place.life(FakeProvider()) as gateway:
        assert (await result(gateway, job_id)).status == 200
        assert (await event_kinds(gateway, job_id))[:4] == [
            "JobAccepted",
            "AttemptStarted",
            # It failed by itself, and was not cut off.
            "AttemptFailed",
            "AttemptStarted",
        ]
        assert (await watch(gateway, job_id, "1-1"))[0].status == 409
        head, events = await watch(gateway, job_id)
        assert head.status == 200
        assert events[0].id == "2-1"


async def test_a_drain_leaves_who_waits_at_once(place: Place) -> None:
    fake = FakeProvider(raise_at={"connect": LATER})
    async with place.life(fake, jobs={"drain_s": 20}) as gateway:
        job_id = await submit(gateway)
        await until_waiting(gateway, job_id)
        started = trio.current_time()
    assert trio.current_time() - started < 5
    place.wall_s += 25
    async with place.life(FakeProvider()) as gateway:
        assert (await result(gateway, job_id)).status == 200


async def test_a_drain_leaves_who_begins_to_wait_meanwhile(place: Place) -> None:
    fake = FailsOnceReleased(stall_at="connect")
    async with place.life(fake, jobs={"drain_s": 20}) as gateway:
        job_id = await submit(gateway)
        await fake.stalled.wait()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(gateway.supervisor.drain, 20)
            await trio.sleep(0.05)
            fake.release.set()
            await until_waiting(gateway, job_id)
            started = trio.current_time()
        assert trio.current_time() - started < 5
    place.wall_s += 25
    async with place.life(FakeProvider()) as gateway:
        assert (await result(gateway, job_id)).status == 200


async def test_a_drain_leaves_the_line_for_the_next_start_and_lets_calls_wait(place: Place) -> None:
    providers = [{"name": "fake", "kind": "echo", "max_concurrency": 1}]
    fake = FakeProvider(stall_at="connect")
    async with place.life(fake, providers=providers, jobs={"drain_s": 20}) as gateway:
        first, second = [await submit(gateway, str(number)) for number in range(2)]
        async with trio.open_nursery() as nursery:

            async def call() -> None:
                answers.append((await post(gateway.url)).status)

            answers: list[int] = []
            nursery.start_soon(call)
            with trio.fail_after(10):
                while gateway.supervisor.in_flight < 3:  # noqa: ASYNC110 - nothing tells
                    await trio.lowlevel.checkpoint()
            nursery.start_soon(gateway.supervisor.drain, 20)
            await until_logged(place, "job.left")
            fake.release.set()
        assert answers == [200]
        assert (await result(gateway, first)).status == 200
    assert len(fake.calls) == 2
    async with place.life(FakeProvider()) as gateway:
        assert (await result(gateway, second)).status == 200
        assert await gateway.log.read(second)


async def test_failures_and_restarts_are_bounded_apart(place: Place) -> None:
    """Three failed attempts are not three that a restart cut off."""
    retries = {"backoff_s": 0, "max_retries": 9, "max_attempts": 5}
    never = FakeProvider(raise_at={"connect": says(503)}, stall_at=None)
    sections: dict[str, Any] = {"retries": retries, "circuits": {"failures": 99}}
    fourth_waits = Waiting(failures=3)
    async with place.life(fourth_waits, crash=True, **sections) as gateway:
        job_id = await submit(gateway)
        await until_attempts(gateway, [job_id], 4)
        await fourth_waits.stalled.wait()
    stuck = FakeProvider(stall_at="connect")
    async with place.life(stuck, crash=True, **sections) as gateway:
        snapshot = await gateway.log.snapshot(job_id)
        await stuck.stalled.wait()
        assert snapshot.state is JobState.PROCESSING
        snapshot = await gateway.log.snapshot(job_id)
        # Cut off: the fourth, and the fifth as of now.
        assert await attempts_of(gateway.log, snapshot) == Attempts(cut_off=2, failed=3)
    async with place.life(never, **sections) as gateway:
        answer = await result(gateway, job_id)
        assert answer.status == 503
        # Two more may fail.
        assert len(never.calls) == 2
        assert (await gateway.log.snapshot(job_id)).attempt == 7


async def test_a_job_that_restarts_cut_off_too_often_fails(place: Place) -> None:
    sections: dict[str, Any] = {"retries": {"backoff_s": 0}, "jobs": {"max_attempts": 2}}
    moody = Waiting(failures=1)
    async with place.life(moody, crash=True, **sections) as gateway:
        job_id = await submit(gateway)
        await moody.stalled.wait()
    stuck = FakeProvider(stall_at="connect")
    async with place.life(stuck, crash=True, **sections) as gateway:
        await stuck.stalled.wait()
    async with place.life(FakeProvider(), **sections) as gateway:
        answer = await result(gateway, job_id)
        assert answer.status == 500
        assert "interrupted by a restart in 2 of its 3 attempts" in answer.json["error"]["message"]


async def test_fallbacks_of_the_request_outlive_a_restart(place: Place) -> None:
    """One that leads nowhere any more is passed over."""
    stuck = FakeProvider(stall_at="connect")
    routes = [{"model": name, "provider": "fake"} for name in ("m", "spare", "gone")]
    async with place.life(stuck, crash=True, routes=routes) as gateway:
        body = asks("x", fallbacks=["gone", "spare"])
        job_id = (await request(gateway.url, "POST", "/v1/messages", ASYNC, body)).job_id
        await stuck.stalled.wait()
    fake = Waiting(failures=1, stalls=False)
    sections: dict[str, Any] = {"routes": routes[:2], "retries": {"max_retries": 0}}
    async with place.life(fake, **sections) as gateway:
        assert (await result(gateway, job_id)).status == 200
        events = [stored.event for stored in await gateway.log.read(job_id)]
        assert [e.upstream_model for e in events if hasattr(e, "upstream_model")] == ["m", "m", "spare"]


class Waiting(FakeProvider):
    """Refuses so many calls; the one after them stalls."""

    def __init__(self, *, failures: int, stalls: bool = True) -> None:
        super().__init__()
        self.failures = failures
        self.stalls = stalls

    async def at(self, point: Point) -> None:
        if point == "connect" and len(self.calls) <= self.failures:
            raise UpstreamConnectionError("no connection to the upstream")
        if point == "connect" and self.stalls:
            self.stalled.set()
            await self.release.wait()
