"""One upstream dies, the next one answers: the SDK sees one clean answer, the events tell the whole story."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import orjson
import pytest
import trio
from anthropic import APIStatusError, AsyncAnthropic
from anthropic.types import MessageParam

from service.main import Gateway
from tests.e2e.daemon import running
from tests.fake_upstream import (
    LAST_CHUNK,
    STREAM_HEAD,
    Exchange,
    FakeUpstream,
    Script,
    answer,
    message,
    message_frames,
    open_upstream,
)

TEXT = "the quick brown fox"
HELLO: list[MessageParam] = [{"role": "user", "content": "hi"}]
TEST_TIMEOUT_S = 20
OVERLOADED = orjson.dumps({"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}})


async def sound(exchange: Exchange) -> None:
    body = orjson.loads(exchange.request.body)
    if body.get("stream"):
        frames = message_frames(TEXT, body["model"])
        await exchange.send(STREAM_HEAD)
        for frame in frames:
            await exchange.send_chunk(frame)
        await exchange.send(LAST_CHUNK)
    else:
        await exchange.send(answer(200, orjson.dumps(message(TEXT, body["model"]))))


async def dies_after_its_start(exchange: Exchange) -> None:
    await exchange.send(STREAM_HEAD)
    await exchange.send_chunk(message_frames("lost words")[0])


async def overloaded(exchange: Exchange) -> None:
    await exchange.send(answer(529, OVERLOADED, "application/json", "retry-after: 120"))


@asynccontextmanager
async def failing_over(script: Script) -> AsyncIterator[tuple[Gateway, AsyncAnthropic, FakeUpstream]]:
    """A gateway before a first upstream that does ``script`` and a second, sound one; and a client of it."""
    with trio.fail_after(TEST_TIMEOUT_S):
        async with open_upstream(script) as first, open_upstream(sound) as second:
            upstreams = {"first": first, "second": second}
            providers = [
                {"name": name, "kind": "anthropic", "base_url": upstream.url, "api_key": "k"}
                for name, upstream in upstreams.items()
            ]
            routes = [{"model": "alone", "provider": "first"}, {"model": "*", "provider": "first"}]
            routes[1] |= {"fallbacks": ["second/spare"]}  # type: ignore[dict-item]  # a list of names
            retries = {"max_retries": 0}
            async with (
                running(providers=providers, routes=routes, retries=retries) as gateway,
                AsyncAnthropic(base_url=gateway.url, api_key="any", max_retries=0) as client,
            ):
                yield gateway, client, first


async def story(client: AsyncAnthropic, job_id: str) -> list[str]:
    events = orjson.loads((await client.get(f"/v1/jobs/{job_id}/events", cast_to=str)).encode())["data"]
    return [
        f"{event['provider']}/{event['upstream_model']}"
        if event["type"] == "AttemptStarted"
        else f"{event['failure']['status']} {event['next']}"
        for event in events
        if event["type"].startswith("Attempt")
    ]


async def test_a_stream_that_dies_after_its_start() -> None:
    async with failing_over(dies_after_its_start) as (_, client, _):
        async with client.messages.stream(model="m", max_tokens=9, messages=HELLO) as stream:
            kinds = [event.type async for event in stream if event.type.startswith(("message", "content"))]
            final = await stream.get_final_message()
        assert kinds.count("message_start") == kinds.count("message_stop") == 1
        assert (final.content[0].text, final.model) == (TEXT, "spare")  # type: ignore[union-attr]  # a text
        assert final.usage.output_tokens == 4
        job_id = stream.response.headers["x-bf-async-id"]
        assert await story(client, job_id) == ["first/m", "502 fall_back", "second/spare"]


async def test_a_call_to_an_overloaded_upstream() -> None:
    async with failing_over(overloaded) as (_, client, _):
        raw = await client.messages.with_raw_response.create(model="m", max_tokens=9, messages=HELLO)
        assert (await raw.parse()).content[0].text == TEXT  # type: ignore[union-attr]  # a text
        assert await story(client, raw.headers["x-bf-async-id"]) == [
            "first/m",
            "529 fall_back",
            "second/spare",
        ]


async def test_fallbacks_that_the_client_names() -> None:
    async with failing_over(overloaded) as (_, client, first):
        with pytest.raises(APIStatusError) as refused:
            await client.messages.create(model="alone", max_tokens=9, messages=HELLO)
        assert refused.value.status_code == 529
        assert refused.value.response.headers["retry-after"] == "120"
        named = await client.messages.create(
            model="alone", max_tokens=9, messages=HELLO, extra_body={"fallbacks": ["second/other"]}
        )
        assert named.model == "other"
        assert all(b"fallbacks" not in request.body for request in first.requests)
