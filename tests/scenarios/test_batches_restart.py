"""Batches over a durable log: what a crash, or a shutdown, in the middle leaves, and what becomes of it."""

from typing import Any

import pytest
import trio

from actors.batch_upload import BatchItem, UploadTerms
from events.batches import ItemCounts
from events.log.sqlite import SqliteLog
from service.main import Gateway
from tests.scenarios.restarts import Place, Recorder, asks, event_kinds, place
from tests.support.gateway import request
from tests.support.providers import FakeProvider
from tests.support.scripted import says

__all__ = ["place"]

PATH = "/v1/messages/batches"
SLOTS = {"max_running_per_batch": 2}
DAY_S = 86_400.0


async def create(gateway: Gateway, count: int) -> str:
    items = [{"custom_id": str(number), "params": asks(str(number))} for number in range(count)]
    answer = await request(gateway.url, "POST", PATH, {}, {"requests": items})
    assert answer.status == 200
    return str(answer.json["id"])


async def look(gateway: Gateway, batch_id: str) -> dict[str, Any]:
    batch: dict[str, Any] = (await request(gateway.url, "GET", f"{PATH}/{batch_id}")).json
    return batch


async def ended(gateway: Gateway, batch_id: str) -> dict[str, int]:
    with trio.fail_after(20):
        while (batch := await look(gateway, batch_id))["processing_status"] != "ended":  # noqa: ASYNC110 - as clients do
            await trio.sleep(0.02)
    counts: dict[str, int] = {name: count for name, count in batch["request_counts"].items() if count}
    return counts


async def test_a_batch_goes_on_where_it_was(place: Place) -> None:
    fake = Recorder(stall_at="mid_stream")
    async with place.life(fake, crash=True, batches=SLOTS) as gateway:
        batch_id = await create(gateway, 6)
        await fake.until_called(2)
        assert isinstance(gateway.log, SqliteLog)
        assert len(gateway.log._live) == 2
    fake = Recorder(stall_at="connect")
    async with place.life(fake, crash=True, batches=SLOTS) as gateway:
        assert (await look(gateway, batch_id))["request_counts"]["processing"] == 6
        await fake.until_called(2)
    again = Recorder()
    async with place.life(again, batches=SLOTS) as gateway:
        assert await ended(gateway, batch_id) == {"succeeded": 6}
        assert sorted(again.asked) == [str(number) for number in range(6)]
        first = (await request(gateway.url, "GET", "/v1/jobs")).json["data"][-1]
        assert first["attempts"] == 3
        kinds = await event_kinds(gateway, first["id"])
        assert kinds.count("AttemptStarted") == 3
        assert kinds.count("AttemptFailed") == 2
        assert kinds[-1] == "JobCompleted"
    async with place.life(batches=SLOTS) as gateway:
        assert await ended(gateway, batch_id) == {"succeeded": 6}


async def test_an_item_cut_off_in_each_of_its_attempts_is_errored(place: Place) -> None:
    jobs = {"max_attempts": 2}
    for _ in range(2):
        fake = FakeProvider(stall_at="mid_stream")
        async with place.life(fake, crash=True, batches={"max_running_per_batch": 1}, jobs=jobs) as gateway:
            if not (batches := (await request(gateway.url, "GET", PATH)).json["data"]):
                await create(gateway, 2)
            await fake.until_called(1)
    async with place.life(jobs=jobs) as gateway:
        assert await ended(gateway, batches[0]["id"]) == {"succeeded": 1, "errored": 1}


async def test_a_shutdown_leaves_what_has_not_ended_for_the_next_start(place: Place) -> None:
    fake = FakeProvider(stall_at="mid_stream")
    async with place.life(fake, batches=SLOTS, jobs={"drain_s": 0}) as gateway:
        batch_id = await create(gateway, 4)
        await fake.until_called(2)
    async with place.life(batches=SLOTS) as gateway:
        assert await ended(gateway, batch_id) == {"succeeded": 4}


async def test_items_that_no_route_leads_anywhere_any_more_are_errored(place: Place) -> None:
    fake = FakeProvider(stall_at="mid_stream")
    async with place.life(fake, crash=True, batches=SLOTS) as gateway:
        batch_id = await create(gateway, 4)
        await fake.until_called(2)
    async with place.life(batches=SLOTS, routes=[{"model": "other", "provider": "fake"}]) as gateway:
        assert await ended(gateway, batch_id) == {"errored": 4}


async def until_held_up(gateway: Gateway, held_up: str) -> None:
    """Until two items wait between two attempts, or one works and another waits in its provider's line."""
    with trio.fail_after(10):
        while True:
            jobs = (await request(gateway.url, "GET", "/v1/jobs")).json["data"]
            kinds = [await event_kinds(gateway, job["id"]) for job in jobs]
            if held_up == "backoff" and sum("AttemptFailed" in one for one in kinds) == 2:
                return
            (provider,) = gateway.dependencies.targets.providers()
            if held_up == "line" and (provider.working, provider.waiting) == (1, 1):
                return


@pytest.mark.parametrize("end", ["canceled", "expired", "succeeded"])
@pytest.mark.parametrize("leave", ["crash", "drain"])
@pytest.mark.parametrize("held_up", ["backoff", "line"])
async def test_items_that_are_held_up_end_as_the_others_do(
    held_up: str, leave: str, end: str, place: Place
) -> None:
    def stuck() -> FakeProvider:
        later = says(529, retry_after="25")
        return (
            FakeProvider(raise_at={"connect": later})
            if held_up == "backoff"
            else FakeProvider(stall_at="connect")
        )

    sections: dict[str, Any] = {
        "batches": SLOTS,
        # Longer than this test may take: who is between two attempts is left at once.
        "jobs": {"drain_s": 20 if held_up == "backoff" else 0},
        "providers": [{"name": "fake", "kind": "echo", "max_concurrency": 1}],
    }
    with trio.fail_after(10):
        async with place.life(stuck(), crash=leave == "crash", **sections) as gateway:
            batch_id = await create(gateway, 5)
            await until_held_up(gateway, held_up)
            assert (await look(gateway, batch_id))["request_counts"]["processing"] == 5
        # What was waited for is over then.
        place.wall_s += DAY_S + 1 if end == "expired" else 25
        again = FakeProvider() if end == "succeeded" else stuck()
        async with place.life(again, **sections) as gateway:
            if end == "canceled":
                await until_held_up(gateway, held_up)
                assert (await look(gateway, batch_id))["request_counts"]["processing"] == 5
                await request(gateway.url, "POST", f"{PATH}/{batch_id}/cancel")
            assert await ended(gateway, batch_id) == {end: 5}
            assert gateway.supervisor.in_flight == 0
            (provider,) = gateway.dependencies.targets.providers()
            assert (provider.working, provider.waiting) == (0, 0)


async def test_a_cancel_is_remembered(place: Place) -> None:
    fake = FakeProvider(stall_at="mid_stream")
    async with place.life(fake, crash=True, batches=SLOTS) as gateway:
        batch_id = await create(gateway, 5)
        await fake.until_called(2)
        canceling = await request(gateway.url, "POST", f"{PATH}/{batch_id}/cancel")
        assert canceling.json["processing_status"] == "canceling"
    fake = FakeProvider()
    async with place.life(fake, batches=SLOTS) as gateway:
        assert await ended(gateway, batch_id) == {"canceled": 5}
    assert fake.calls == []


async def test_what_expired_while_nobody_was_there_has_expired(place: Place) -> None:
    fake = FakeProvider(stall_at="mid_stream")
    async with place.life(fake, crash=True, batches=SLOTS) as gateway:
        batch_id = await create(gateway, 3)
        await fake.until_called(2)
    place.wall_s += DAY_S + 1
    async with place.life(fake, batches=SLOTS) as gateway:
        assert await ended(gateway, batch_id) == {"expired": 3}
    assert len(fake.calls) == 2


async def test_an_upload_cut_off_leaves_no_batch(place: Place) -> None:
    async with place.life(crash=True) as gateway:
        async with gateway.dependencies.batches.open_upload(UploadTerms(owner="", request_id="r")) as upload:
            for number in range(300):
                await upload.add(BatchItem(custom_id=str(number), body=b"{}", model="m"))
            place.kill()
            with pytest.raises(trio.Cancelled):
                await trio.lowlevel.checkpoint()
        assert not upload.committed
    async with place.life() as gateway:
        with trio.fail_after(10):
            while await gateway.log.items.counts(upload.batch_id) != ItemCounts():  # noqa: ASYNC110 - as clients do
                await trio.sleep(0.01)
        assert (await request(gateway.url, "GET", PATH)).json["data"] == []


async def test_results_outlive_restarts_until_their_time_is_up(place: Place) -> None:
    keep = {"result_ttl_s": 100.0}
    async with place.life(crash=True, batches=keep) as gateway:
        batch_id = await create(gateway, 3)
        await ended(gateway, batch_id)
        before = (await request(gateway.url, "GET", f"{PATH}/{batch_id}/results")).body
    place.wall_s += 50
    async with place.life(crash=True, batches=keep) as gateway:
        assert (await request(gateway.url, "GET", f"{PATH}/{batch_id}/results")).body == before
    place.wall_s += 51
    async with place.life(batches=keep) as gateway:
        with trio.fail_after(10):
            while (await request(gateway.url, "GET", f"{PATH}/{batch_id}")).status != 404:  # noqa: ASYNC110 - as clients do
                await trio.sleep(0.02)
            while await gateway.log.items.counts(batch_id) != ItemCounts():  # noqa: ASYNC110 - as clients do
                await trio.sleep(0.01)
