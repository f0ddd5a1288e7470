"""``Idempotency-Key``: one job for one key, over either log, through restarts and all the ways of asking."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from actors.errors import UpstreamConnectionError
from actors.expiry import Expiry
from service.main import Gateway
from service.settings import key_hash
from tests.scenarios.restarts import ASYNC, Place, asks, describe, place, result, watch
from tests.support.gateway import Answer, SseEvent, kinds, open_fake_gateway, request, start
from tests.support.providers import FakeProvider, text_of

__all__ = ["place"]

KEYS = [{"name": name, "hash": key_hash(f"sk-bf-{name}")} for name in ("ann", "bob")]
LOGS = pytest.mark.parametrize("url", ["memory://", "sqlite:///{}/events.db"], ids=["memory", "sqlite"])
DUPLICATES = 20


@asynccontextmanager
async def serving(
    url: str, directory: Path, provider: FakeProvider | None = None, **sections: Any
) -> AsyncIterator[Gateway]:
    log = {"url": url.format(directory)}
    async with open_fake_gateway(provider, log=log, jobs={"drain_s": 0.1}, **sections) as gateway:
        yield gateway


async def call(
    gateway: Gateway, key: str, headers: Mapping[str, str] | None = None, text: str = "count"
) -> Answer:
    """A call with a key: plain, unless the headers say otherwise."""
    sent = {"idempotency-key": key, **(headers or {})}
    return await request(gateway.url, "POST", "/v1/messages", sent, asks(text))


async def stream(gateway: Gateway, key: str) -> tuple[Answer, list[SseEvent]]:
    sent = {"idempotency-key": key}
    async with start(gateway.url, "POST", "/v1/messages", sent, asks("count", stream=True)) as made:
        return await made.head(), await made.events()


async def jobs_of(gateway: Gateway) -> list[str]:
    return [job["id"] for job in (await request(gateway.url, "GET", "/v1/jobs")).json["data"]]


@LOGS
async def test_concurrent_submits_with_one_key_are_one_job(url: str, tmp_path: Path) -> None:
    fake = FakeProvider(stall_at="connect")
    async with serving(url, tmp_path, fake) as gateway:
        answers: list[Answer] = []

        async def one() -> None:
            answers.append(await call(gateway, "k", ASYNC))

        async with trio.open_nursery() as nursery:
            for _ in range(DUPLICATES):
                nursery.start_soon(one)
        assert [answer.status for answer in answers] == [200] * DUPLICATES
        assert {answer.job_id for answer in answers} == {(await jobs_of(gateway))[0]}
        assert len(await jobs_of(gateway)) == 1
        fake.release.set()
        done = await result(gateway, answers[0].job_id)
        # Once it has ended, its end is the answer.
        assert (await call(gateway, "k", ASYNC)).body == done.body
    assert len(fake.calls) == 1


@LOGS
async def test_concurrent_plain_calls_with_one_key_get_one_message(url: str, tmp_path: Path) -> None:
    fake = FakeProvider(stall_at="last_frame")
    async with serving(url, tmp_path, fake) as gateway:
        answers: list[Answer] = []

        async def one() -> None:
            answers.append(await call(gateway, "k"))

        async with trio.open_nursery() as nursery:
            for _ in range(DUPLICATES):
                nursery.start_soon(one)
            await fake.stalled.wait()
            fake.release.set()
        assert len({answer.body for answer in answers}) == 1
        assert answers[0].json["content"][0]["text"] == text_of(3)
        # An SDK that retries after its connection broke gets the very same Message.
        again = await call(gateway, "k")
        assert (again.status, again.body, again.job_id) == (200, answers[0].body, answers[0].job_id)
    assert len(fake.calls) == 1


@LOGS
async def test_a_client_that_left_finds_its_job_by_the_key(url: str, tmp_path: Path) -> None:
    fake = FakeProvider(stall_at="connect")
    async with serving(url, tmp_path, fake) as gateway:
        headers = {"idempotency-key": "k"}
        async with start(gateway.url, "POST", "/v1/messages", headers, asks("count")):
            await fake.stalled.wait()
        fake.release.set()
        assert (await call(gateway, "k")).json["content"][0]["text"] == text_of(3)
    assert [made.cancelled for made in fake.calls] == [False]


@LOGS
async def test_another_body_is_a_conflict(url: str, tmp_path: Path) -> None:
    fake = FakeProvider()
    async with serving(url, tmp_path, fake) as gateway:
        first = await call(gateway, "k", ASYNC)
        for _ in range(2):
            other = await call(gateway, "k", ASYNC, text="something else")
            assert (other.status, other.error_type) == (409, "conflict_error")
            assert "another request body" in other.json["error"]["message"]
            assert "x-bf-async-id" not in other.headers
            await result(gateway, first.job_id)
        assert await jobs_of(gateway) == [first.job_id]
    assert len(fake.calls) == 1


@LOGS
async def test_owners_do_not_share_keys(url: str, tmp_path: Path) -> None:
    async with serving(url, tmp_path, keys=KEYS) as gateway:
        ann, bob = ({"authorization": f"Bearer sk-bf-{name}", **ASYNC} for name in ("ann", "bob"))
        first = await call(gateway, "k", ann)
        second = await call(gateway, "k", bob, text="something else")
        assert (first.status, second.status) == (200, 200)
        assert first.job_id != second.job_id
        assert (await call(gateway, "k", ann)).job_id == first.job_id


@LOGS
async def test_a_stream_with_a_used_key_is_replayed(url: str, tmp_path: Path) -> None:
    fake = FakeProvider(deltas=10)
    async with serving(url, tmp_path, fake) as gateway:
        head, events = await stream(gateway, "k")
        again, replayed = await stream(gateway, "k")
        assert kinds(events)[-1] == "message_stop"
        assert [event[:3] for event in replayed] == [event[:3] for event in events]
        # It can be resumed, as every stream that outlives its connection.
        assert [event.id for event in events] == [f"1-{number}" for number in range(1, 16)]
        assert again.job_id == head.job_id
    assert len(fake.calls) == 1


@LOGS
async def test_a_failure_is_kept_like_a_result(url: str, tmp_path: Path) -> None:
    fake = FakeProvider(raise_at={"first_frame": RuntimeError("broken")})
    async with serving(url, tmp_path, fake) as gateway:
        first = await call(gateway, "k")
        fake.raise_at.clear()
        again = await call(gateway, "k")
        assert (first.status, first.job_id) == (500, again.job_id)
        assert (again.status, again.json["error"]) == (500, first.json["error"])
        await request(gateway.url, "DELETE", f"/v1/jobs/{first.job_id}")
        # With the job its key goes.
        third = await call(gateway, "k")
        assert third.status == 200
        assert third.job_id != first.job_id


async def test_the_key_outlives_a_restart_and_ends_with_the_result(place: Place) -> None:
    ttl = {**ASYNC, "x-bf-async-job-result-ttl": "60"}
    fake = FakeProvider(stall_at="mid_stream")
    async with place.life(fake, crash=True) as gateway:
        first = await call(gateway, "k", ttl)
        await fake.stalled.wait()
    fake = FakeProvider()
    async with place.life(fake, crash=True) as gateway:
        # Also while it is being run again.
        assert (await call(gateway, "k", ttl)).job_id == first.job_id
        done = await result(gateway, first.job_id)
        assert (await call(gateway, "k", ttl, text="something else")).status == 409
    place.wall_s += 59
    async with place.life(fake, crash=True) as gateway:
        again = await call(gateway, "k", ttl)
        assert (again.job_id, again.body) == (first.job_id, done.body)
        assert (await watch(gateway, first.job_id))[1][0].id == "2-1"
    place.wall_s += 2
    async with place.life(fake) as gateway:
        while await jobs_of(gateway):  # noqa: ASYNC110 - expiry begins with the start; nothing tells its end
            await trio.lowlevel.checkpoint()
        other = await call(gateway, "k", ttl, text="something else")
        assert other.status == 200
        assert other.job_id != first.job_id
        assert (await describe(gateway, other.job_id))["id"] == other.job_id
    assert len(fake.calls) == 2


async def test_the_key_is_free_from_the_deadline_on(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    ttl = {**ASYNC, "x-bf-async-job-result-ttl": "60"}
    async with place.life(crash=True) as gateway:
        first = await call(gateway, "k", ttl)
        await result(gateway, first.job_id)
    place.wall_s += 61

    async def too_slow(expiry: Expiry) -> None:
        await trio.sleep_forever()

    monkeypatch.setattr(Expiry, "run", too_slow)
    async with place.life() as gateway:
        other = await call(gateway, "k", ttl, text="something else")
        assert other.status == 200
        assert other.job_id != first.job_id
        assert (await call(gateway, "k", ttl, text="something else")).job_id == other.job_id


@pytest.mark.parametrize(
    ("keys", "accepted"),
    [
        ([b"k"], True),
        ([b"k" * 255], True),
        ([b"a b, c; \xe9"], True),
        ([b""], False),
        ([b"   "], False),
        ([b"k" * 256], False),
        ([b"k", b"k"], False),
        ([b"k", b"l"], False),
    ],
)
async def test_what_a_key_may_be(keys: list[bytes], accepted: bool) -> None:
    fake = FakeProvider()
    async with open_fake_gateway(fake) as gateway:
        answer = await _raw(gateway, keys)
        if accepted:
            assert answer.startswith(b"HTTP/1.1 200")
        else:
            assert answer.startswith(b"HTTP/1.1 400")
            assert b"idempotency-key" in answer.partition(b"\r\n\r\n")[2]
    assert len(fake.calls) == accepted


async def _raw(gateway: Gateway, keys: list[bytes]) -> bytes:
    body = b'{"model":"m","max_tokens":9,"messages":[{"role":"user","content":"x"}]}'
    port = int(gateway.url.rpartition(":")[2])
    lines = [b"POST /v1/messages HTTP/1.1", b"host: test", b"connection: close"]
    lines += [b"idempotency-key: " + key for key in keys] + [b"content-length: %d" % len(body), b"", body]
    async with await trio.open_tcp_stream("127.0.0.1", port) as connection:
        await connection.send_all(b"\r\n".join(lines))
        return b"".join([chunk async for chunk in connection])


@LOGS
async def test_a_key_whose_job_failed_says_that_asking_again_is_no_use(url: str, tmp_path: Path) -> None:
    fake = FakeProvider(raise_at={"connect": UpstreamConnectionError("no connection")})
    async with serving(url, tmp_path, fake, retries={"max_attempts": 1}) as gateway:
        first = await call(gateway, "k")
        assert (first.status, first.error_type) == (502, "api_error")
        assert "x-should-retry" not in first.headers
        fake.raise_at.clear()
        again = await call(gateway, "k")
        assert (again.status, again.job_id) == (502, first.job_id)
        assert again.headers["x-should-retry"] == "false"
        assert len(fake.calls) == 1
