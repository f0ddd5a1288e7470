"""Endpoints are told how jobs end: what they hear, when, and how often."""

import socket
from datetime import datetime
from typing import Any

import pytest
import trio
from standardwebhooks.webhooks import Webhook
from trio.testing import MockClock

from actors.errors import UpstreamStatusError
from tests.fake_upstream import Exchange, open_upstream
from tests.scenarios.webhooks import closed, deliveries, moment, submit, times
from tests.support.gateway import BODY, open_fake_gateway, post, request
from tests.support.providers import FakeProvider
from tests.support.receiver import OTHER_SECRET, SECRET, STALL, Receiver, open_receiver

# --- what they hear ---------------------------------------------------------------------------------


async def test_the_end_of_a_job_is_told(http_clock: MockClock) -> None:
    async with (
        open_receiver() as receiver,
        open_fake_gateway(
            webhooks=[receiver.table()], server={"port": 0, "public_url": "https://gw.test/x/"}
        ) as gateway,
    ):
        job_id = await submit(gateway, x_bf_async_job_result_ttl="90")
        (heard,) = await receiver.until(1)
        job = (await request(gateway.url, "GET", f"/v1/jobs/{job_id}")).json
        assert heard.body == {
            "event": "async_job.completed",
            "created_at": heard.body["created_at"],
            "data": {
                "job_id": job_id,
                "request_type": "messages",
                "status": "completed",
                "status_code": 200,
                "result_url": f"https://gw.test/x/v1/jobs/{job_id}/result",
                "result_expires_at": job["expires_at"],
            },
        }
        assert datetime.fromisoformat(heard.body["created_at"]) >= datetime.fromisoformat(job["ended_at"])
        (delivery,) = await closed(gateway)
        assert delivery == {
            "id": heard.id,
            "type": "webhook_delivery",
            "status": "delivered",
            "endpoint": "hook",
            "event": "async_job.completed",
            "job_id": job_id,
            "owner": "",
            "created_at": heard.body["created_at"],
            "attempts": 1,
            "next_attempt_at": None,
            "ended_at": delivery["ended_at"],
            "last_status_code": 200,
            "last_error": None,
        }
        metrics = (await request(gateway.url, "GET", "/metrics")).body.decode()
    assert 'messagesd_webhook_tries_total{endpoint="hook",outcome="delivered"} 1.0' in metrics
    assert "messagesd_webhook_deliveries_waiting 0.0" in metrics
    assert len(receiver.heard) == 1


async def test_without_a_public_url_the_result_is_at_a_path_whatever_host_was_asked(
    http_clock: MockClock,
) -> None:
    async with open_receiver() as receiver, open_fake_gateway(webhooks=[receiver.table()]) as gateway:
        job_id = await submit(gateway, host="evil.test")
        (heard,) = await receiver.until(1)
        url = heard.body["data"]["result_url"]
        assert url == f"/v1/jobs/{job_id}/result"
        result = await request(gateway.url, "GET", url)
        polled = await post(gateway.url, {"x-bf-async-id": job_id})
    assert (result.status, result.body) == (polled.status, polled.body)
    assert result.json["content"][0]["text"] == "1 2 3 "
    assert result.headers["x-bf-async-status"] == "completed"


async def test_every_secret_signs(http_clock: MockClock) -> None:
    signatures: list[str] = []

    async def notes(exchange: Exchange) -> None:
        headers = exchange.request.headers
        for secret in (SECRET, OTHER_SECRET):
            # As a receiver does it; no virtual time has passed.
            Webhook(secret).verify(exchange.request.body, headers)
        signatures.append(headers["webhook-signature"])
        await exchange.send(b"HTTP/1.1 204 X\r\n\r\n")

    async with open_upstream(notes) as upstream:
        table = Receiver([200], upstream=upstream).table(secrets=[SECRET, OTHER_SECRET])
        async with open_fake_gateway(webhooks=[table]) as gateway:
            await submit(gateway)
            await closed(gateway)
    assert [len(text.split(" ")) for text in signatures] == [2]


async def test_failures_and_cancellations_are_told(http_clock: MockClock) -> None:
    error = UpstreamStatusError("busy", status=529, error_type="overloaded_error")
    provider = FakeProvider(raise_at={"connect": error})
    async with open_receiver() as receiver:
        async with open_fake_gateway(provider, webhooks=[receiver.table()]) as gateway:
            await submit(gateway)
            await receiver.until(1)
        async with open_fake_gateway(
            FakeProvider(stall_at="connect"), webhooks=[receiver.table()]
        ) as gateway:
            job_id = await submit(gateway)
            await request(gateway.url, "POST", f"/v1/jobs/{job_id}/cancel")
            await receiver.until(2)
    told = [
        (h.body["event"], h.body["data"]["status"], h.body["data"]["status_code"]) for h in receiver.heard
    ]
    assert told == [("async_job.failed", "failed", 529), ("async_job.cancelled", "cancelled", 409)]


@pytest.mark.parametrize(
    ("headers", "fields"),
    [
        ({"x-bf-detach": "true"}, {}),
        ({"x-bf-detach": "true"}, {"stream": True}),
        ({"idempotency-key": "k"}, {}),
    ],
)
async def test_detached_calls_may_have_a_webhook(
    headers: dict[str, str], fields: dict[str, Any], http_clock: MockClock
) -> None:
    async with open_receiver() as receiver, open_fake_gateway(webhooks=[receiver.table()]) as gateway:
        answer = await post(gateway.url, {"x-bf-async-webhook": "hook", **headers}, **fields)
        assert answer.status == 200
        (heard,) = await receiver.until(1)
        assert heard.body["data"]["job_id"] == answer.job_id


async def test_what_is_refused() -> None:
    async with open_receiver() as receiver:
        tables = [receiver.table(), receiver.table("off", enabled=False)]
        async with open_fake_gateway(webhooks=tables) as gateway:

            async def refusal(path: str = "/v1/messages", **headers: str) -> str:
                named = {name.replace("_", "-"): value for name, value in headers.items()}
                answer = await request(gateway.url, "POST", path, named, BODY)
                assert (answer.status, answer.error_type) == (400, "invalid_request_error")
                return str(answer.json["error"]["message"])

            asynchronous = {"x_bf_async": "true"}
            assert "named 'nobody'" in await refusal(x_bf_async_webhook="nobody", **asynchronous)
            assert "named ''" in await refusal(x_bf_async_webhook="", **asynchronous)
            assert "'off' is disabled" in await refusal(x_bf_async_webhook="off", **asynchronous)
            url = "http://hooks.example.com/"
            assert "no webhook endpoint" in await refusal(x_bf_async_webhook=url, **asynchronous)
            assert "outlives its connection" in await refusal(x_bf_async_webhook="hook")
            assert "outlives its connection" in await refusal(x_bf_async_webhook="hook", prefer="wait=1")
            counting = "/v1/messages/count_tokens"
            assert "only POST /v1/messages" in await refusal(counting, x_bf_async_webhook="hook")
            assert await gateway.log.unfinished() == []
    assert receiver.heard == []


async def test_an_endpoint_hears_of_the_events_it_takes(http_clock: MockClock) -> None:
    async with open_receiver() as receiver:
        table = receiver.table(events=["async_job.failed"])
        async with open_fake_gateway(webhooks=[table]) as gateway:
            await submit(gateway)
            (delivery,) = await closed(gateway)
    assert (delivery["status"], delivery["attempts"]) == ("skipped", 0)
    assert delivery["last_error"] == "the endpoint does not take this event"
    assert receiver.heard == []


# --- when, and how often ------------------------------------------------------------------------------


async def test_tries_are_doubled_apart_and_end(http_clock: MockClock) -> None:
    async with open_receiver(500) as receiver, open_fake_gateway(webhooks=[receiver.table()]) as gateway:
        await submit(gateway)
        await receiver.until(1)
        (waiting,) = await deliveries(gateway)
        assert (waiting["status"], waiting["attempts"], waiting["last_status_code"]) == ("pending", 1, 500)
        (delivery,) = await closed(gateway)
        await trio.sleep(1_000)
    assert times(receiver.heard) == [0, 30, 90, 210, 450]
    assert (delivery["status"], delivery["attempts"]) == ("failed", 5)
    assert delivery["last_error"] == "it answered 500"
    assert len({heard.id for heard in receiver.heard}) == 1
    assert len({heard.raw for heard in receiver.heard}) == 1
    first = receiver.heard[0].timestamp
    assert [h.timestamp - first for h in receiver.heard] == pytest.approx([0, 30, 90, 210, 450], abs=1)


@pytest.mark.parametrize("status", [408, 503])
async def test_these_answers_bring_another_try(status: int, http_clock: MockClock) -> None:
    async with (
        open_receiver(status, 204) as receiver,
        open_fake_gateway(webhooks=[receiver.table()]) as gateway,
    ):
        await submit(gateway)
        (delivery,) = await closed(gateway)
    assert (delivery["status"], delivery["attempts"]) == ("delivered", 2)
    assert times(receiver.heard) == [0, 30]


@pytest.mark.parametrize("status", [302, 410])
async def test_these_do_not(status: int, http_clock: MockClock) -> None:
    async with (
        open_receiver(status, headers="location: http://127.0.0.1:1/\r\n") as receiver,
        open_fake_gateway(webhooks=[receiver.table()]) as gateway,
    ):
        await submit(gateway)
        (delivery,) = await closed(gateway)
        await trio.sleep(1_000)
    assert (delivery["status"], delivery["attempts"]) == ("failed", 1)
    assert delivery["last_error"] == f"it answered {status}"
    assert len(receiver.heard) == 1


@pytest.mark.parametrize(("asked", "pause_s"), [("5", 30), ("100", 100)])
async def test_retry_after_may_make_the_pause_longer(
    asked: str, pause_s: float, http_clock: MockClock
) -> None:
    async with (
        open_receiver(429, 200, headers=f"retry-after: {asked}\r\n") as receiver,
        open_fake_gateway(webhooks=[receiver.table()]) as gateway,
    ):
        await submit(gateway)
        await closed(gateway)
    assert times(receiver.heard) == [0, pause_s]


async def test_an_endpoint_that_cannot_be_reached_is_tried_again(http_clock: MockClock) -> None:
    async with open_receiver() as receiver:
        table = receiver.table(max_retries=1, backoff_s=5)
    async with open_fake_gateway(webhooks=[table]) as gateway:
        await submit(gateway)
        (delivery,) = await closed(gateway)
    assert moment(delivery, "ended_at") - moment(delivery, "created_at") == pytest.approx(5, abs=0.1)
    assert (delivery["attempts"], delivery["last_error"]) == (2, "no connection")
    assert delivery["last_status_code"] is None


async def test_a_try_has_ten_seconds(http_clock: MockClock) -> None:
    async with (
        open_receiver(STALL, 200) as receiver,
        open_fake_gateway(webhooks=[receiver.table()]) as gateway,
    ):
        await submit(gateway)
        await closed(gateway)
        receiver.release.set()
    assert times(receiver.heard) == [0, 40]


class Names(trio.abc.HostnameResolver):
    """A name server that says what it likes, and something else each time."""

    def __init__(self, *addresses: str) -> None:
        self.addresses = list(addresses)
        self.asked = 0

    async def getaddrinfo(
        self, host: bytes | None, port: bytes | str | int | None, family: int = 0, *rest: int, **named: int
    ) -> list[tuple[Any, ...]]:
        assert host == b"hooks.test"
        self.asked += 1
        address = self.addresses.pop(0)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    async def getnameinfo(self, sockaddr: Any, flags: int) -> tuple[str, str]:
        raise NotImplementedError


async def test_a_name_that_leads_inside_is_not_called(http_clock: MockClock) -> None:
    names = Names("127.0.0.1", "169.254.169.254")
    before = trio.socket.set_custom_hostname_resolver(names)
    try:
        async with open_receiver() as receiver:
            url = receiver.table()["url"].replace("127.0.0.1", "hooks.test")
            table = receiver.table(url=url, allow_private=False)
            async with open_fake_gateway(webhooks=[table]) as gateway:
                await submit(gateway)
                (delivery,) = await closed(gateway)
                await request(gateway.url, "POST", f"/v1/webhooks/deliveries/{delivery['id']}/redeliver")
                (again,) = await closed(gateway)
    finally:
        trio.socket.set_custom_hostname_resolver(before)
    assert (delivery["status"], delivery["attempts"]) == ("failed", 1)
    assert delivery["last_error"] == "its name resolves to an address that is not public"
    assert (again["status"], again["attempts"], names.asked) == ("failed", 2, 2)
    assert receiver.heard == []


async def test_a_name_is_asked_once_a_try_and_called_at_what_it_said(http_clock: MockClock) -> None:
    # A second question within the try would lead elsewhere.
    names = Names("127.0.0.1", "127.0.0.9")
    before = trio.socket.set_custom_hostname_resolver(names)
    try:
        async with open_receiver() as receiver:
            url = receiver.table()["url"].replace("127.0.0.1", "hooks.test")
            async with open_fake_gateway(webhooks=[receiver.table(url=url)]) as gateway:
                await submit(gateway)
                (delivery,) = await closed(gateway)
    finally:
        trio.socket.set_custom_hostname_resolver(before)
    assert (delivery["status"], names.asked, len(receiver.heard)) == ("delivered", 1, 1)


async def test_calls_at_once_are_bounded_for_each_endpoint(http_clock: MockClock) -> None:
    async with open_receiver(STALL) as slow, open_receiver() as quick:
        tables = [slow.table("slow", max_concurrency=2, timeout_s=100), quick.table("quick")]
        async with open_fake_gateway(webhooks=tables) as gateway:
            for _ in range(5):
                await submit(gateway, x_bf_async_webhook="slow")
            await slow.until(2)
            await submit(gateway, x_bf_async_webhook="quick")
            await quick.until(1)
            assert slow.at_once == 2
            slow.release.set()
            await closed(gateway, 6)
    assert (len(slow.heard), slow.most_at_once) == (5, 2)
