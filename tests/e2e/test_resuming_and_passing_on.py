"""What a cursor means where two are given, and what is passed on of a path we do not know."""

from typing import Any

import orjson
import pytest

from events.errors import LogUnavailableError
from events.log.base import FrameCursor, FrameRun
from service.main import Gateway
from tests.e2e.daemon import running
from tests.e2e.wire import Answer, ask, assert_error, post, request
from tests.fake_upstream import Exchange, answer, message, open_upstream

BODY = {"model": "m", "max_tokens": 50, "messages": [{"role": "user", "content": "one two three"}]}
FRAMES = 8
"""Of the answer to BODY: five, and one a word."""


async def _ended_job(gateway: Gateway) -> str:
    pending = await ask(gateway.url, post(BODY, ("x-bf-async", "true")))
    job_id = str(pending.json()["id"])
    await ask(gateway.url, post(b"", ("x-bf-async-id", job_id), ("prefer", "wait=9")))
    return job_id


async def _get(gateway: Gateway, target: str, *headers: tuple[str, str]) -> Answer:
    return await ask(gateway.url, request("GET", target, b"", list(headers)), method="GET")


def _ids(answered: Answer) -> list[str]:
    return [line[4:] for line in answered.body.decode().splitlines() if line.startswith("id: ")]


async def test_what_a_browser_has_seen_since_counts_more_than_the_address_it_was_given() -> None:
    async with running() as gateway:
        job = f"/v1/jobs/{await _ended_job(gateway)}"
        stream = await _get(gateway, f"{job}/stream?starting_after=1-2", ("last-event-id", "1-6"))
        assert _ids(stream) == ["1-7", "1-8"]
        sse = ("accept", "text/event-stream")
        feed = await _get(gateway, f"{job}/events?after=1", sse, ("last-event-id", "3"))
        assert _ids(feed)[0] == "4"
        assert _ids(await _get(gateway, f"{job}/events?after=2", sse))[0] == "3"


async def test_nothing_is_left_after_the_last_frame() -> None:
    async with running() as gateway:
        job = f"/v1/jobs/{await _ended_job(gateway)}"
        left = await _get(gateway, f"{job}/stream", ("last-event-id", f"1-{FRAMES}"))
        assert (left.status, left.body) == (204, b"")
        assert left.header("x-bf-async-status") == "completed"


async def test_a_log_that_fails_under_a_stream_ends_it_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running() as gateway:
        job = f"/v1/jobs/{await _ended_job(gateway)}"

        async def fail(job_id: str, after: FrameCursor, max_bytes: int = 0) -> FrameRun | None:
            raise LogUnavailableError("an I/O error")

        monkeypatch.setattr(gateway.log, "read_frames", fail)
        cut = await _get(gateway, f"{job}/stream", ("last-event-id", "1-2"))
        assert cut.status == 200
        assert cut.body.startswith(b"event: error\ndata: ")
        assert b"overloaded_error" in cut.body


async def test_a_job_that_goes_while_it_is_read_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running() as gateway:
        job_id = await _ended_job(gateway)
        snapshot = gateway.log.snapshot

        async def forget_after(asked: str) -> Any:
            found = await snapshot(asked)
            await gateway.log.forget(asked)
            return found

        monkeypatch.setattr(gateway.log, "snapshot", forget_after)
        assert_error(await _get(gateway, f"/v1/jobs/{job_id}/events"), 404)


async def test_what_is_passed_on_of_a_path_we_do_not_know() -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.send(
            answer(200, b'{"new":1}', "application/json", "anthropic-ratelimit-a: 5", "x-b: c")
        )

    async with open_upstream(script) as upstream:
        up = {"name": "up", "kind": "anthropic", "base_url": upstream.url, "api_key": "k"}
        async with running(providers=[up]) as gateway:
            body = b'{ "model" : "up/m",  "x":1.0 }'
            headers = [("anthropic-beta", "b1"), ("content-type", "application/json"), ("x-app", "cli")]
            answered = await ask(gateway.url, request("POST", "/v1/messages/new?beta=true", body, headers))
    assert (answered.status, answered.json()) == (200, {"new": 1})
    assert answered.header("anthropic-ratelimit-a") == "5"
    assert answered.header("x-b") is None
    (passed,) = upstream.requests
    assert (passed.path, passed.body) == ("/v1/messages/new", b'{ "model" : "m",  "x":1.0 }')
    assert passed.headers["content-type"] == "application/json"
    assert passed.headers["anthropic-beta"] == "b1"
    assert "x-app" not in passed.headers


async def test_the_events_name_the_provider_key() -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.send(answer(200, orjson.dumps(message("hi"))))

    async with open_upstream(script) as upstream:
        up = {"name": "up", "kind": "anthropic", "base_url": upstream.url, "api_key": "k", "key_name": "team"}
        async with running(providers=[up]) as gateway:
            job_id = (await ask(gateway.url, post(BODY))).header("x-bf-async-id")
            events = (await _get(gateway, f"/v1/jobs/{job_id}/events")).json()["data"]
    started = next(event for event in events if event["type"] == "AttemptStarted")
    assert started["key_name"] == "team"
    assert b'"k"' not in orjson.dumps(events)


async def test_a_content_type_with_parameters() -> None:
    async with running() as gateway:
        kind = ("content-type", "application/json; charset=utf-8; profile=x")
        assert (await ask(gateway.url, post(BODY, kind))).status == 200
