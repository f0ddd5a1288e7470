"""Upstreams that fail in every way at every moment, with a sound one behind them: what the client sees.

Before the content it is one clean answer, and the events tell why it came from where it did. After it, it
is the error, and nothing of another attempt.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import orjson
import pytest
import trio
from trio.testing import MockClock

from service.main import Gateway, open_gateway
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
from tests.faults.upstream import chunk, never, sends, stalls_after
from tests.support.gateway import BODY, Answer, SseEvent, kinds, request, settings_of, start

TEXT = "one two three"
FRAMES = message_frames(TEXT)
START, CONTENT = chunk(FRAMES[0]), chunk(b"".join(FRAMES[1:4]))
PING = chunk(b'event: ping\ndata: {"type": "ping"}\n\n')
OVERLOADED = orjson.dumps({"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}})
ERROR_FRAME = chunk(b"event: error\ndata: " + OVERLOADED + b"\n\n")
WHOLE = STREAM_HEAD + b"".join(map(chunk, FRAMES)) + LAST_CHUNK
LIMITS = {"connect_timeout_s": 5, "first_byte_timeout_s": 40, "idle_timeout_s": 20, "total_timeout_s": 90}
HTML = answer(200, b"<html>busy</html>", "text/html")
HALF_JSON = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 500\r\n\r\n" + b'{"type"'

BEFORE_CONTENT: dict[str, tuple[Script, int]] = {
    "resets before the head": (sends(), 502),
    "resets in the head": (sends(b"HTTP/1.1 20"), 502),
    "garbage": (sends(b"SSH-2.0-x\r\n\r\n"), 502),
    "stalls before the head": (stalls_after(), 504),
    "stalls in the head": (stalls_after(b"HTTP/1.1 200 OK\r\ncontent-"), 504),
    "429": (sends(answer(429, OVERLOADED, "application/json", "retry-after: 99")), 429),
    "500": (sends(answer(500, b"oops", "text/plain")), 500),
    "529": (sends(answer(529, OVERLOADED)), 529),
    "408": (sends(answer(408, b"{}")), 408),
    "409": (sends(answer(409, b"{}")), 409),
    "refuses the key": (sends(answer(401, b"{}")), 401),
    "html": (sends(HTML), 502),
}
STREAMED: dict[str, tuple[Script, int]] = {
    "resets after the head": (sends(STREAM_HEAD), 502),
    "stalls after the head": (stalls_after(STREAM_HEAD), 504),
    "resets after message_start": (sends(STREAM_HEAD, START), 502),
    "resets after message_start and pings": (sends(STREAM_HEAD, START, PING, PING), 502),
    "says error after message_start": (sends(STREAM_HEAD, START, ERROR_FRAME, LAST_CHUNK), 529),
    "ends after message_start": (sends(STREAM_HEAD, START, LAST_CHUNK), 502),
    "garbage after message_start": (sends(STREAM_HEAD, START, chunk(b"data: {}\n\n")), 502),
}
PLAIN: dict[str, tuple[Script, int]] = {
    "resets in the body": (sends(HALF_JSON), 502),
    "stalls in the body": (stalls_after(HALF_JSON), 504),
    "no message": (sends(answer(200, b"{}")), 502),
}
AFTER_CONTENT: dict[str, tuple[Script, str]] = {
    "resets": (sends(STREAM_HEAD, START, CONTENT), "api_error"),
    "stalls": (stalls_after(STREAM_HEAD, START, CONTENT), "timeout_error"),
    "ends": (sends(STREAM_HEAD, START, CONTENT, LAST_CHUNK), "api_error"),
    "says error": (sends(STREAM_HEAD, START, CONTENT, ERROR_FRAME, LAST_CHUNK), "overloaded_error"),
}


@pytest.fixture
def http_clock() -> MockClock:
    return MockClock(autojump_threshold=0.02)


async def sound(exchange: Exchange) -> None:
    """Answers as it is asked."""
    if orjson.loads(exchange.request.body).get("stream"):
        await exchange.send(WHOLE)
    else:
        await exchange.send(answer(200, orjson.dumps(message(TEXT))))


@asynccontextmanager
async def failing_over(
    script: Script, **retries: float
) -> AsyncIterator[tuple[Gateway, FakeUpstream, FakeUpstream]]:
    """A gateway with a first upstream that does ``script``, and a sound one behind it."""
    async with open_upstream(script) as first, open_upstream(sound) as second:
        upstreams = {"first": first, "second": second}
        settings = settings_of(
            providers=[
                {"name": name, "kind": "anthropic", "base_url": upstream.url, "api_key": "sk-up", **LIMITS}
                for name, upstream in upstreams.items()
            ],
            routes=[{"model": "*", "provider": "first", "fallbacks": ["second"]}],
            retries={"max_retries": 0, "backoff_s": 0} | retries,
        )
        async with open_gateway(settings) as gateway:
            yield gateway, first, second


async def ask(gateway: Gateway, *, stream: bool) -> tuple[Answer, list[SseEvent]]:
    """One call, read to its end."""
    body = {**BODY, "stream": stream}
    async with start(gateway.url, "POST", "/v1/messages", {}, body) as call:
        head = await call.head()
        if stream and head.status == 200:
            return head, await call.events()
        while piece := await call.chunk():
            head.body += piece
        return head, []


async def failures_of(gateway: Gateway, job_id: str) -> list[tuple[str, int]]:
    """What the events tell of failed attempts: what came next, and the status."""
    feed = await request(gateway.url, "GET", f"/v1/jobs/{job_id}/events")
    failed = [event for event in feed.json["data"] if event["type"] == "AttemptFailed"]
    return [(event["next"], event["failure"]["status"]) for event in failed]


async def _one_clean_answer(gateway: Gateway, *, stream: bool, status: int) -> None:
    head, events = await ask(gateway, stream=stream)
    assert head.status == 200
    if stream:
        assert [orjson.dumps(event.data) for event in events] == [
            orjson.dumps(orjson.loads(frame.partition(b"data: ")[2])) for frame in FRAMES
        ]
    else:
        assert head.json == message(TEXT)
    assert await failures_of(gateway, head.job_id) == [("fall_back", status)]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("how", BEFORE_CONTENT)
async def test_before_the_content(how: str, stream: bool, http_clock: MockClock) -> None:
    script, status = BEFORE_CONTENT[how]
    async with failing_over(script) as (gateway, first, second):
        await _one_clean_answer(gateway, stream=stream, status=status)
        assert (len(first.requests), len(second.requests)) == (1, 1)
        assert first.requests[0].body == second.requests[0].body


@pytest.mark.parametrize("how", [*STREAMED, *PLAIN])
async def test_in_the_answer(how: str, http_clock: MockClock) -> None:
    script, status = (STREAMED | PLAIN)[how]
    async with failing_over(script) as (gateway, _, second):
        await _one_clean_answer(gateway, stream=how in STREAMED, status=status)
        assert len(second.requests) == 1


@pytest.mark.parametrize("how", AFTER_CONTENT)
async def test_after_the_content(how: str, http_clock: MockClock) -> None:
    script, error_type = AFTER_CONTENT[how]
    async with failing_over(script) as (gateway, _, second):
        head, events = await ask(gateway, stream=True)
        assert head.status == 200
        told = [kind for kind in kinds(events) if kind != "ping"]
        assert told == ["message_start", "content_block_start", *["content_block_delta"] * 2, "error"]
        assert events[-1].data["error"]["type"] == error_type
        assert second.requests == []
        assert [step for step, _ in await failures_of(gateway, head.job_id)] == ["give_up"]


@pytest.mark.parametrize("how", AFTER_CONTENT)
async def test_after_the_content_that_nobody_saw(how: str, http_clock: MockClock) -> None:
    script, _ = AFTER_CONTENT[how]
    async with failing_over(script) as (gateway, _, second):
        headers = {"x-bf-async": "true"}
        job_id = (await request(gateway.url, "POST", "/v1/messages", headers, BODY)).job_id
        polled = {"x-bf-async-id": job_id, "prefer": "wait=600"}
        done = await request(gateway.url, "POST", "/v1/messages", polled)
        assert done.json == message(TEXT)
        assert len(second.requests) == 1


async def test_nobody_listens(http_clock: MockClock) -> None:
    async with open_upstream(never) as gone:
        pass
    async with open_upstream(sound) as upstream:
        names = {"first": gone.url, "second": upstream.url}
        settings = settings_of(
            providers=[{"name": n, "kind": "anthropic", "base_url": url} for n, url in names.items()],
            routes=[{"model": "*", "provider": "first", "fallbacks": ["second/spare"]}],
        )
        async with open_gateway(settings) as gateway:
            head, _ = await ask(gateway, stream=False)
            assert head.status == 200
            assert await failures_of(gateway, head.job_id) == [("retry", 502)] * 2 + [("fall_back", 502)]
        assert orjson.loads(upstream.requests[0].body)["model"] == "spare"


@pytest.mark.parametrize("status", [400, 402, 404, 413, 422])
async def test_the_requests_own_fault_is_nobody_elses(status: int, http_clock: MockClock) -> None:
    async with failing_over(sends(answer(status, b"{}"))) as (gateway, _, second):
        head, _ = await ask(gateway, stream=False)
        assert head.status == status
        assert second.requests == []


async def test_an_upstream_may_say_that_it_is_worth_it(http_clock: MockClock) -> None:
    script = sends(answer(400, b"{}", "application/json", "x-should-retry: true"))
    async with failing_over(script, max_retries=1) as (gateway, first, second):
        head, _ = await ask(gateway, stream=False)
        assert head.status == 200
        assert (len(first.requests), len(second.requests)) == (2, 1)


async def test_each_time_bound_has_its_own_error(http_clock: MockClock) -> None:
    """With nothing to fall back to, as the client sees it, and when."""
    cases: list[tuple[Script, bool, str, float]] = [
        (stalls_after(), False, "first byte timeout", 40),
        (stalls_after(STREAM_HEAD), True, "idle timeout", 20),
        (_pings_for_ever, True, "total timeout", 90),
    ]
    for script, stream, bound, seconds in cases:
        async with failing_over(script, max_attempts=1) as (gateway, _, _):
            begun_at = trio.current_time()
            head, events = await ask(gateway, stream=stream)
            error: dict[str, Any] = events[-1].data["error"] if events else head.json["error"]
            assert error["type"] == "timeout_error"
            assert bound in error["message"]
            assert head.status == (200 if events else 504)
            assert trio.current_time() - begun_at == pytest.approx(seconds, abs=1)
            # Our pings went on meanwhile, and masked nothing.
            assert kinds(events).count("ping") == (len(events) - 2 if events else 0)


async def _pings_for_ever(exchange: Exchange) -> None:
    await exchange.send(STREAM_HEAD + START)
    while True:
        await trio.sleep(10)
        await exchange.send(PING)


async def test_a_key_that_is_not_taken_is_left_alone(http_clock: MockClock) -> None:
    """The next key at once, in the same job; the next jobs do not ask with the first one for a while."""
    bad = {"sk-bad": 401, "sk-limited": 429}

    async def script(exchange: Exchange) -> None:
        status = bad.get(exchange.request.headers["x-api-key"])
        if status is None:
            await sound(exchange)
        else:
            await exchange.send(answer(status, b"{}", "application/json", "retry-after: 600"))

    async with open_upstream(script) as upstream:
        keys = [{"name": name.removeprefix("sk-"), "key": name} for name in (*bad, "sk-good")]
        provider = {"name": "up", "kind": "anthropic", "base_url": upstream.url, "api_keys": keys}
        settings = settings_of(providers=[provider], routes=[{"model": "*", "provider": "up"}])
        async with open_gateway(settings) as gateway:
            heads = [(await ask(gateway, stream=False))[0] for _ in range(30)]
            assert [head.status for head in heads] == [200] * 30
            used = [request.headers["x-api-key"] for request in upstream.requests]
            assert sorted(set(used)) == ["sk-bad", "sk-good", "sk-limited"]
            assert (used.count("sk-bad"), used.count("sk-limited")) == (1, 1)
            text = (await request(gateway.url, "GET", "/metrics")).body.decode()
            assert 'messagesd_provider_cooling_keys{provider="up"} 2.0' in text
            for head in heads:
                feed = (await request(gateway.url, "GET", f"/v1/jobs/{head.job_id}/events")).body
                assert b"sk-" not in feed
            assert b'"key_name":"good"' in feed
            # 401 says nothing of how long: 60 s.
            await trio.sleep(61)
            for _ in range(30):
                await ask(gateway, stream=False)
            used = [request.headers["x-api-key"] for request in upstream.requests]
            assert (used.count("sk-bad"), used.count("sk-limited")) == (2, 1)
