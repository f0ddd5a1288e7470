"""Token counts: estimated, and asked for."""

import base64
import struct
import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import orjson
import pytest
import trio
from trio.testing import MockClock

from actors.providers.base import ProviderCall, TokenCount
from actors.providers.openai.counter import COUNT_TIMEOUT_S, REMEMBERED_S
from actors.providers.openai.dialect import Dialect
from actors.providers.openai.provider import OpenaiProvider
from actors.providers.openai.request import translate_request
from actors.providers.openai.tokens import IMAGE_BASE_TOKENS, IMAGE_TILE_TOKENS, estimate_tokens
from actors.providers.options import OpenaiOptions
from actors.timers import open_timers
from tests.fake_upstream import Exchange, FakeUpstream, answer, open_upstream

HI = {"role": "user", "content": "Hello there"}
TOOL = {
    "name": "f",
    "description": "What a tool is for.",
    "input_schema": {"type": "object", "properties": {}},
}


def estimate(**fields: Any) -> int:
    return estimate_tokens(
        translate_request({"messages": [HI], **fields}, model="m", dialect=Dialect(), stream=False)
    )


def image(width: int, height: int) -> dict[str, Any]:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    check = zlib.crc32(b"IHDR" + header)
    png = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", check)
    data = base64.b64encode(png).decode()
    return {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}}


def pictured(*images: dict[str, Any]) -> int:
    """Tokens of images alone."""
    text = {"type": "text", "text": "a"}
    with_them = estimate(messages=[{"role": "user", "content": [text, *images]}])
    return with_them - estimate(messages=[{"role": "user", "content": "a"}])


# --- estimates -----------------------------------------------------------------------------------


def test_known_counts() -> None:
    # What tiktoken's o200k_base says of them.
    assert estimate(messages=[{"role": "user", "content": "hello world"}]) == 3 + 4 + 2
    assert estimate(messages=[{"role": "user", "content": "antidisestablishmentarianism"}]) == 3 + 4 + 6


def test_everything_that_is_read_is_counted() -> None:
    called = {"type": "tool_use", "id": "a", "name": "get_weather", "input": {"city": "Paris"}}
    answered = {"type": "tool_result", "tool_use_id": "a", "content": "sunny with some clouds"}
    counts = [
        estimate(),
        estimate(system="Be brief."),
        estimate(system="Be brief.", tools=[TOOL]),
        estimate(system="Be brief.", tools=[TOOL, TOOL]),
        estimate(
            system="Be brief.",
            tools=[TOOL, TOOL],
            messages=[
                HI,
                {"role": "assistant", "content": [called]},
                {"role": "user", "content": [answered]},
            ],
        ),
    ]
    assert counts == sorted(set(counts))


def test_never_nothing() -> None:
    assert estimate(messages=[{"role": "user", "content": ""}]) > 0
    assert estimate(messages=[{"role": "assistant", "content": []}]) > 0


def test_long_texts_are_counted_in_pieces() -> None:
    assert estimate(messages=[{"role": "user", "content": "word " * 100_000}]) == pytest.approx(
        100_000, rel=0.01
    )


@pytest.mark.parametrize(
    ("size", "tiles"),
    [((10, 10), 1), ((512, 512), 1), ((1024, 1024), 4), ((2048, 4096), 6), ((4096, 100), 4)],
)
def test_images_by_their_tiles(size: tuple[int, int], tiles: int) -> None:
    # https://platform.openai.com/docs/guides/images-vision#calculating-costs
    assert pictured(image(*size)) == IMAGE_BASE_TOKENS + IMAGE_TILE_TOKENS * tiles


def test_images_of_no_known_size() -> None:
    by_url = {"type": "image", "source": {"type": "url", "url": "https://x/y.png"}}
    garbage = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "!!!"}}
    assert pictured(by_url) == pictured(garbage) == IMAGE_BASE_TOKENS + IMAGE_TILE_TOKENS * 4


# --- counters ------------------------------------------------------------------------------------

FIELDS = {"model": "m", "messages": [{"role": "user", "content": "hello world"}], "tools": [TOOL]}
CALL = ProviderCall(body=orjson.dumps(FIELDS), fields=FIELDS, model="m")
Answers = Callable[[str, dict[str, Any]], tuple[int, Any]]


@asynccontextmanager
async def counting(answers: Answers, **options: Any) -> AsyncIterator[tuple[OpenaiProvider, FakeUpstream]]:
    """A provider whose upstream answers by path and body."""

    async def script(exchange: Exchange) -> None:
        exchange.keep_alive()
        status, body = answers(exchange.request.path, orjson.loads(exchange.request.body))
        await exchange.send(answer(status, orjson.dumps(body)))

    async with open_upstream(script) as upstream, open_timers() as timers:
        given = {"name": "p", "base_url": f"{upstream.url}/v1", **options}
        provider = OpenaiProvider(OpenaiOptions.model_validate(given), timers=timers, trust_env=False)
        yield provider, upstream
        await provider.aclose()


def nothing(path: str, body: dict[str, Any]) -> tuple[int, Any]:
    return 404, {"detail": "Not Found"}


def always(status: int, answered: object) -> Answers:
    return lambda _path, _body: (status, answered)


def llama(path: str, body: dict[str, Any]) -> tuple[int, Any]:
    # As the recorded server answers, which takes the chat request but for its stream.
    if path == "/v1/chat/completions/input_tokens" and "stream" not in body and body["tools"]:
        return 200, {"input_tokens": 42, "object": "response.input_tokens"}
    return nothing(path, body)


def vllm(path: str, body: dict[str, Any]) -> tuple[int, Any]:
    # https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html#tokenizer-api
    if path == "/tokenize" and body.keys() == {"model", "messages", "tools", "add_generation_prompt"}:
        return 200, {"count": 43, "max_model_len": 4096, "tokens": [1] * 43}
    return nothing(path, body)


def old_llama(path: str, body: dict[str, Any]) -> tuple[int, Any]:
    # Its /tokenize answers a request without content with no tokens: llama.cpp, tools/server/README.md.
    if path == "/apply-template":
        return 200, {"prompt": "<|im_start|>hello world"}
    if path == "/tokenize":
        return 200, {"tokens": [1] * len(body.get("content", ""))}
    return nothing(path, body)


@pytest.mark.parametrize(
    ("answers", "count", "asked_first", "asked_again"),
    [(llama, 42, 1, 1), (vllm, 43, 2, 1), (old_llama, 23, 4, 2)],
)
async def test_the_upstream_counts(answers: Answers, count: int, asked_first: int, asked_again: int) -> None:
    async with counting(answers) as (provider, upstream):
        assert await provider.count_tokens(CALL) == TokenCount(count)
        assert len(upstream.requests) == asked_first
        assert await provider.count_tokens(CALL) == TokenCount(count)
        assert len(upstream.requests) == asked_first + asked_again


async def test_an_upstream_that_cannot_is_not_asked_again_for_a_while() -> None:
    async with counting(nothing) as (provider, upstream):
        count = await provider.count_tokens(CALL)
        assert count.estimated
        assert count.input_tokens > 5
        asked = len(upstream.requests)
        assert asked == 3
        await provider.count_tokens(CALL)
        assert len(upstream.requests) == asked
        provider._counter._known_until -= REMEMBERED_S
        await provider.count_tokens(CALL)
        assert len(upstream.requests) == 2 * asked


async def test_an_upstream_that_must_not_be_asked() -> None:
    async with counting(llama, upstream_counts=False) as (provider, upstream):
        assert (await provider.count_tokens(CALL)).estimated
        assert not upstream.requests


@pytest.mark.parametrize("status", [401, 429, 500])
async def test_a_counter_that_fails_is_asked_again(status: int) -> None:
    async with counting(always(status, {})) as (provider, upstream):
        for asked in (1, 2):
            assert (await provider.count_tokens(CALL)).estimated
            assert len(upstream.requests) == asked


@pytest.mark.parametrize("body", [[], {}, {"input_tokens": 0}, {"input_tokens": True}, {"input_tokens": "x"}])
async def test_a_count_that_is_none(body: object) -> None:
    async with counting(always(200, body)) as (provider, _):
        assert (await provider.count_tokens(CALL)).estimated


async def test_a_counter_that_is_silent(clock: MockClock) -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.stall()

    async with open_upstream(script) as upstream, open_timers() as timers:
        provider = OpenaiProvider(
            OpenaiOptions.model_validate({"name": "p", "base_url": upstream.url}),
            timers=timers,
            trust_env=False,
        )
        start = trio.current_time()
        assert (await provider.count_tokens(CALL)).estimated
        assert trio.current_time() - start == pytest.approx(COUNT_TIMEOUT_S, abs=1)
        await upstream.gone.wait()
        await provider.aclose()


@pytest.fixture
def clock() -> MockClock:
    return MockClock(autojump_threshold=0.05)
