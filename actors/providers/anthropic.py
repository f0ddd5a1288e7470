"""An upstream that speaks the Messages API. Bytes through: see :mod:`actors.providers.splice`.

https://docs.anthropic.com/en/api/messages, .../messages-streaming, .../errors, .../versioning
"""

import re
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from random import Random
from typing import Any, NamedTuple
from urllib.parse import unquote

import orjson

from actors.errors import (
    ProviderError,
    UnsupportedError,
    UpstreamProtocolError,
    UpstreamTimeoutError,
)
from actors.providers.base import (
    Completion,
    ForwardAnswer,
    ForwardCall,
    Frame,
    FrameSource,
    ProviderCall,
    TokenCount,
)
from actors.providers.fallbacks import drop_fallbacks, own_fallbacks
from actors.providers.keys import ANY_MODEL, KeyRing, keys_of
from actors.providers.options import AnthropicOptions
from actors.providers.splice import set_model, set_stream
from actors.providers.sse_decoder import SSEDecoder, encode_frame
from actors.providers.transport import StreamResponse, make_transport
from actors.providers.upstream_errors import Scrubber, error_in_success, shown_headers, status_error
from actors.providers.version import user_agent
from actors.timers import Timers
from events.types import Headers

MESSAGES_PATH = "/v1/messages"
COUNT_TOKENS_PATH = "/v1/messages/count_tokens"

_FORWARDED_PREFIX = "anthropic-"
_SHOWN = frozenset({"content-type", "request-id"})
_FIELD_NAME = re.compile(r"[a-z0-9!#$%&'*+.^_`|~-]{1,128}")  # RFC 9110, 5.6.2
_FIELD_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")  # RFC 9110, 5.5
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,256}")
_FORWARDED_PATH = re.compile(r"/v1/messages/[A-Za-z0-9._~!$&'()*+,;=:@%/-]{1,1024}")


class AnthropicProvider:
    """One upstream. Satisfies :class:`actors.providers.base.Provider`."""

    kind = "anthropic"

    def __init__(
        self,
        options: AnthropicOptions,
        *,
        timers: Timers,
        trust_env: bool = True,
        secrets: Iterable[str] = (),
        random: Random | None = None,
    ) -> None:
        """``timers`` keep its time bounds; ``random`` draws the keys.

        ``secrets``: what no error may show beside keys and the address.
        """
        keys = keys_of(options)
        base_url = str(options.base_url)
        self.name = options.name
        self.keys = KeyRing(keys, cooldown_s=options.key_cooldown_s, random=random)
        self._options = options
        self._transport = make_transport(options, base_url, timers=timers, trust_env=trust_env)
        self._scrub = Scrubber(base_url, (*(key.secret for key in keys), *secrets))
        agent = ("user-agent", user_agent())
        self._headers: dict[str, Headers] = {"": (agent,)}
        for key in keys:
            presented = ("x-api-key", key.secret)
            if options.auth == "bearer":
                presented = ("authorization", f"Bearer {key.secret}")
            self._headers[key.name] = (agent, presented)

    async def complete(self, call: ProviderCall) -> Completion:
        """Ask for a plain answer. A 200 that is no Message is an UpstreamProtocolError."""
        body = _body_of(call, stream=False)
        answer = await self._call_json(MESSAGES_PATH, call, body)
        if answer.fields.get("type") != "message":
            raise error_in_success(answer.fields, answer.body, self._scrub)
        usage = answer.fields.get("usage")
        return Completion(answer.body, usage if isinstance(usage, dict) else {}, answer.request_id)

    @asynccontextmanager
    async def open_stream(self, call: ProviderCall) -> AsyncIterator[FrameSource]:
        """Ask for a stream. A 200 that is no event stream is an UpstreamProtocolError."""
        body = _body_of(call, stream=True)
        headers = self._request_headers(call.headers, self._key_of(call), accept="text/event-stream")
        async with self._transport.open_stream("POST", MESSAGES_PATH, headers=headers, body=body) as response:
            await self._raise_for_status(response)
            if _media_type(response) != "text/event-stream":
                raise UpstreamProtocolError("the upstream's answer is not an event stream")
            yield _Frames(response, SSEDecoder(self._options.max_frame_bytes), self._scrub)

    async def count_tokens(self, call: ProviderCall) -> TokenCount:
        """The upstream's own count."""
        body = set_model(_without_fallbacks(call), call.model)
        answer = await self._call_json(COUNT_TOKENS_PATH, call, body)
        count = answer.fields.get("input_tokens")
        if not isinstance(count, int) or isinstance(count, bool) or count < 0:
            raise UpstreamProtocolError("the upstream's token count is not one")
        return TokenCount(count)

    async def forward(self, call: ForwardCall) -> ForwardAnswer:
        """Pass a request on, whatever the answer's status. Raises UnsupportedError for a path elsewhere."""
        check_forwarded_path(call.path)
        content_type = next((v for k, v in call.headers if k.lower() == "content-type"), None)
        headers = self._request_headers(call.headers, self.keys.pick(ANY_MODEL), content_type=content_type)
        answer = await self._transport.request(call.method, call.path, headers=headers, body=call.body)
        failed = answer.status >= 400
        return ForwardAnswer(
            answer.status,
            self._scrub.bytes(answer.body) if failed else answer.body,
            shown_headers(answer.headers, self._scrub, also=_SHOWN),
        )

    async def aclose(self) -> None:
        """Close all connections, within a bound, also when cancelled. Open calls fail."""
        await self._transport.aclose()

    async def _call_json(self, path: str, call: ProviderCall, body: bytes) -> "_JsonAnswer":
        headers = self._request_headers(call.headers, self._key_of(call))
        async with self._transport.open_stream("POST", path, headers=headers, body=body) as response:
            await self._raise_for_status(response)
            if "json" not in _media_type(response):
                raise UpstreamProtocolError("the upstream's answer is not JSON")
            answer = await response.read()
            request_id = _request_id(response)
        try:
            parsed = orjson.loads(answer)
        except orjson.JSONDecodeError as error:
            raise UpstreamProtocolError("the upstream's answer is not JSON") from error
        if not isinstance(parsed, dict):
            raise UpstreamProtocolError("the upstream's answer is not a JSON object")
        return _JsonAnswer(answer, parsed, request_id)

    async def _raise_for_status(self, response: StreamResponse) -> None:
        if response.status == 200:
            return
        if response.status < 400:
            raise UpstreamProtocolError(f"the upstream answered with status {response.status}")
        try:
            body = await response.read()
        except (UpstreamProtocolError, UpstreamTimeoutError):
            body = b""  # the status alone says enough
        raise status_error(response.status, response.headers, body, self._scrub)

    def _key_of(self, call: ProviderCall) -> str:
        return call.key_name or self.keys.pick(call.model)

    def _request_headers(
        self,
        headers: Headers,
        key_name: str,
        *,
        accept: str = "application/json",
        content_type: str | None = "application/json",
    ) -> Headers:
        named = tuple(
            (name.lower(), value) for name, value in headers if name.lower().startswith(_FORWARDED_PREFIX)
        )
        for name, value in named:
            if not _FIELD_NAME.fullmatch(name) or not _FIELD_VALUE.fullmatch(value):
                raise ProviderError("a header of the request cannot be passed on", status=400)
        sent = (*self._headers[key_name], ("accept", accept), *named)
        if content_type is not None and _FIELD_VALUE.fullmatch(content_type):
            sent += (("content-type", content_type),)
        if not any(name == "anthropic-version" for name, _ in named):
            sent += (("anthropic-version", self._options.anthropic_version),)
        return sent


def _body_of(call: ProviderCall, *, stream: bool) -> bytes:
    """The client's bytes; where the model or the way of answering differ, only those values are another's."""
    body = _without_fallbacks(call)
    if call.fields.get("model") != call.model:
        body = set_model(body, call.model)
    if bool(call.fields.get("stream")) is not stream:
        body = set_stream(body, stream)
    return body


def _without_fallbacks(call: ProviderCall) -> bytes:
    """The client's bytes; what ``fallbacks`` says to the gateway is not for the upstream."""
    return drop_fallbacks(call.body) if own_fallbacks(call.fields) else call.body


class _JsonAnswer(NamedTuple):
    body: bytes
    fields: Mapping[str, Any]
    """The same, parsed."""
    request_id: str | None


class _Frames:
    """A :class:`FrameSource` over an answer."""

    def __init__(self, response: StreamResponse, decoder: SSEDecoder, scrub: Scrubber) -> None:
        self.upstream_request_id = _request_id(response)
        self._response = response
        self._decoder = decoder
        self._scrub = scrub

    async def receive(self) -> list[Frame]:
        while chunk := await self._response.receive():
            frames = self._decoder.feed(chunk)
            if frames:
                return [self._shown(f) if f.event == "error" else f for f in frames]
        self._decoder.close()
        return []

    def _shown(self, frame: Frame) -> Frame:
        data = self._scrub.bytes(frame.data)
        if data is frame.data:
            return frame
        return Frame(frame.event, data, encode_frame(frame.event, data))


def check_forwarded_path(path: str) -> None:
    """Raise UnsupportedError unless ``path`` stays below ``/v1/messages/``, once decoded too."""
    segments = unquote(path).split("/")
    if not _FORWARDED_PATH.fullmatch(path) or any(s in (".", "..") or "\\" in s for s in segments):
        raise UnsupportedError("there is no such path")


def _media_type(response: StreamResponse) -> str:
    return (response.header("content-type") or "").partition(";")[0].strip().lower()


def _request_id(response: StreamResponse) -> str | None:
    value = response.header("request-id")
    return value if value and _REQUEST_ID.fullmatch(value) else None
