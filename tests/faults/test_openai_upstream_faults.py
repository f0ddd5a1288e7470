"""Chat Completions upstreams that fail, each at each moment: the right error, in time, nothing left open."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import orjson
import pytest
import trio
from trio.testing import MockClock

from actors.errors import (
    UnsupportedError,
    UpstreamConnectionError,
    UpstreamProtocolError,
    UpstreamStatusError,
    UpstreamTimeoutError,
)
from actors.providers.base import ForwardCall, Frame
from actors.providers.openai.provider import TAIL_TIMEOUT_S, OpenaiProvider
from actors.providers.options import OpenaiOptions
from actors.timers import open_timers
from tests.fake_openai import DONE, chunk, completion, event
from tests.fake_upstream import LAST_CHUNK, STREAM_HEAD, Exchange, FakeUpstream, Script, answer, open_upstream
from tests.faults.upstream import CALL, HEAD_OF_BODY, KEY, sends, shows_nothing, stalls_after
from tests.faults.upstream import chunk as piece

pytestmark = pytest.mark.usefixtures("transport")

HELLO = chunk({"role": "assistant", "content": "Hello"})
START = STREAM_HEAD + piece(HELLO)


@pytest.fixture
def clock() -> MockClock:
    return MockClock(autojump_threshold=0.05)


@asynccontextmanager
async def provider_for(script: Script, **options: Any) -> AsyncIterator[tuple[OpenaiProvider, FakeUpstream]]:
    """A provider and the upstream it calls. On leaving, no connection but idle ones may be open."""
    async with open_upstream(script) as upstream, open_timers() as timers:
        given = {"name": "p", "base_url": f"{upstream.url}/v1", "api_key": KEY, **options}
        provider = OpenaiProvider(OpenaiOptions.model_validate(given), timers=timers, trust_env=False)
        try:
            yield provider, upstream
        finally:
            await provider.aclose()
        with trio.fail_after(20):
            await upstream.wait_open(0)


async def plain(provider: OpenaiProvider) -> Any:
    return await provider.complete(CALL)


async def drain(provider: OpenaiProvider) -> list[Frame]:
    frames: list[Frame] = []
    async with provider.open_stream(CALL) as source:
        while batch := await source.receive():
            frames += batch
    return frames


Ask = Callable[[OpenaiProvider], Awaitable[Any]]
BOTH = pytest.mark.parametrize("ask", [plain, drain])

# --- no answer, or half of one -------------------------------------------------------------------


@BOTH
async def test_hangs_up_before_the_status(ask: Ask) -> None:
    async with provider_for(sends()) as (provider, upstream):
        with pytest.raises(UpstreamConnectionError) as caught:
            await ask(provider)
        shows_nothing(caught.value, upstream)


@BOTH
async def test_silence_before_the_status(ask: Ask, clock: MockClock) -> None:
    async with provider_for(stalls_after(), first_byte_timeout_s=40) as (provider, upstream):
        with pytest.raises(UpstreamTimeoutError, match="first byte timeout"):
            await ask(provider)
        await upstream.gone.wait()


@pytest.mark.parametrize(("ask", "sent"), [(plain, HEAD_OF_BODY), (drain, START)])
async def test_hangs_up_in_the_middle(ask: Ask, sent: bytes) -> None:
    async with provider_for(sends(sent)) as (provider, _):
        with pytest.raises(UpstreamProtocolError, match="broke off"):
            await ask(provider)


@pytest.mark.parametrize(("ask", "sent"), [(plain, HEAD_OF_BODY), (drain, START)])
async def test_silence_in_the_middle(ask: Ask, sent: bytes, clock: MockClock) -> None:
    async with provider_for(stalls_after(sent), idle_timeout_s=20) as (provider, upstream):
        start = trio.current_time()
        with pytest.raises(UpstreamTimeoutError, match="idle timeout"):
            await ask(provider)
        assert trio.current_time() - start == pytest.approx(20, abs=1)
        await upstream.gone.wait()


@pytest.mark.parametrize(
    "sent", [b"", piece(HELLO), piece(b"data: [DO"), piece(HELLO + b"data: [DONE]"), piece(DONE)]
)
async def test_a_clean_end_before_the_answer_had_one_is_a_failure(sent: bytes) -> None:
    # "Silent clean end when the upstream hangs up" is what the others get wrong.
    async with provider_for(sends(STREAM_HEAD + sent + LAST_CHUNK)) as (provider, _):
        with pytest.raises(UpstreamProtocolError) as caught:
            await drain(provider)
        assert caught.value.status == 502


async def test_a_hang_up_after_the_finish_reason_is_an_end_without_done() -> None:
    sent = START + piece(chunk(finish="stop")) + LAST_CHUNK
    async with provider_for(sends(sent)) as (provider, _):
        assert [frame.event for frame in await drain(provider)][-2:] == ["message_delta", "message_stop"]


def chatters_after(data: bytes) -> Script:
    """Sends ``data``, then a comment every five seconds, for ever."""

    async def script(exchange: Exchange) -> None:
        await exchange.send(data)
        while True:
            await trio.sleep(5)
            await exchange.send(piece(b": still here\n\n"))

    return script


@pytest.mark.parametrize("ending", [sends, stalls_after, chatters_after])
async def test_nor_is_anything_missed_after_the_finish_reason(
    ending: Callable[[bytes], Script], clock: MockClock
) -> None:
    # No [DONE], no usage, no last chunk: the connection breaks, or stays, or is kept busy.
    async with provider_for(ending(START + piece(chunk(finish="stop")))) as (provider, _):
        start = trio.current_time()
        assert (await drain(provider))[-1].event == "message_stop"
        assert trio.current_time() - start < TAIL_TIMEOUT_S + 1


async def test_done_is_an_end_though_the_connection_stays() -> None:
    async with provider_for(stalls_after(START + piece(chunk(finish="stop") + DONE))) as (provider, upstream):
        assert (await drain(provider))[-1].event == "message_stop"
        with trio.fail_after(5):
            await upstream.gone.wait()


async def test_frames_before_an_error_are_delivered() -> None:
    sent = STREAM_HEAD + piece(HELLO + event(error={"message": "busy", "code": 529})) + LAST_CHUNK
    async with provider_for(sends(sent)) as (provider, _), provider.open_stream(CALL) as source:
        first = await source.receive()
        assert [f.event for f in first] == ["message_start", "content_block_start", "content_block_delta"]
        for _ in range(2):
            with pytest.raises(UpstreamStatusError, match="busy") as caught:
                await source.receive()
            assert (caught.value.status, caught.value.error_type) == (529, "overloaded_error")


async def test_a_frame_without_end() -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.send(STREAM_HEAD)
        while True:
            await exchange.send_chunk(b"data: " + b"x" * 10_000)

    async with provider_for(script, max_frame_bytes=50_000) as (provider, upstream):
        with pytest.raises(UpstreamProtocolError, match="50000 bytes"):
            await drain(provider)
        await upstream.gone.wait()


# --- something else ------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize(
    "other",
    [
        answer(200, b"<html>hello</html>", "text/html"),
        answer(200, b"[1]"),
        answer(200, b"{}"),
        answer(200, b'{"choices":[]}'),
        answer(200, b'{"choices":[{"message":"x"}]}'),
        answer(200, b""),
        answer(204, b""),
        answer(307, b"{}", "application/json", "location: /v1/other"),
    ],
)
async def test_not_what_was_asked_for(ask: Ask, other: bytes) -> None:
    async with provider_for(sends(other)) as (provider, upstream):
        with pytest.raises(UpstreamProtocolError) as caught:
            await ask(provider)
        assert caught.value.status == 502
        shows_nothing(caught.value, upstream)


@pytest.mark.parametrize(
    "call",
    [
        {"id": "a", "function": {"name": "f", "arguments": "no"}},
        {"id": "a", "function": {"name": "f", "arguments": '{"a" b'}},
        {"id": "a", "function": {"arguments": "{}"}},
        {"id": "a"},
    ],
)
async def test_calls_that_make_no_sense(call: dict[str, Any]) -> None:
    body = orjson.dumps(completion({"content": None, "tool_calls": [call]}, "tool_calls"))
    async with provider_for(sends(answer(200, body))) as (provider, _):
        with pytest.raises(UpstreamProtocolError):
            await plain(provider)


@BOTH
@pytest.mark.parametrize("wrap", [lambda error: {"error": error}, lambda error: [{"error": error}]])
async def test_an_error_with_status_200(ask: Ask, wrap: Callable[[Any], Any]) -> None:
    body = orjson.dumps(wrap({"message": "slow down", "code": 429}))
    async with provider_for(sends(answer(200, body))) as (provider, _):
        with pytest.raises(UpstreamStatusError, match="slow down") as caught:
            await ask(provider)
        assert (caught.value.status, caught.value.error_type) == (429, "rate_limit_error")


async def test_usage_that_is_not_told_is_estimated() -> None:
    body = orjson.dumps(completion({"content": "eight ch"}, usage=None))
    async with provider_for(sends(answer(200, body))) as (provider, _):
        usage = (await plain(provider)).usage
    async with provider_for(sends(START + piece(chunk(finish="stop") + DONE) + LAST_CHUNK)) as (provider, _):
        streamed = orjson.loads((await drain(provider))[-2].data)["usage"]
    assert usage.keys() == streamed.keys()
    assert usage["input_tokens"] == streamed["input_tokens"] > 3
    assert (usage["output_tokens"], streamed["output_tokens"]) == (2, 2)


# --- it says no ----------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize(
    ("status", "body", "type_", "text"),
    [
        # https://platform.openai.com/docs/guides/error-codes
        (
            401,
            {
                "error": {
                    "message": "Incorrect API key",
                    "type": "invalid_request_error",
                    "code": "invalid_api_key",
                }
            },
            "authentication_error",
            "Incorrect API key",
        ),
        (
            404,
            {"error": {"message": "no such model", "type": "invalid_request_error"}},
            "not_found_error",
            "no such model",
        ),
        (429, {"error": {"message": "quota", "type": "insufficient_quota"}}, "rate_limit_error", "quota"),
        (
            400,
            {"error": {"message": "too long", "code": "context_length_exceeded"}},
            "invalid_request_error",
            "too long",
        ),
        (500, {"error": {"message": "sorry", "type": "server_error"}}, "api_error", "sorry"),
        (503, {"error": {"message": "overloaded"}}, "api_error", "overloaded"),
        # https://openrouter.ai/docs/api-reference/errors
        (402, {"error": {"message": "credits", "code": 402}}, "billing_error", "credits"),
        # Mistral and vLLM
        (
            422,
            {"detail": [{"loc": ["body"], "msg": "extra"}]},
            "invalid_request_error",
            '[{"loc":["body"],"msg":"extra"}]',
        ),
        (
            400,
            {"object": "error", "message": "bad", "type": "BadRequestError"},
            "invalid_request_error",
            "bad",
        ),
        (404, {"detail": "Not Found"}, "not_found_error", "Not Found"),
        # https://ai.google.dev/gemini-api/docs/openai
        (
            400,
            [{"error": {"code": 400, "message": "bad", "status": "INVALID_ARGUMENT"}}],
            "invalid_request_error",
            "bad",
        ),
        # Ollama
        (404, {"error": "model not found"}, "not_found_error", "model not found"),
        (529, None, "overloaded_error", "the upstream answered with status 529"),
        (413, {"error": {}}, "request_too_large", "the upstream answered with status 413"),
    ],
)
async def test_the_status_decides_the_type(ask: Ask, status: int, body: Any, type_: str, text: str) -> None:
    async with provider_for(sends(answer(status, orjson.dumps(body)))) as (provider, _):
        with pytest.raises(UpstreamStatusError) as caught:
            await ask(provider)
        error = caught.value
        assert (error.status, error.error_type, error.message) == (status, type_, text)


@BOTH
async def test_groqs_status_for_no_capacity_is_overload(ask: Ask) -> None:
    # https://console.groq.com/docs/errors
    async with provider_for(sends(answer(498, b'{"error":{"message":"flex"}}'))) as (provider, _):
        with pytest.raises(UpstreamStatusError, match="flex") as caught:
            await ask(provider)
        assert (caught.value.status, caught.value.error_type) == (529, "overloaded_error")


@BOTH
async def test_retry_after_is_kept(ask: Ask) -> None:
    # "Dropped retry-after" is what the others get wrong.
    extra = (
        "Retry-After: 7",
        "retry-after-ms: 6500",
        "x-ratelimit-remaining-requests: 0",
        "openai-organization: o",
    )
    reply = answer(429, b'{"error":{"message":"slow down"}}', "application/json", *extra)
    async with provider_for(sends(reply)) as (provider, _):
        with pytest.raises(UpstreamStatusError) as caught:
            await ask(provider)
        assert dict(caught.value.headers) == {"retry-after": "7", "retry-after-ms": "6500"}


@BOTH
async def test_an_error_text_is_scrubbed(ask: Ask) -> None:
    async def script(exchange: Exchange) -> None:
        text = f"{KEY} refused by http://{exchange.request.headers['host']}/v1/chat/completions"
        await exchange.send(answer(403, orjson.dumps({"error": {"message": text}})))

    async with provider_for(script) as (provider, upstream):
        with pytest.raises(UpstreamStatusError, match="refused by") as caught:
            await ask(provider)
        shows_nothing(caught.value, upstream)


@BOTH
async def test_an_error_whose_body_breaks_off_keeps_its_status(ask: Ask) -> None:
    reply = b"HTTP/1.1 429 X\r\nretry-after: 3\r\ncontent-length: 90\r\n\r\n{"
    async with provider_for(sends(reply)) as (provider, _):
        with pytest.raises(UpstreamStatusError) as caught:
            await ask(provider)
        assert (caught.value.status, dict(caught.value.headers)) == (429, {"retry-after": "3"})


async def test_nothing_is_passed_on() -> None:
    async with provider_for(sends()) as (provider, upstream):
        with pytest.raises(UnsupportedError):
            await provider.forward(ForwardCall("POST", "/v1/messages/new", b"{}", ()))
        assert not upstream.connections


# --- keys ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("auth", "header", "shown"), [("bearer", "authorization", "Bearer "), ("api-key", "api-key", "")]
)
async def test_each_call_presents_the_key_it_names(auth: str, header: str, shown: str) -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.send(answer(200, orjson.dumps(completion({"content": "hi"}))))

    keys = [{"name": "one", "key": "sk-1"}, {"name": "two", "key": "sk-2"}]
    async with provider_for(script, api_key=None, api_keys=keys, auth=auth) as (provider, upstream):
        for name in ("one", "two"):
            await provider.complete(replace(CALL, key_name=name))
        provider.keys.cool("one", CALL.model, 60.0)
        await provider.complete(CALL)
        assert [dict(request.headers)[header] for request in upstream.requests] == [
            f"{shown}{key}" for key in ("sk-1", "sk-2", "sk-2")
        ]
