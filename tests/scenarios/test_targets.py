"""Circuits and fallbacks as clients and operators see them."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from actors.errors import UpstreamConnectionError
from service.main import Gateway, banner, open_gateway
from service.settings import key_hash
from tests.support.gateway import BODY, Answer, kinds, open_fake_gateway, post, request, settings_of, start
from tests.support.providers import FakeProvider
from tests.support.scripted import Scripted, says, start_only

GONE = UpstreamConnectionError("no connection to the upstream")
AT_ONCE = {"max_retries": 0, "backoff_s": 0}
FRAGILE = {"failures": 2, "open_s": 60}
STREAM = {**BODY, "stream": True}


@asynccontextmanager
async def two(first: FakeProvider, second: FakeProvider, **sections: Any) -> AsyncIterator[Gateway]:
    """A gateway whose route tries one fake after the other."""
    named = {"first": first, "second": second}
    first.name, second.name = named
    settings = settings_of(
        **{
            "providers": [{"name": name, "kind": "echo"} for name in named],
            "routes": [{"model": "*", "targets": [{"provider": name} for name in named]}],
            "retries": AT_ONCE,
            "circuits": FRAGILE,
        }
        | sections
    )
    async with open_gateway(settings, providers=named) as gateway:
        yield gateway


async def readiness(gateway: Gateway) -> tuple[int, str, list[Any]]:
    answer = await request(gateway.url, "GET", "/readyz")
    return answer.status, answer.json["status"], answer.json["circuits"]


async def story(gateway: Gateway, answer: Answer) -> list[tuple[Any, ...]]:
    """The attempts, as the job's event feed tells them."""
    feed = await request(gateway.url, "GET", f"/v1/jobs/{answer.job_id}/events")
    told: list[tuple[Any, ...]] = []
    for event in feed.json["data"]:
        if event["type"] == "AttemptStarted":
            told.append((event["attempt"], event["provider"], event["upstream_model"]))
        elif event["type"] == "AttemptFailed":
            told.append((event["attempt"], event["failure"]["status"], event["next"]))
    return told


async def test_a_circuits_life(http_clock: MockClock) -> None:
    first, second = FakeProvider(raise_at={"connect": GONE}), FakeProvider()
    async with two(first, second) as gateway:
        assert await readiness(gateway) == (200, "ready", [])
        for _ in range(4):
            assert (await post(gateway.url)).status == 200
        # After two failures the first is left alone.
        assert (len(first.calls), len(second.calls)) == (2, 4)
        assert await readiness(gateway) == (
            200,
            "degraded",
            [{"provider": "first", "model": "m", "state": "open", "retry_in_s": 60}],
        )
        text = (await request(gateway.url, "GET", "/metrics")).body.decode()
        assert 'messagesd_circuits{provider="first",state="open"} 1.0' in text
        assert 'messagesd_circuits_opened_total{provider="first"} 1.0' in text
        assert 'messagesd_provider_down{provider="first"} 1.0' in text
        assert 'messagesd_provider_down{provider="second"} 0.0' in text
        assert 'messagesd_attempts_failed_total{next="fall_back",provider="first"} 2.0' in text

        await trio.sleep(60)
        assert (await readiness(gateway))[2][0]["state"] == "half_open"
        answer = await post(gateway.url)
        assert await story(gateway, answer) == [
            (1, "first", "m"),
            (1, 502, "fall_back"),
            (2, "second", "m"),
        ]
        assert (await readiness(gateway))[2][0]["retry_in_s"] == 60

        await trio.sleep(60)
        first.raise_at.clear()
        assert await story(gateway, await post(gateway.url)) == [(1, "first", "m")]
        assert await readiness(gateway) == (200, "ready", [])


async def test_with_no_target_left_nothing_is_accepted(http_clock: MockClock) -> None:
    fakes = [FakeProvider(raise_at={"connect": says(503)}) for _ in range(2)]
    async with two(fakes[0], fakes[1]) as gateway:
        for _ in range(2):
            assert (await post(gateway.url)).status == 503
        jobs = len((await request(gateway.url, "GET", "/v1/jobs")).json["data"])
        for headers in ({}, {"x-bf-async": "true"}):
            refused = await post(gateway.url, headers)
            assert (refused.status, refused.error_type) == (529, "overloaded_error")
            assert refused.headers["retry-after"] == "60"
        assert len((await request(gateway.url, "GET", "/v1/jobs")).json["data"]) == jobs
        assert gateway.supervisor.in_flight == 0
        assert gateway.supervisor.kept_bytes == 0
        answer = await request(gateway.url, "GET", "/readyz")
        assert (answer.status, answer.json["status"]) == (503, "not ready")
        assert answer.json["down"] == ["first", "second"]
        # Another model is another target.
        fakes[0].raise_at.clear()
        assert (await post(gateway.url, model="other")).status == 200
        assert (await readiness(gateway))[:2] == (200, "degraded")
        await trio.sleep(60)
        assert (await post(gateway.url)).status == 200


async def test_a_probe_goes_alone(http_clock: MockClock) -> None:
    fake = FakeProvider(raise_at={"connect": GONE})
    circuits = {"failures": 1, "open_s": 60}
    async with open_fake_gateway(fake, retries=AT_ONCE, circuits=circuits) as gateway:
        assert (await post(gateway.url)).status == 502
        fake.raise_at.clear()
        fake.stall_at = "connect"
        await trio.sleep(60)
        async with start(gateway.url, "POST", "/v1/messages", {}, STREAM):
            await fake.until_called(2)
            assert (await post(gateway.url)).status == 529
        # Its client left: that says nothing of the target, and the next one is the probe.
        await fake.until_closed()
        fake.stall_at = None
        assert (await post(gateway.url)).status == 200


async def test_what_is_the_requests_fault_opens_nothing(http_clock: MockClock) -> None:
    fake = FakeProvider(raise_at={"connect": says(400)})
    async with open_fake_gateway(fake, circuits={"failures": 1}) as gateway:
        for _ in range(5):
            assert (await post(gateway.url)).status == 400
        assert await readiness(gateway) == (200, "ready", [])
        assert len(fake.calls) == 5


async def test_fallbacks_of_a_request(http_clock: MockClock) -> None:
    first, second = FakeProvider(raise_at={"connect": GONE}), FakeProvider()
    routes = [{"model": "*", "provider": "first"}]
    async with two(first, second, routes=routes) as gateway:
        assert (await post(gateway.url)).status == 502
        answer = await post(gateway.url, fallbacks=["second/spare"])
        assert answer.status == 200
        assert await story(gateway, answer) == [
            (1, "first", "m"),
            (1, 502, "fall_back"),
            (2, "second", "spare"),
        ]
        assert (await post(gateway.url, fallbacks="default", model="x")).status == 502
        assert (await post(gateway.url, fallbacks=[{"model": "second/spare"}], model="y")).status == 502


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_that_one_kind_cannot_translate_is_served_by_another(
    stream: bool, http_clock: MockClock
) -> None:
    settings = settings_of(
        providers=[
            # Nobody listens there, and nobody is asked.
            {"name": "chat", "kind": "openai", "base_url": "http://127.0.0.1:9/v1"},
            {"name": "words", "kind": "echo"},
        ],
        routes=[{"model": "*", "targets": [{"provider": "chat"}, {"provider": "words"}]}],
    )
    async with open_gateway(settings) as gateway:
        answer = await post(gateway.url, container="c_1", stream=stream)
        assert answer.status == 200
        assert await story(gateway, answer) == [(1, "chat", "m"), (1, 400, "fall_back"), (2, "words", "m")]
        refused = await post(gateway.url, container="c_1", model="chat/m", stream=stream)
        assert (refused.status, refused.error_type) == (400, "invalid_request_error")
        assert refused.json["error"]["message"].startswith("container: ")


@pytest.mark.parametrize(
    ("fallbacks", "status"), [(["x"] * 9, 400), ([""], 400), (["x" * 257], 400), (["other"], 403)]
)
async def test_fallbacks_are_checked(fallbacks: list[str], status: int, http_clock: MockClock) -> None:
    keys = [{"name": "k", "hash": key_hash("sk-k"), "models": ["m", "x*"]}]
    async with open_fake_gateway(keys=keys) as gateway:
        answer = await post(gateway.url, {"x-api-key": "sk-k"}, fallbacks=fallbacks)
        assert answer.status == status
        assert (await post(gateway.url, {"x-api-key": "sk-k"}, fallbacks=["x"])).status == 200


async def test_a_held_back_start_is_shown_after_a_silence(http_clock: MockClock) -> None:
    """The upstream has begun and then thinks: pings are due, so the start has to be out before them."""
    fake = Scripted(scripts=[[start_only(), 100]])
    async with open_fake_gateway(fake) as gateway:
        async with start(gateway.url, "POST", "/v1/messages", {}, STREAM) as call:
            assert (await call.head()).status == 200
            events = await call.events()
        assert [(event.event, event.at) for event in events[:3]] == [
            ("message_start", 15),
            ("ping", 30),
            ("ping", 45),
        ]
        assert kinds(events)[-1] == "error"
        assert events[-1].at == 100
        assert len(fake.calls) == 1


async def test_a_resumed_stream_is_pinged_while_its_job_waits(http_clock: MockClock) -> None:
    """In line and between two attempts alike: a reader that came back is told that the gateway is there."""
    fake = FakeProvider(deltas=0, delay_s=40)
    providers = [{"name": "fake", "kind": "echo", "max_concurrency": 1}]
    async with open_fake_gateway(fake, providers=providers) as gateway:
        await post(gateway.url, {"x-bf-async": "true"})
        waiting = (await post(gateway.url, {"x-bf-async": "true"})).job_id
        async with start(gateway.url, "GET", f"/v1/jobs/{waiting}/stream?starting_after=0-0") as call:
            assert (await call.head()).status == 200
            events = await call.events()
        assert [(event.event, event.at) for event in events if event.event == "ping"] == [
            ("ping", 15),
            ("ping", 30),
            ("ping", 45),
            ("ping", 60),
            ("ping", 75),
        ]
        assert kinds(events)[-1] == "message_stop"


async def test_the_start_notice_tells_where_routes_lead(http_clock: MockClock) -> None:
    targets = [{"provider": "fake", "rename": "a", "weight": 3}, {"provider": "fake", "rename": "b"}]
    routes = [
        {"model": "x", "targets": targets, "fallbacks": ["fake/c"]},
        {"model": "*", "provider": "fake", "rename": "d"},
    ]
    async with open_fake_gateway(routes=routes) as gateway:
        lines = banner(gateway.dependencies.settings, gateway).splitlines()
    assert "  route x -> fake as a (weight 3), fake as b, then fake/c" in lines
    assert "  route * -> fake as d" in lines
