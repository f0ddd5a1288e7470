"""A provider, a fake upstream, and ways for it to misbehave: shared by the tests of upstream faults."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import orjson
import pytest
import trio
import trio.testing

from actors.errors import (
    ProviderError,
)
from actors.providers.anthropic import AnthropicProvider
from actors.providers.base import Frame, ProviderCall
from actors.providers.options import AnthropicOptions
from actors.timers import open_timers
from tests.fake_upstream import (
    STREAM_HEAD,
    Exchange,
    FakeUpstream,
    Script,
    message_frames,
    open_upstream,
)

KEY = "sk-upstream-secret"
CLOSE_BOUND_S = 0.5
FIELDS = {"model": "m", "max_tokens": 5, "messages": [{"role": "user", "content": "hi"}]}
CALL = ProviderCall(body=orjson.dumps(FIELDS), fields=FIELDS, model="m")


def options_for(url: str, **options: Any) -> AnthropicOptions:
    return AnthropicOptions.model_validate({"name": "p", "base_url": url} | options)


@asynccontextmanager
async def provider_for(
    script: Script, **options: Any
) -> AsyncIterator[tuple[AnthropicProvider, FakeUpstream]]:
    """A provider and the upstream it calls. On leaving, no connection but idle ones may be open."""
    greets = options.pop("greets", True)
    async with open_upstream(script, greets=greets) as upstream, open_timers() as timers:
        provider = AnthropicProvider(
            options_for(upstream.url, api_key=KEY, **options), timers=timers, trust_env=False
        )
        try:
            yield provider, upstream
        finally:
            await provider.aclose()
        with trio.fail_after(20):
            await upstream.wait_open(0)


async def drain(provider: AnthropicProvider) -> list[Frame]:
    frames: list[Frame] = []
    async with provider.open_stream(CALL) as source:
        while batch := await source.receive():
            frames += batch
    return frames


async def plain(provider: AnthropicProvider) -> Any:
    return await provider.complete(CALL)


Ask = Callable[[AnthropicProvider], Awaitable[Any]]
BOTH = pytest.mark.parametrize("ask", [plain, drain])


def shows_nothing(error: ProviderError, upstream: FakeUpstream) -> None:
    text = error.message + repr(error.headers)
    assert KEY not in text
    assert "127.0.0.1" not in text
    assert upstream.url.rpartition(":")[2] not in text


def sends(*pieces: bytes) -> Script:
    async def script(exchange: Exchange) -> None:
        for piece in pieces:
            await exchange.send(piece)

    return script


def stalls_after(*pieces: bytes) -> Script:
    async def script(exchange: Exchange) -> None:
        for piece in pieces:
            await exchange.send(piece)
        await exchange.stall()

    return script


async def never(exchange: Exchange) -> None:
    raise AssertionError("no request was expected")


HEAD_OF_BODY = (
    b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 500\r\n\r\n" + b'{"type"'
)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


START = STREAM_HEAD + chunk(message_frames("one two")[0])
