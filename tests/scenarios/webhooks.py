"""What scenarios of webhooks ask a gateway."""

from datetime import datetime
from typing import Any

import trio

from service.main import Gateway
from tests.support.gateway import Answer, post, request
from tests.support.receiver import Heard

HOOK = {"x-bf-async": "true", "x-bf-async-webhook": "hook"}


async def submit(gateway: Gateway, **headers: str) -> str:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    answer = await post(gateway.url, HOOK | named)
    assert answer.status == 200, answer.body
    return answer.job_id


async def deliveries(gateway: Gateway, query: str = "") -> list[dict[str, Any]]:
    answer = await request(gateway.url, "GET", f"/v1/webhooks/deliveries{query}")
    assert answer.status == 200, answer.body
    found: list[dict[str, Any]] = answer.json["data"]
    return found


async def closed(gateway: Gateway, count: int = 1) -> list[dict[str, Any]]:
    """The deliveries, once so many of them are closed."""
    pause_s = 0.05
    while True:
        found = await deliveries(gateway)
        if sum(one["status"] != "pending" for one in found) >= count:
            return found
        # Virtual time: what is looked at is when the calls came, not when this looked.
        await trio.sleep(pause_s)
        pause_s *= 1.5


def moment(delivery: dict[str, Any], name: str) -> float:
    return datetime.fromisoformat(delivery[name]).timestamp()


def times(heard: list[Heard]) -> list[float]:
    """When each call came, from the first on, to a tenth."""
    return [round(one.at - heard[0].at, 1) for one in heard]


async def redeliver(gateway: Gateway, delivery_id: str) -> Answer:
    return await request(gateway.url, "POST", f"/v1/webhooks/deliveries/{delivery_id}/redeliver")
