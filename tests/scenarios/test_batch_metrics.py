"""Every item of a batch is counted among the jobs that ended, once, whether it was run or not."""

import re
from typing import Any

import trio
from trio.testing import MockClock

from service.main import Gateway
from tests.scenarios.restarts import Place, place
from tests.support.gateway import BODY, open_fake_gateway, request
from tests.support.providers import FakeProvider

__all__ = ["place"]

PATH = "/v1/messages/batches"
SLOTS = {"max_running_per_batch": 2}
LIFETIME_S = 86_400


async def create(gateway: Gateway, *changes: dict[str, Any]) -> str:
    items = [{"custom_id": str(n), "params": {**BODY, **one}} for n, one in enumerate(changes)]
    answer = await request(gateway.url, "POST", PATH, {}, {"requests": items})
    assert answer.status == 200
    return str(answer.json["id"])


async def until_ended(gateway: Gateway, batch_id: str) -> None:
    with trio.fail_after(60):
        while (await request(gateway.url, "GET", f"{PATH}/{batch_id}")).json["ended_at"] is None:  # noqa: ASYNC110 - as clients do
            await trio.sleep(0.05)


async def counted(gateway: Gateway) -> dict[str, float]:
    """Items ended, by status."""
    text = (await request(gateway.url, "GET", "/metrics")).body.decode()
    found = re.findall(r'^messagesd_jobs_total\{mode="batch",status="(\w+)"\} (\S+)$', text, re.MULTILINE)
    return {status: float(number) for status, number in found if float(number)}


async def test_items_that_were_cancelled_or_refused_before_their_turn(http_clock: MockClock) -> None:
    fake = FakeProvider(stall_at="connect")
    async with open_fake_gateway(fake, batches=SLOTS, routes=[{"model": "m", "provider": "fake"}]) as gateway:
        # One is no request, one leads nowhere.
        batch_id = await create(gateway, {"messages": []}, {"model": "x"}, *[{}] * 5)
        await fake.until_called(2)
        assert await counted(gateway) == {"failed": 2}
        jobs = (await request(gateway.url, "GET", "/v1/jobs")).json["data"]
        waiting = next(job["id"] for job in jobs if job["status"] == "pending")
        assert (await request(gateway.url, "POST", f"/v1/jobs/{waiting}/cancel")).status == 200
        assert await counted(gateway) == {"failed": 2, "cancelled": 1}
        await request(gateway.url, "POST", f"{PATH}/{batch_id}/cancel")
        await until_ended(gateway, batch_id)
        assert await counted(gateway) == {"failed": 2, "cancelled": 5}


async def test_items_whose_time_was_up(place: Place) -> None:
    fake = FakeProvider(stall_at="connect")
    async with place.life(fake, crash=True, batches=SLOTS) as gateway:
        batch_id = await create(gateway, *[{}] * 5)
        await fake.until_called(2)
    place.wall_s += LIFETIME_S + 1
    async with place.life(fake, batches=SLOTS) as gateway:
        await until_ended(gateway, batch_id)
        assert await counted(gateway) == {"cancelled": 5}


async def test_items_that_a_restart_ends(place: Place) -> None:
    fake = FakeProvider(stall_at="connect")
    async with place.life(fake, crash=True, batches=SLOTS) as gateway:
        batch_id = await create(gateway, *[{}] * 5)
        await fake.until_called(2)
    # The two that were cut off have no attempt left; the others lead nowhere any more.
    routes = [{"model": "other", "provider": "fake"}]
    async with place.life(batches=SLOTS, jobs={"max_attempts": 1}, routes=routes) as gateway:
        await until_ended(gateway, batch_id)
        assert await counted(gateway) == {"failed": 5}
