"""Deliveries over restarts, drains and full disks: at least once, and never another one."""

import pytest
import trio
from trio.testing import MockClock

from actors.webhooks.announcer import Announcer
from actors.webhooks.client import Outcome
from actors.webhooks.endpoint import Endpoint
from actors.webhooks.store import DeliveryStore
from events.errors import CodecError, UnknownJobError
from events.state import JobState
from service.main import Gateway
from tests.scenarios.restarts import Place, no_writes, place, result, submit, until_logged
from tests.scenarios.webhooks import closed, deliveries, redeliver
from tests.support.gateway import open_fake_gateway, request
from tests.support.providers import PATIENCE_S, FakeProvider
from tests.support.receiver import STALL, open_receiver

__all__ = ["place"]

HOOK = "x_bf_async_webhook"


async def hooked(gateway: Gateway) -> str:
    return await submit(gateway, **{HOOK: "hook"})


def cut_off_before_its_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the process died between a job's end and its delivery's first event."""
    monkeypatch.setattr(Announcer, "owe", lambda *_: None)


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a file the clock is the real one, and what takes a while must not."""
    for name in (
        "announcer.RETRY_S",
        "delivery.COMMIT_RETRY_S",
        "webhooks.FORGET_INTERVAL_S",
    ):
        monkeypatch.setattr(f"actors.webhooks.{name}", 0.02)
    monkeypatch.setattr("actors.expiry.PURGE_INTERVAL_S", 0.02)


# --- restarts -----------------------------------------------------------------------------------------


async def test_a_kill_between_a_jobs_end_and_its_delivery_loses_nothing(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_receiver() as receiver:
        with monkeypatch.context() as patch:
            cut_off_before_its_record(patch)
            async with place.life(crash=True, webhooks=[receiver.table()]) as gateway:
                jobs = [await hooked(gateway) for _ in range(3)]
                for job_id in jobs:
                    assert (await result(gateway, job_id)).status == 200
                await submit(gateway)
                assert await deliveries(gateway) == []
        async with place.life(crash=True, webhooks=[receiver.table()]) as gateway:
            told = await closed(gateway, 3)
            assert await gateway.log.records.unannounced("delivery", 10) == []
        assert [one["status"] for one in told] == ["delivered"] * 3
        async with place.life(webhooks=[receiver.table()]) as gateway:
            assert await deliveries(gateway) == told
            assert gateway.dependencies.webhooks.waiting == 0
    assert sorted(heard.body["data"]["job_id"] for heard in receiver.heard) == sorted(jobs)


async def test_the_news_outlives_the_result(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was deleted, or ended by a restart, is told all the same."""
    provider = FakeProvider(stall_at="first_frame")
    async with open_receiver() as receiver:
        with monkeypatch.context() as patch:
            cut_off_before_its_record(patch)
            async with place.life(crash=True, webhooks=[receiver.table()]) as gateway:
                done = await hooked(gateway)
                await result(gateway, done)
                await request(gateway.url, "DELETE", f"/v1/jobs/{done}")
            async with place.life(provider, crash=True, webhooks=[receiver.table()]) as gateway:
                interrupted = await submit(gateway, **{HOOK: "hook"}, x_bf_async_retry="never")
                await provider.stalled.wait()
        async with place.life(webhooks=[receiver.table()]) as gateway:
            await closed(gateway, 2)
    told = {heard.body["data"]["job_id"]: heard.body["event"] for heard in receiver.heard}
    assert told == {done: "async_job.completed", interrupted: "async_job.failed"}


async def test_a_retry_is_due_when_it_was(place: Place) -> None:
    async with open_receiver(500, 200) as receiver:
        async with place.life(crash=True, webhooks=[receiver.table()]) as gateway:
            await hooked(gateway)
            await until_logged(place, "webhook.retry")
            (waiting,) = await deliveries(gateway)
        place.wall_s += 10
        async with place.life(crash=True, webhooks=[receiver.table()]) as gateway:
            await until_logged(place, "webhook.taken_up")
            assert await deliveries(gateway) == [waiting]
            assert len(receiver.heard) == 1
        place.wall_s += 25
        async with place.life(webhooks=[receiver.table()]) as gateway:
            (delivered,) = await closed(gateway)
    assert (delivered["status"], delivered["attempts"]) == ("delivered", 2)
    first, second = receiver.heard
    assert (first.id, first.raw) == (second.id, second.raw)
    assert second.timestamp - first.timestamp >= 30


async def test_a_try_that_was_cut_off_is_made_again(place: Place) -> None:
    async with open_receiver(STALL, 200) as receiver:
        async with place.life(crash=True, webhooks=[receiver.table()]) as gateway:
            await hooked(gateway)
            await receiver.until(1)
        async with place.life(webhooks=[receiver.table()]) as gateway:
            (delivered,) = await closed(gateway)
    # The log does not know of the first.
    assert (delivered["status"], delivered["attempts"], len(receiver.heard)) == ("delivered", 1, 2)


async def test_an_endpoint_that_is_gone_is_told_when_it_is_back_and_somebody_asks(place: Place) -> None:
    async with open_receiver(500, 200) as receiver:
        async with place.life(crash=True, webhooks=[receiver.table()]) as gateway:
            await hooked(gateway)
            await until_logged(place, "webhook.retry")
        async with place.life(webhooks=[receiver.table(enabled=False)]) as gateway:
            (skipped,) = await closed(gateway)
            assert (skipped["status"], skipped["last_status_code"]) == ("skipped", 500)
            assert (await redeliver(gateway, skipped["id"])).status == 409
        async with place.life(webhooks=[receiver.table()]) as gateway:
            assert await deliveries(gateway) == [skipped]
            assert (await redeliver(gateway, skipped["id"])).status == 200
            (delivered,) = await closed(gateway)
    assert (delivered["status"], len(receiver.heard)) == ("delivered", 2)


async def test_a_job_that_runs_again_after_a_kill_is_told_once(place: Place) -> None:
    provider = FakeProvider(stall_at="mid_stream")
    async with open_receiver() as receiver:
        async with place.life(provider, crash=True, webhooks=[receiver.table()]) as gateway:
            job_id = await hooked(gateway)
            await provider.stalled.wait()
        async with place.life(webhooks=[receiver.table()]) as gateway:
            await closed(gateway)
    (heard,) = receiver.heard
    assert (heard.body["data"]["job_id"], heard.body["data"]["status"]) == (job_id, "completed")


# --- drains -------------------------------------------------------------------------------------------


async def test_a_drain_waits_for_what_is_under_way(place: Place) -> None:
    provider = FakeProvider(stall_at="mid_stream")
    async with open_receiver(STALL) as receiver, trio.open_nursery() as nursery:

        async def go_on() -> None:
            """The job ends while the gateway drains, its delivery begins then, and both have their time."""
            await until_logged(place, "drain.started")
            provider.release.set()
            await receiver.until(1)
            receiver.release.set()

        async with place.life(provider, webhooks=[receiver.table()]) as gateway:
            await hooked(gateway)
            await provider.stalled.wait()
            nursery.start_soon(go_on)
        async with place.life(webhooks=[receiver.table()]) as gateway:
            (delivered,) = await deliveries(gateway)
    assert (delivered["status"], delivered["attempts"]) == ("delivered", 1)


@pytest.mark.parametrize("answer", [500, STALL])
async def test_a_drain_leaves_the_rest_to_the_next_start(answer: int, place: Place) -> None:
    # What waits for a later try does not hold the drain up; what is under way has until its end.
    jobs = {"drain_s": 0.2 if answer == STALL else 1000}
    async with open_receiver(answer, 200) as receiver:
        async with place.life(webhooks=[receiver.table()], jobs=jobs) as gateway:
            await hooked(gateway)
            await receiver.until(1)
        assert '"webhook.left"' in place.lines.getvalue()
        place.wall_s += 35
        async with place.life(webhooks=[receiver.table()]) as gateway:
            (delivered,) = await closed(gateway)
    assert delivered["status"] == "delivered"
    assert len(receiver.heard) == 2


# --- trouble ------------------------------------------------------------------------------------------


async def test_what_came_of_a_try_is_recorded_once_the_disk_takes_it(place: Place) -> None:
    async with open_receiver() as receiver, place.life(webhooks=[receiver.table()]) as gateway:
        await hooked(gateway)
        (first,) = await closed(gateway)
        receiver.answers = [STALL]
        await redeliver(gateway, first["id"])
        await receiver.until(2)
        with no_writes(gateway):
            receiver.release.set()
            await until_logged(place, "webhook.commit_delayed", times=2)
        (delivered,) = await closed(gateway)
        assert (delivered["status"], delivered["attempts"]) == ("delivered", 2)
    assert len(receiver.heard) == 2


async def test_a_delivery_is_recorded_once_the_disk_takes_it(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_receiver() as receiver, place.life(webhooks=[receiver.table()]) as gateway:
        owe = Announcer.owe
        owed = trio.Event()
        with monkeypatch.context() as patch:
            patch.setattr(Announcer, "owe", lambda *_: owed.set())
            job_id = await hooked(gateway)
            await owed.wait()
        with no_writes(gateway):
            owe(gateway.dependencies.webhooks._announcer, job_id)
            await until_logged(place, "webhook.record_delayed", times=2)
            assert gateway.dependencies.webhooks.waiting == 1
        (delivered,) = await closed(gateway)
    assert delivered["status"] == "delivered"


async def test_a_crash_of_one_try_is_a_try_without_an_answer(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    post = Endpoint.post
    crashed: list[str] = []

    async def crashing(endpoint: Endpoint, message_id: str, body: str, *, at: float) -> Outcome:
        if not crashed or message_id in crashed:
            crashed.append(message_id)
            raise RuntimeError("as if by a bug")
        return await post(endpoint, message_id, body, at=at)

    monkeypatch.setattr(Endpoint, "post", crashing)
    async with open_receiver() as receiver:
        table = receiver.table(backoff_s=0.01, max_retries=2)
        async with place.life(webhooks=[table]) as gateway:
            await hooked(gateway)
            await until_logged(place, "webhook.crashed")
            await hooked(gateway)
            told = await closed(gateway, 2)
    assert [(one["status"], one["attempts"]) for one in told] == [("delivered", 1), ("failed", 3)]
    assert told[1]["last_error"] == "the gateway failed while it made this try"
    assert len(crashed) == 3


async def test_a_delivery_that_is_damaged_is_left(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    async def damaged(*_: object) -> None:
        raise CodecError("a stored delivery is damaged")

    async with open_receiver() as receiver, place.life(webhooks=[receiver.table()]) as gateway:
        with monkeypatch.context() as patch:
            patch.setattr(DeliveryStore, "get", damaged)
            await hooked(gateway)
            await until_logged(place, "webhook.stuck")
        await hooked(gateway)
        newest, stuck = await closed(gateway)
    assert (newest["status"], stuck["status"], len(receiver.heard)) == ("delivered", "pending", 1)


async def test_too_many_waiting_deliveries_are_told_to_the_next_who_asks(http_clock: MockClock) -> None:
    async with open_receiver(500) as receiver, open_fake_gateway(webhooks=[receiver.table()]) as gateway:
        gateway.dependencies.webhooks._max_waiting = 1
        await hooked(gateway)
        await receiver.until(1)
        with pytest.raises(AssertionError, match="overloaded_error"):
            await hooked(gateway)
        await submit(gateway)


# --- how long they are kept ---------------------------------------------------------------------------


async def test_a_delivery_is_not_forgotten_before_its_job(place: Place) -> None:
    """Or a start would find an ended job that nobody was told of."""
    place.log = {"history_s": 100}
    async with open_receiver() as receiver:
        async with place.life(webhooks=[receiver.table()]) as gateway:
            await submit(gateway, **{HOOK: "hook"}, x_bf_async_job_result_ttl="50")
            (delivered,) = await closed(gateway)
        # The result has been gone for long, but only this start records it: the job's time begins now.
        place.wall_s += 200
        async with place.life(crash=True, webhooks=[receiver.table()]) as gateway:
            job_id = delivered["job_id"]
            while (await gateway.log.snapshot(job_id)).state is not JobState.EXPIRED:  # noqa: ASYNC110 - nothing tells
                await trio.sleep(0.01)
            (spent,) = await gateway.log.records.due("delivery", place.wall_s, 10)
            # Time for a look or two.
            await trio.sleep(0.05)
            assert await gateway.log.records.get(spent.record_id) == spent
        place.wall_s += 200
        async with place.life(webhooks=[receiver.table()]) as gateway:
            with trio.fail_after(PATIENCE_S):
                while await gateway.log.records.due("delivery", place.wall_s, 10):  # noqa: ASYNC110 - nothing tells
                    await trio.sleep(0.01)
            with pytest.raises(UnknownJobError):
                await gateway.log.snapshot(job_id)
    assert len(receiver.heard) == 1


async def test_in_memory_it_goes_after_its_jobs_result(http_clock: MockClock) -> None:
    async with open_receiver() as receiver, open_fake_gateway(webhooks=[receiver.table()]) as gateway:
        await submit(gateway, **{HOOK: "hook"}, x_bf_async_job_result_ttl="1")
        (delivered,) = await closed(gateway)
        assert (await gateway.log.records.get(delivered["id"])).last_seq == 2
        await trio.sleep(1.1)
        assert await deliveries(gateway) == []
