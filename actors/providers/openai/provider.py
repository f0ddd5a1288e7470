"""An upstream that speaks Chat Completions: the calls. What is said in them is translated beside this file.

https://platform.openai.com/docs/api-reference/chat
"""

import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from random import Random
from typing import Any, NamedTuple

import orjson
import trio

from actors.errors import ProviderError, UnsupportedError, UpstreamProtocolError, UpstreamTimeoutError
from actors.providers.base import (
    Completion,
    ForwardAnswer,
    ForwardCall,
    Frame,
    FrameSource,
    ProviderCall,
    TokenCount,
)
from actors.providers.keys import KeyRing, keys_of
from actors.providers.openai.counter import UpstreamCounter
from actors.providers.openai.dialect import dialect_of
from actors.providers.openai.errors import status_error, stream_error
from actors.providers.openai.request import translate_request
from actors.providers.openai.response import answer_chars, estimated_usage, translate_response
from actors.providers.openai.stream import StreamTranslator
from actors.providers.openai.tokens import estimate_tokens
from actors.providers.options import OpenaiOptions
from actors.providers.sse_decoder import SSEDecoder
from actors.providers.transport import StreamResponse, make_transport
from actors.providers.upstream_errors import Scrubber
from actors.providers.version import user_agent
from actors.timers import Timers
from events.types import Headers

CHAT_PATH = "/chat/completions"
VERSION_PATH = "/v1"
TAIL_TIMEOUT_S = 10.0
"""How long is read on once the finish reason is here, whatever comes. The answer is whole then, and ends."""
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,256}")


class OpenaiProvider:
    """One upstream and its keys. Satisfies :class:`actors.providers.base.Provider`.

    A refused request is a 400 that names the field, before the upstream is called. Where the upstream
    never tells a usage, the Message has an estimate. ``anthropic-*`` headers mean nothing to it.
    """

    kind = "openai"

    def __init__(
        self,
        options: OpenaiOptions,
        *,
        timers: Timers,
        trust_env: bool = True,
        random: Random | None = None,
    ) -> None:
        """``timers`` keep its time bounds. ``random`` draws the keys."""
        keys = keys_of(options)
        base_url, _, query = str(options.base_url).partition("?")
        base_url = base_url.rstrip("/")
        # Token counters lie beside the version, not below it.
        root = base_url.removesuffix(VERSION_PATH)
        self._base_path = base_url.removeprefix(root)
        self._query = f"?{query}" if query else ""
        self.name = options.name
        self.keys = KeyRing(keys, cooldown_s=options.key_cooldown_s, random=random)
        self._options = options
        self._transport = make_transport(options, root, timers=timers, trust_env=trust_env)
        self._scrub = Scrubber(base_url, [key.secret for key in keys])
        self._dialect_of = dialect_of(options)
        common: Headers = (("user-agent", user_agent()), ("content-type", "application/json"))
        self._headers: dict[str, Headers] = {"": common}
        for key in keys:
            presented = ("authorization", f"Bearer {key.secret}")
            if self._dialect_of("").auth == "api-key":
                presented = ("api-key", key.secret)
            self._headers[key.name] = (*common, presented)
        self._counter = UpstreamCounter(self._transport, base_path=self._base_path, query=self._query)

    async def complete(self, call: ProviderCall) -> Completion:
        """Ask for a plain answer. A 200 that is no completion is an UpstreamProtocolError."""
        request = self._request(call, stream=False)
        async with self._open(call, request, accept="application/json") as response:
            if "json" not in _media_type(response):
                raise UpstreamProtocolError("the upstream's answer is not JSON")
            parsed = _parse_object(await response.read())
            request_id = _request_id(response)
        if parsed.get("error") or parsed.get("object") == "error":
            raise stream_error(parsed, self._scrub)
        message = translate_response(parsed, model=call.model, stop_sequences=_stop_sequences(call))
        if not message["usage"]:
            tokens = await _estimate(request)
            message["usage"] = estimated_usage(tokens, answer_chars(message["content"]))
        return Completion(orjson.dumps(message), message["usage"], request_id)

    @asynccontextmanager
    async def open_stream(self, call: ProviderCall) -> AsyncIterator[FrameSource]:
        """Ask for a stream. A 200 that is no event stream is the error it holds, or a protocol error."""
        request = self._request(call, stream=True)
        async with self._open(call, request, accept="text/event-stream") as response:
            if _media_type(response) != "text/event-stream":
                await self._raise_for_no_stream(response)
            translator = StreamTranslator(
                model=call.model, scrub=self._scrub, stop_sequences=_stop_sequences(call)
            )
            yield _Frames(
                response, SSEDecoder(self._options.max_frame_bytes, named=False), translator, request
            )

    async def count_tokens(self, call: ProviderCall) -> TokenCount:
        """The upstream's own count where it has a counter, else an estimate, which says so. At least 1."""
        request = self._request(call, stream=False)
        _encode(request)
        if self._options.upstream_counts and self._dialect_of(call.model).counts:
            count = await self._counter.count(request, self._headers_of(call))
            if count is not None:
                return TokenCount(count)
        return TokenCount(await _estimate(request), estimated=True)

    async def forward(self, call: ForwardCall) -> ForwardAnswer:
        """Always UnsupportedError."""
        raise UnsupportedError(f"the provider {self.name} has no such path")

    async def aclose(self) -> None:
        """Close all connections, within a bound, also when cancelled. Open calls fail."""
        await self._transport.aclose()

    def _headers_of(self, call: ProviderCall) -> Headers:
        return self._headers[call.key_name or self.keys.pick(call.model)]

    def _request(self, call: ProviderCall, *, stream: bool) -> dict[str, Any]:
        return translate_request(
            call.fields,
            model=call.model,
            dialect=self._dialect_of(call.model),
            stream=stream,
            passed_fields=self._options.passed_fields,
        )

    @asynccontextmanager
    async def _open(
        self, call: ProviderCall, request: Mapping[str, Any], *, accept: str
    ) -> AsyncIterator[StreamResponse]:
        body = _encode(request)
        headers = (*self._headers_of(call), ("accept", accept))
        path = self._base_path + CHAT_PATH + self._query
        async with self._transport.open_stream("POST", path, headers=headers, body=body) as response:
            if response.status != 200:
                await self._raise_for_status(response)
            yield response

    async def _raise_for_status(self, response: StreamResponse) -> None:
        if response.status < 400:
            raise UpstreamProtocolError(f"the upstream answered with status {response.status}")
        try:
            body = await response.read()
        except (UpstreamProtocolError, UpstreamTimeoutError):
            body = b""  # the status alone says enough
        raise status_error(response.status, response.headers, body, self._scrub)

    async def _raise_for_no_stream(self, response: StreamResponse) -> None:
        if "json" in _media_type(response):
            parsed = _parse_object(await response.read())
            if parsed.get("error") or parsed.get("object") == "error":
                raise stream_error(parsed, self._scrub)
        raise UpstreamProtocolError("the upstream's answer is not an event stream")


class _Ended(NamedTuple):
    """How a stream ended, for the reads that follow."""

    error: ProviderError | None


class _Frames:
    """A :class:`FrameSource` over an answer."""

    def __init__(
        self,
        response: StreamResponse,
        decoder: SSEDecoder,
        translator: StreamTranslator,
        request: Mapping[str, Any],
    ) -> None:
        self.upstream_request_id = _request_id(response)
        self._response = response
        self._decoder = decoder
        self._translator = translator
        self._request = request
        self._tail_until: float | None = None
        self._ended: _Ended | None = None

    async def receive(self) -> list[Frame]:
        """See the port. An upstream that hangs up before it was done is an UpstreamProtocolError."""
        while self._ended is None:
            frames = await self._next()
            if frames:
                return frames
        if self._ended.error is not None:
            raise self._ended.error
        return []

    async def _read(self) -> bytes:
        """The next bytes; none at the end. Once the answer is whole, only usage is missing, if anything."""
        if not self._translator.complete:
            return await self._response.receive()
        if self._tail_until is None:
            self._tail_until = trio.current_time() + TAIL_TIMEOUT_S
        with trio.move_on_at(self._tail_until), suppress(UpstreamProtocolError, UpstreamTimeoutError):
            return await self._response.receive()
        return b""

    async def _next(self) -> list[Frame]:
        """What the next read brings; an error after good frames is kept for the next call."""
        frames: list[Frame] = []
        try:
            chunk = await self._read()
            if not chunk:
                self._decoder.close()
                if not self._translator.complete:
                    raise UpstreamProtocolError("the upstream ended its stream before it had finished")
            else:
                for event, data, _ in self._decoder.feed(chunk):
                    frames += self._translator.feed(event, data)
            if not chunk or self._translator.done:
                frames += self._translator.finish(input_tokens=await self._input_tokens())
                self._ended = _Ended(None)
        except ProviderError as error:
            if self._translator.started:
                # Those upstreams tell usage at the end, which does not come.
                error.usage = self._translator.usage(input_tokens=await self._input_tokens())
            self._ended = _Ended(error)
        return frames

    async def _input_tokens(self) -> int:
        """An estimate, where one is needed."""
        return 0 if self._translator.counted else await _estimate(self._request)


def _encode(request: Mapping[str, Any]) -> bytes:
    try:
        return orjson.dumps(request)
    except orjson.JSONEncodeError:  # it reads deeper than it writes
        raise UnsupportedError("the request is nested too deeply", status=400) from None


async def _estimate(request: Mapping[str, Any]) -> int:
    """An estimate of a request's tokens, made in a thread; abandoned when cancelled."""
    return await trio.to_thread.run_sync(estimate_tokens, request, abandon_on_cancel=True)


def _parse_object(body: bytes) -> dict[str, Any]:
    try:
        parsed = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise UpstreamProtocolError("the upstream's answer is not JSON") from error
    if isinstance(parsed, list) and parsed and isinstance(parsed[0], dict):
        parsed = parsed[0]  # Gemini wraps its errors so
    if not isinstance(parsed, dict):
        raise UpstreamProtocolError("the upstream's answer is not a JSON object")
    return parsed


def _stop_sequences(call: ProviderCall) -> tuple[str, ...]:
    given = call.fields.get("stop_sequences")
    return tuple(text for text in given if isinstance(text, str)) if isinstance(given, list) else ()


def _media_type(response: StreamResponse) -> str:
    return (response.header("content-type") or "").partition(";")[0].strip().lower()


def _request_id(response: StreamResponse) -> str | None:
    value = response.header("x-request-id") or response.header("request-id")
    return value if value and _REQUEST_ID.fullmatch(value) else None
