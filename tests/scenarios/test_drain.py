"""The end of a gateway: what is waited for, until when exactly, and what is told to whom."""

from contextlib import AsyncExitStack

import pytest
import trio
from trio.testing import MockClock

from events.types import JobFailed
from service.main import FLUSH_GRACE_S
from tests.support.gateway import (
    BODY,
    Answer,
    SseEvent,
    connect,
    kinds,
    open_fake_gateway,
    poll,
    post,
    request,
    start,
)
from tests.support.providers import FakeProvider

STREAM = {**BODY, "stream": True}
ASYNC = {"x-bf-async": "true"}
DRAIN_S = 30.0
DRAIN = {"drain_s": DRAIN_S}


class Clients:
    """Clients that go on while the gateway is being left, and what they were told."""

    def __init__(self) -> None:
        self.answers: list[Answer] = []
        self.events: list[SseEvent] = []
        self.done_at: list[float] = []
        self.streaming = trio.Event()
        """Set once :meth:`stream` has read two frames."""

    async def stream(self, url: str) -> None:
        """Read a stream to its end."""
        async with start(url, "POST", "/v1/messages", {}, STREAM) as call:
            await call.head()
            self.events += await call.events(2)
            self.streaming.set()
            self.events += await call.events()
        self.done_at.append(trio.current_time())

    async def plain(self, url: str) -> None:
        """A plain call."""
        self.answers.append(await post(url))
        self.done_at.append(trio.current_time())


async def test_attached_work_finishes(http_clock: MockClock) -> None:
    fake = FakeProvider(deltas=3, delay_s=2)
    clients = Clients()
    async with trio.open_nursery() as nursery:
        async with open_fake_gateway(fake, jobs=DRAIN) as gateway:
            url = gateway.url
            nursery.start_soon(clients.plain, url)
            nursery.start_soon(clients.stream, url)
            await clients.streaming.wait()
            assert trio.current_time() == 2
        # Both end 8 s after they began, and the gateway with them.
        assert trio.current_time() == 8
        assert not any(call.cancelled for call in fake.calls)
    assert clients.done_at == [8, 8]
    assert kinds(clients.events)[-1] == "message_stop"
    assert clients.answers[0].json["content"] == [{"type": "text", "text": "1 2 3 "}]


async def test_what_is_left_at_the_deadline_fails(http_clock: MockClock) -> None:
    fake = FakeProvider(deltas=3, stall_at="last_frame")
    clients = Clients()
    async with trio.open_nursery() as nursery:
        async with open_fake_gateway(fake, jobs=DRAIN) as gateway:
            url = gateway.url
            nursery.start_soon(clients.plain, url)
            nursery.start_soon(clients.stream, url)
            await post(url, ASYNC)
            await clients.streaming.wait()
            await fake.until_called(3)
            jobs = (await request(url, "GET", "/v1/jobs")).json["data"]
            await trio.sleep_until(100)
        assert trio.current_time() == 100 + DRAIN_S
    assert clients.done_at == [130, 130]
    assert "message_stop" not in kinds(clients.events)
    assert clients.events[-1].event == "error"
    assert clients.events[-1].data["error"]["type"] == "api_error"
    assert (clients.answers[0].status, clients.answers[0].error_type) == (503, "api_error")
    assert [(call.cancelled, call.closed_at) for call in fake.calls] == [(True, 130)] * 3
    assert len(jobs) == 3
    for job in jobs:
        last = (await gateway.log.read(job["id"]))[-1].event
        assert isinstance(last, JobFailed)
        assert (last.failure.status, last.failure.type) == (503, "api_error")


async def test_while_it_drains(http_clock: MockClock) -> None:
    fake = FakeProvider(delay_s=5)
    seen: list[Answer] = []

    async def ask(url: str, job_id: str) -> None:
        await trio.sleep_until(3)
        seen.append(await post(url))
        seen.append(await post(url, ASYNC))
        seen.append(await request(url, "GET", "/readyz"))
        seen.append(await request(url, "GET", "/healthz"))
        seen.append(await poll(url, job_id))
        seen.append(await poll(url, job_id, prefer="wait=60"))

    async with trio.open_nursery() as nursery:
        async with open_fake_gateway(fake, jobs=DRAIN) as gateway:
            url = gateway.url
            job_id = (await post(url, ASYNC)).job_id
            await trio.sleep_until(2)
            nursery.start_soon(ask, url, job_id)
        assert trio.current_time() == 20
    refused, refused_async, ready, alive, polled, finished = seen
    for answer in (refused, refused_async):
        assert (answer.status, answer.error_type) == (529, "overloaded_error")
        assert answer.headers["retry-after"] == "5"
    assert (ready.status, ready.json["draining"]) == (503, True)
    assert alive.status == 200
    assert polled.headers["x-bf-async-status"] == "processing"
    assert finished.headers["x-bf-async-status"] == "completed"
    assert len(fake.calls) == 1


async def test_idle_connections_do_not_hold_it(http_clock: MockClock) -> None:
    async with AsyncExitStack() as clients:
        async with open_fake_gateway(jobs=DRAIN) as gateway:
            silent = await clients.enter_async_context(connect(gateway.url))
            used = await clients.enter_async_context(connect(gateway.url))
            await used.send("POST", "/v1/messages", {}, BODY)
            assert (await used.answer()).status == 200
            await trio.sleep(10)
        assert trio.current_time() == 10
        for call in (silent, used):
            assert await call.stream.receive_some(1) == b""


@pytest.mark.parametrize("drain_s", [0, 5])
async def test_a_client_that_stops_reading_does_not_hold_it_for_long(
    drain_s: float, http_clock: MockClock
) -> None:
    # More than all socket buffers between the two ends hold.
    fake = FakeProvider(deltas=200, pad_bytes=1 << 17)
    async with AsyncExitStack() as clients:
        async with open_fake_gateway(fake, jobs={"drain_s": drain_s}) as gateway:
            stalled = await clients.enter_async_context(
                start(gateway.url, "POST", "/v1/messages", {}, STREAM)
            )
            await stalled.head()
            await trio.sleep(10)
            # It holds neither the upstream nor anybody else.
            assert fake.open_calls == 0
            assert gateway.supervisor.in_flight == 0
            assert (await request(gateway.url, "GET", "/healthz")).status == 200
        assert trio.current_time() == 10 + drain_s + FLUSH_GRACE_S


async def test_a_drain_of_nothing_takes_no_time(http_clock: MockClock) -> None:
    async with open_fake_gateway(jobs=DRAIN) as gateway:
        assert (await post(gateway.url)).status == 200
    assert trio.current_time() == 0


async def test_no_time_to_drain(http_clock: MockClock) -> None:
    fake = FakeProvider(stall_at="mid_stream")
    clients = Clients()
    async with trio.open_nursery() as nursery:
        async with open_fake_gateway(fake, jobs={"drain_s": 0}) as gateway:
            url = gateway.url
            nursery.start_soon(clients.stream, url)
            await clients.streaming.wait()
        assert trio.current_time() == 0
    assert clients.events[-1].event == "error"


class CallersOwnError(Exception):
    """What the program around the gateway raises."""


async def fail_or_be_cancelled(scope: trio.CancelScope, *, raising: bool) -> None:
    """Ways for a caller to leave without a drain."""
    if raising:
        raise CallersOwnError
    scope.cancel()
    await trio.sleep_forever()


@pytest.mark.parametrize("raising", [False, True])
async def test_a_caller_that_is_cancelled_or_fails_ends_it_at_once(
    raising: bool, http_clock: MockClock
) -> None:
    fake = FakeProvider(stall_at="mid_stream")
    watching = trio.Event()
    told = bytearray()

    async def watch(url: str) -> None:
        async with start(url, "POST", "/v1/messages", {}, STREAM) as call:
            await call.head()
            await call.events(2)
            watching.set()
            with trio.fail_after(5):
                async for data in call.stream:
                    told.extend(data)

    async with trio.open_nursery() as nursery:
        with trio.CancelScope() as scope:
            try:
                async with open_fake_gateway(fake, jobs=DRAIN) as gateway:
                    url = gateway.url
                    await post(url, ASYNC)
                    nursery.start_soon(watch, url)
                    await watching.wait()
                    await fake.until_called(2)
                    began_at = trio.current_time()
                    await fail_or_be_cancelled(scope, raising=raising)
            except* CallersOwnError:
                assert raising
        assert trio.current_time() == began_at
        assert [(call.cancelled, call.closed_at) for call in fake.calls] == [(True, began_at)] * 2
        assert gateway.supervisor.in_flight == 0
    # Cut off: neither an end nor an error.
    assert b"message_stop" not in told
    assert b"event: error" not in told
    with pytest.raises(OSError, match="connect"):
        await post(url)
