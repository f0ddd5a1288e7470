"""Upstreams that answer otherwise than they should, or say no: the right error, and nothing to see in it."""

import orjson
import pytest

from actors.errors import (
    UnsupportedError,
    UpstreamProtocolError,
    UpstreamStatusError,
)
from actors.providers.base import ForwardCall
from tests.fake_upstream import (
    Exchange,
    answer,
    message,
)
from tests.faults.upstream import (
    BOTH,
    KEY,
    Ask,
    drain,
    never,
    plain,
    provider_for,
    sends,
    shows_nothing,
)

pytestmark = pytest.mark.usefixtures("transport")

# --- something else ----------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize(
    "other",
    [
        answer(200, b"<html>hello</html>", "text/html"),
        answer(200, b"<html>hello</html>"),
        answer(200, b"[1]"),
        answer(200, b'{"type":"completion"}'),
        answer(200, b""),
        answer(204, b""),
        answer(301, b"", "text/html", "location: http://127.0.0.1:1/elsewhere"),
        answer(307, b"{}", "application/json", "location: /v1/other"),
    ],
)
async def test_not_what_was_asked_for(ask: Ask, other: bytes) -> None:
    async with provider_for(sends(other)) as (provider, upstream):
        with pytest.raises(UpstreamProtocolError) as caught:
            await ask(provider)
        assert caught.value.status == 502
        assert len(upstream.requests) == 1
        shows_nothing(caught.value, upstream)


async def test_a_message_for_a_stream() -> None:
    async with provider_for(sends(answer(200, orjson.dumps(message("hi"))))) as (provider, _):
        with pytest.raises(UpstreamProtocolError, match="event stream"):
            await drain(provider)


async def test_an_error_envelope_with_status_200() -> None:
    body = orjson.dumps({"type": "error", "error": {"type": "rate_limit_error", "message": "slow down"}})
    async with provider_for(sends(answer(200, body))) as (provider, _):
        with pytest.raises(UpstreamStatusError, match="slow down") as caught:
            await plain(provider)
        assert caught.value.status == 429


# --- it says no --------------------------------------------------------------------------------


def envelope(type_: str, text: str) -> bytes:
    return orjson.dumps({"type": "error", "error": {"type": type_, "message": text}})


@BOTH
@pytest.mark.parametrize(
    ("status", "body", "type_", "text"),
    [
        (429, envelope("rate_limit_error", "Number of tokens"), "rate_limit_error", "Number of tokens"),
        (400, envelope("new_kind_error", "prompt is too long"), "new_kind_error", "prompt is too long"),
        (
            401,
            envelope("authentication_error", "invalid x-api-key"),
            "authentication_error",
            "invalid x-api-key",
        ),
        (
            400,
            b'{"error":{"code":400,"message":"too long","type":"exceed_context_size_error"}}',
            "invalid_request_error",
            "too long",
        ),
        (
            401,
            b'{"error":{"message":"Invalid API Key","type":"authentication_error"}}',
            None,
            "Invalid API Key",
        ),
        (529, b"<html>", "overloaded_error", "the upstream answered with status 529"),
        (503, b"", "api_error", "the upstream answered with status 503"),
        (418, b'{"error":"teapot"}', "invalid_request_error", "the upstream answered with status 418"),
        (500, b'{"error":{"message":7}}', "api_error", "the upstream answered with status 500"),
    ],
)
async def test_status_type_and_text_are_kept(
    ask: Ask, status: int, body: bytes, type_: str | None, text: str
) -> None:
    async with provider_for(sends(answer(status, body))) as (provider, _):
        with pytest.raises(UpstreamStatusError) as caught:
            await ask(provider)
        error = caught.value
        assert (error.status, error.error_type, error.message) == (
            status,
            type_ or "authentication_error",
            text,
        )


@BOTH
async def test_retry_headers_are_kept_and_no_others(ask: Ask) -> None:
    reply = answer(
        429,
        envelope("rate_limit_error", "slow down"),
        "application/json",
        "Retry-After: 7",
        "retry-after-ms: 6500",
        "x-should-retry: true",
        "Anthropic-RateLimit-Requests-Remaining: 0",
        "anthropic-organization-id: org",
        "set-cookie: a=b",
        "server: secret-host",
        "anthropic-ratelimit-odd: caf\xe9",
    )
    async with provider_for(sends(reply)) as (provider, _):
        with pytest.raises(UpstreamStatusError) as caught:
            await ask(provider)
        assert dict(caught.value.headers) == {
            "retry-after": "7",
            "retry-after-ms": "6500",
            "x-should-retry": "true",
            "anthropic-ratelimit-requests-remaining": "0",
        }


@BOTH
async def test_an_error_text_is_scrubbed(ask: Ask) -> None:
    async def script(exchange: Exchange) -> None:
        host = exchange.request.headers["host"]
        text = f"{KEY} refused by http://{host}/v1/messages ({host.upper()})"
        await exchange.send(answer(403, envelope("permission_error", text)))

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


# --- the wildcard ------------------------------------------------------------------------------


async def test_forward_passes_any_status_on() -> None:
    async def script(exchange: Exchange) -> None:
        host = exchange.request.headers["host"]
        await exchange.send(answer(404, f"none at {host}".encode(), "text/plain", "request-id: r", "x-a: b"))

    async with provider_for(script) as (provider, upstream):
        headers = (("anthropic-beta", "b1"), ("content-type", "text/x"), ("authorization", "client"))
        result = await provider.forward(ForwardCall("POST", "/v1/messages/new", b"body", headers))
        assert (result.status, result.body) == (404, b"none at [removed]")
        assert dict(result.headers) == {"content-type": "text/plain", "request-id": "r"}
        (request,) = upstream.requests
        assert (request.method, request.path, request.body) == ("POST", "/v1/messages/new", b"body")
        assert request.headers["content-type"] == "text/x"
        assert request.headers["x-api-key"] == KEY
        assert "authorization" not in request.headers


@pytest.mark.parametrize(
    "path",
    [
        "/v1/messages/../models",
        "/v1/messages/%2e%2E/models",
        "/v1/messages/a/./b",
        "/v1/messages/..%2fmodels",
        "/v1/messages/..%5cmodels",
        "/v1/messages/a?b=c",
        "/v1/messages/a#b",
        "/v1/messages/a b",
        "/v1/messages/a\r\nx: y",
        "/v1/messages/",
        "/v1/models",
        "//evil/v1/messages/x",
    ],
)
async def test_forward_stays_where_it_may_be(path: str) -> None:
    async with provider_for(never) as (provider, upstream):
        with pytest.raises(UnsupportedError):
            await provider.forward(ForwardCall("POST", path, b"", ()))
        assert upstream.connections == 0
