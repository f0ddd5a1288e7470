"""One upstream call, many watchers: each sees every frame once, in order, whatever the others do."""

import random
from collections.abc import Awaitable, Callable

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from actors.broadcast import Subscription
from actors.job import JobActor
from actors.work import Watch
from events.log.base import FrameCursor
from events.types import Mode
from tests.support.gateway import SseEvent, open_fake_gateway, post, start
from tests.support.providers import FakeProvider, whole_stream
from tests.support.world import World, open_world, read_stream

WATCHERS = 200
DELTAS = 120
EXPECTED = [frame.wire for frame in whole_stream(DELTAS)]
Watcher = Callable[[World, str, random.Random], Awaitable[list[bytes]]]


async def keen(world: World, job_id: str, rng: random.Random) -> list[bytes]:
    """Reads whatever comes at once."""
    subscription, _, _, watch = await world.supervisor.subscribe(job_id, "me", None)
    try:
        return await read_stream(subscription)
    finally:
        leave(subscription, watch)


async def slow(world: World, job_id: str, rng: random.Random) -> list[bytes]:
    """Sleeps between two reads, for longer than its buffer lasts."""
    subscription, _, _, watch = await world.supervisor.subscribe(job_id, "me", None)
    frames: list[bytes] = []
    try:
        while runs := await subscription.receive():
            frames.extend(frame for run in runs for frame in run.frames)
            await trio.sleep(rng.choice([0.25, 5, 20]))
    finally:
        leave(subscription, watch)
    return frames


async def resuming(world: World, job_id: str, rng: random.Random) -> list[bytes]:
    """Leaves after a few reads and comes back later with the cursor it had."""
    frames: list[bytes] = []
    cursor: FrameCursor | None = None
    while True:
        subscription, _, _, watch = await world.supervisor.subscribe(job_id, "me", cursor)
        try:
            for _ in range(rng.randint(1, 30)):
                runs = await subscription.receive()
                if not runs:
                    return frames
                frames.extend(frame for run in runs for frame in run.frames)
            cursor = subscription.cursor
        finally:
            leave(subscription, watch)
        await trio.sleep(rng.uniform(0, 10))


async def impatient(world: World, job_id: str, rng: random.Random) -> list[bytes]:
    """Is cancelled in its reads again and again; nothing may be lost by that."""
    subscription, _, _, watch = await world.supervisor.subscribe(job_id, "me", None)
    frames: list[bytes] = []
    try:
        while True:
            with trio.move_on_after(rng.choice([0, 0.3, 0.5])) as scope:
                runs = await subscription.receive()
            if scope.cancelled_caught:
                continue
            if not runs:
                return frames
            frames.extend(frame for run in runs for frame in run.frames)
    finally:
        leave(subscription, watch)


def leave(subscription: Subscription, watch: Watch | None) -> None:
    """As the end of a request does it."""
    subscription.close()
    if watch is not None:
        watch.leave()


@pytest.mark.parametrize("seed", range(3))
async def test_two_hundred_watchers(seed: int, autojump_clock: MockClock) -> None:
    rng = random.Random(seed)
    done: list[bytes | int] = []
    provider = FakeProvider(deltas=DELTAS, delay_s=0.5)
    async with open_world(provider, buffer_runs=4) as world:
        actor, watch = await world.submit(Mode.ASYNC, ttl_s=3600)

        async def watcher(kind: Watcher, after_s: float, own: random.Random) -> None:
            await trio.sleep(after_s)
            assert await kind(world, actor.job_id, own) == EXPECTED
            done.append(1)

        async with trio.open_nursery() as nursery:
            for number in range(WATCHERS):
                kind = rng.choice([keen, slow, resuming, impatient])
                # Some come when it is over: that is a replay.
                after_s = rng.uniform(0, 80)
                nursery.start_soon(watcher, kind, after_s, random.Random(1000 * seed + number))
            watch.leave()
            await actor.ended.wait()
            # Nobody's slowness was the upstream's: one opening, and a pause before each piece.
            assert trio.current_time() == (DELTAS + 1) * 0.5
        assert len(done) == WATCHERS
        assert len(provider.calls) == 1
        assert world.telemetry.watchers == 0
        assert world.telemetry.lags > 0


async def test_a_reader_that_stalls_delays_nobody(autojump_clock: MockClock) -> None:
    provider = FakeProvider(deltas=50, delay_s=1)
    arrivals: list[float] = []
    async with open_world(provider, buffer_runs=2) as world:
        actor, watch = await world.submit(Mode.STREAM)
        stalled = actor.subscribe()
        keen_one = actor.subscribe()
        while await keen_one.receive():
            arrivals.append(trio.current_time())
        # The closing frames come with no delay after the last piece, so in a read of their own.
        assert arrivals[:51] == [float(second) for second in range(1, 52)]
        assert actor.ended.is_set()
        assert world.telemetry.lags == 1
        assert await read_stream(stalled) == [frame.wire for frame in whole_stream(50)]
        stalled.close()
        keen_one.close()
        watch.leave()
        await wait_all_tasks_blocked()
        assert world.log.held_bytes == 0


async def test_watchers_share_the_same_bytes() -> None:
    provider = FakeProvider(deltas=3, stall_at="last_frame")
    async with open_world(provider, buffer_runs=16) as world:
        actor, _ = await world.submit(Mode.STREAM)
        subscriptions = [actor.subscribe() for _ in range(3)]
        await provider.stalled.wait()
        first, *others = [await subscription.receive() for subscription in subscriptions]
        for other in others:
            assert all(mine.frames is theirs.frames for mine, theirs in zip(first, other, strict=True))


async def attached_readers(actor: JobActor, count: int, frames: list[list[bytes]]) -> None:
    async with trio.open_nursery() as nursery:
        for _ in range(count):
            stake, subscription = actor.watch(), actor.subscribe()

            async def read(stake: Watch = stake, subscription: Subscription = subscription) -> None:
                frames.append(await read_stream(subscription))
                leave(subscription, stake)

            nursery.start_soon(read)


async def test_the_content_goes_with_the_last_watcher_not_before(autojump_clock: MockClock) -> None:
    async with open_world(FakeProvider(deltas=10, delay_s=1)) as world:
        actor, watch = await world.submit(Mode.STREAM)
        frames: list[list[bytes]] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(attached_readers, actor, 20, frames)
            await actor.ended.wait()
            await trio.sleep(100)
            assert world.log.held_bytes > 0
        assert frames == [[frame.wire for frame in whole_stream(10)]] * 20
        watch.leave()
        await wait_all_tasks_blocked()
        assert world.log.held_bytes == 0


async def read_over_http(url: str, job_id: str, rng: random.Random) -> list[SseEvent]:
    """Read a job's stream, dropping the connection at times and resuming by Last-Event-ID."""
    events: list[SseEvent] = []
    while True:
        headers = {"last-event-id": events[-1].id or ""} if events else {}
        async with start(url, "GET", f"/v1/jobs/{job_id}/stream", headers) as call:
            assert (await call.head()).status == 200
            read = await call.events(rng.choice([3, 7, None]))
        events += read
        if not read or read[-1].event == "message_stop":
            return events


async def test_resuming_over_http(http_clock: MockClock) -> None:
    provider = FakeProvider(deltas=20, delay_s=1)
    rng = random.Random(7)
    seen: list[list[SseEvent]] = []
    async with open_fake_gateway(provider, jobs={"subscriber_buffer": 2}) as gateway:
        job_id = (await post(gateway.url, {"x-bf-async": "true"})).job_id

        async def reader(after_s: float, own: random.Random) -> None:
            await trio.sleep(after_s)
            seen.append(await read_over_http(gateway.url, job_id, own))

        async with trio.open_nursery() as nursery:
            for number in range(30):
                nursery.start_soon(reader, rng.choice([0.25, 3.5, 10, 21, 40]), random.Random(number))
    wanted = [frame.event for frame in whole_stream(20)]
    assert len(seen) == 30
    for events in seen:
        assert [event.id for event in events] == [f"1-{number + 1}" for number in range(25)]
        assert [event.event for event in events] == wanted
    assert len(provider.calls) == 1


async def test_a_cursor_beyond_what_was_received_is_refused(http_clock: MockClock) -> None:
    async with open_fake_gateway(FakeProvider(stall_at="mid_stream")) as gateway:
        job_id = (await post(gateway.url, {"x-bf-async": "true"})).job_id
        for cursor in ("1-99", "2-1", "0-5"):
            async with start(
                gateway.url, "GET", f"/v1/jobs/{job_id}/stream", {"last-event-id": cursor}
            ) as call:
                answer = await call.answer()
            assert (answer.status, answer.error_type) == (409, "conflict_error")
        await gateway.supervisor.cancel(job_id, None, by="test")
