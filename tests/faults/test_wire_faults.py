"""Requests no client should send: always the error envelope, and the daemon goes on as if nothing was."""

from collections.abc import AsyncIterator
from io import StringIO

import orjson
import pytest
import trio

from service.logs import make_logger
from service.main import Gateway, open_gateway
from service.settings import LoggingSettings, Settings
from tests.e2e.daemon import ECHO, running
from tests.e2e.wire import BODY, Answer, Wire, ask, assert_error, connect, open_stream, post, request

MAX_HEADER_BYTES = 8192
WIRE_TIMEOUT_S = 10


@pytest.fixture
async def gateway() -> AsyncIterator[Gateway]:
    """One that is healthy, and holds nothing, after whatever the test did to it."""
    bounds = {
        "max_header_bytes": MAX_HEADER_BYTES,
    }
    with trio.fail_after(WIRE_TIMEOUT_S):
        async with running(server=bounds) as gateway:
            yield gateway
            assert (await ask(gateway.url, post(BODY))).status == 200
            assert gateway.supervisor.in_flight == 0


async def ask_twice(gateway: Gateway, data: bytes) -> Answer:
    """The answer to ``data``; the same connection must then serve a proper call."""
    async with connect(gateway.url) as wire:
        answer = await wire.ask(data)
        assert (await wire.ask(post(BODY))).json()["content"][0]["text"] == "one two three"
        return answer


# --- not HTTP --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)) + b"\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: a\r\nno colon\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: a\r\nx: \0\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: a\r\nx y: z\r\n\r\n",
        b"POST /v1/messages HTTP/1.1\r\nhost: a\r\ncontent-length: -1\r\n\r\n",
        b"POST /v1/messages HTTP/1.1\r\nhost: a\r\ncontent-length: 1e3\r\n\r\n",
        b"POST /v1/messages HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\ncontent-length: 4\r\n\r\nabcd",
        b"POST /v1/messages HTTP/1.1\r\nhost: a\r\nx-bf-async-job-result-ttl: 6\x000\r\n\r\n",
    ],
)
async def test_malformed_http(gateway: Gateway, garbage: bytes) -> None:
    async with connect(gateway.url) as wire:
        assert "not valid HTTP" in assert_error(await wire.ask(garbage), 400)
        assert await wire.is_closed()


async def test_malformed_chunks(gateway: Gateway) -> None:
    head = request("POST", "/v1/messages", headers=[("transfer-encoding", "chunked")])
    async with connect(gateway.url) as wire:
        assert_error(await wire.ask(head + b"xyz\r\nabc\r\n"), 400)
        assert await wire.is_closed()


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET\r\n\r\n",
        request("POST", "/v1/messages", headers=[("transfer-encoding", "chunked")]) + b"xyz\r\n",
        b"GET / HTTP/1.1\r\nhost: a\r\nx: " + b"a" * 100_000,
    ],
)
async def test_what_a_client_sends_is_not_logged_as_our_fault(garbage: bytes) -> None:
    lines = StringIO()
    settings = Settings.model_validate({"providers": [ECHO], "server": {"port": 0}})
    logger = make_logger(LoggingSettings(level="error"), lines)
    with trio.fail_after(WIRE_TIMEOUT_S):
        async with open_gateway(settings, logger=logger) as gateway, connect(gateway.url) as wire:
            await wire.ask(garbage)
            assert await wire.is_closed()
    assert lines.getvalue() == ""


async def test_an_unknown_transfer_encoding(gateway: Gateway) -> None:
    async with connect(gateway.url) as wire:
        answer = await wire.ask(request("POST", "/v1/messages", headers=[("transfer-encoding", "gzip")]))
        assert_error(answer, answer.status)
        assert answer.status in (400, 501)


@pytest.mark.parametrize("ended", [True, False])
async def test_a_header_that_is_too_large(gateway: Gateway, ended: bool) -> None:
    huge = b"GET / HTTP/1.1\r\nhost: a\r\nx-filler: " + b"a" * 2 * MAX_HEADER_BYTES
    async with connect(gateway.url) as wire:
        answer = await wire.ask(huge + (b"\r\n\r\n" if ended else b""))
        assert answer.status in (400, 431)
        assert_error(answer, answer.status)
        assert await wire.is_closed()


async def test_half_a_request_and_gone(gateway: Gateway) -> None:
    whole = post(BODY)
    for cut in (1, 20, whole.index(b"\r\n\r\n") + 2, len(whole) - 1):
        async with connect(gateway.url) as wire:
            await wire.send(whole[:cut])
            await wire.stream.send_eof()
            await wire.is_closed()


@pytest.mark.parametrize("line", [b"GET /nowhere HTTP/9.9", b"PRI * HTTP/2.0"])
async def test_other_versions_are_answered_in_ours(gateway: Gateway, line: bytes) -> None:
    async with connect(gateway.url) as wire:
        assert_error(await wire.ask(line + b"\r\n\r\n", method="GET"), 404)


async def test_a_connection_is_closed_where_the_client_asks_for_it(gateway: Gateway) -> None:
    async with connect(gateway.url) as wire:
        assert (await wire.ask(post(BODY, ("connection", "close")))).status == 200
        assert await wire.is_closed()


async def test_http_1_0_is_served(gateway: Gateway) -> None:
    body = orjson.dumps(BODY)
    head = b"POST /v1/messages HTTP/1.0\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    async with connect(gateway.url) as wire:
        answer = await wire.ask(head % len(body) + body)
        assert answer.json()["content"][0]["text"] == "one two three"
        assert await wire.is_closed()


async def test_http_1_0_stream(gateway: Gateway) -> None:
    body = orjson.dumps(BODY | {"stream": True})
    head = b"POST /v1/messages HTTP/1.0\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    async with connect(gateway.url) as wire:
        answer = await wire.ask(head % len(body) + body)
        assert answer.status == 200
        assert answer.header("transfer-encoding") is None
        assert answer.body.endswith(b'event: message_stop\ndata: {"type":"message_stop"}\n\n')


async def test_expect_100_continue(gateway: Gateway) -> None:
    body = orjson.dumps(BODY)
    async with connect(gateway.url) as wire:
        length = ("content-length", str(len(body)))
        await wire.send(request("POST", "/v1/messages", headers=[length, ("expect", "100-continue")]))
        await wire.read_until(b"HTTP/1.1 100 ")
        await wire.send(body)
        assert (await wire.answer()).json()["content"][0]["text"] == "one two three"


async def test_a_body_that_comes_after_its_answer_does_not_cost_the_connection(gateway: Gateway) -> None:
    """The SDKs send head and body apart, and a poll is answered without its body."""
    poll = post(b"x" * 1000, ("x-bf-async-id", "unknown"))
    head, separator, body = poll.partition(b"\r\n\r\n")
    async with connect(gateway.url) as wire:
        for _ in range(3):
            assert_error(await wire.ask(head + separator), 404)
            await wire.send(body[:300])
            await trio.sleep(0.01)
            # Its rest, and the next request with it.
            assert_error(await wire.ask(body[300:] + poll), 404)
        assert (await wire.ask(request("GET", "/healthz"), method="GET")).status == 200


async def test_a_body_that_never_comes_is_not_waited_for_for_ever(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.connection.LINGER_S", 0.05)
    head = post(b"x" * 1000, ("x-bf-async-id", "unknown")).partition(b"\r\n\r\n")[0]
    async with connect(gateway.url) as wire:
        assert_error(await wire.ask(head + b"\r\n\r\n"), 404)
        with trio.fail_after(5):
            assert await wire.is_closed()


async def test_pipelined_requests_are_answered_in_order(gateway: Gateway) -> None:
    async with connect(gateway.url) as wire:
        texts = ["first", "second", "third"]
        calls = [post(BODY | {"messages": [{"role": "user", "content": text}]}) for text in texts]
        await wire.send(b"".join(calls))
        answers = [(await wire.answer()).json()["content"][0]["text"] for _ in texts]
        assert answers == texts


@pytest.mark.parametrize(
    "upgrade",
    [
        [
            ("upgrade", "websocket"),
            ("sec-websocket-version", "13"),
            ("sec-websocket-key", "MDAwMDAwMDAwMDAwMDAwMA=="),
        ],
        [("upgrade", "h2c"), ("http2-settings", "AAMAAABk")],
        [("upgrade", "TLS/1.0")],
    ],
)
async def test_an_upgrade_is_ignored(gateway: Gateway, upgrade: list[tuple[str, str]]) -> None:
    headers = [("connection", "upgrade"), *upgrade]
    async with connect(gateway.url) as wire:
        assert_error(await wire.ask(request("GET", "/v1/messages", headers=headers), method="GET"), 405)
        assert (await wire.ask(request("GET", "/healthz", headers=headers), method="GET")).status == 200


async def test_an_idle_connection_is_closed() -> None:
    async with (
        running(server={"keep_alive_timeout_s": 0.2}) as gateway,
        connect(gateway.url) as fresh,
        connect(gateway.url) as used,
    ):
        assert (await used.ask(post(BODY))).status == 200
        with trio.fail_after(2):
            assert await fresh.is_closed()
            assert await used.is_closed()


async def test_idle_connections_do_not_hold_up_shutdown() -> None:
    with trio.fail_after(5):
        async with running(jobs={"drain_s": 30}) as gateway:
            fresh, used = [Wire(await open_stream(gateway.url)) for _ in range(2)]
            assert (await used.ask(post(BODY))).status == 200
        for wire in (fresh, used):
            assert await wire.is_closed()
            await wire.stream.aclose()


# --- where and how ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target",
    [
        "/nowhere",
        "/v1",
        "/v1/",
        "/v1/messages/",
        "/v1//messages",
        "/v1/messages//",
        "/anthropic/anthropic/v1/messages",
        "/anthropicv1/messages",
        "/V1/messages",
        "/v1/messages%00",
        "/v1/messages%2f",
        "/v1/%2e%2e/messages",
        "/../v1/messages",
        "/%",
        "/%zz",
        "/v1/messages;x=y",
        "/v1/messages.json",
        "*",
        "/" + "a/" * 2000,
    ],
)
@pytest.mark.parametrize("method", ["POST", "PUT"])
async def test_there_is_no_such_path(gateway: Gateway, target: str, method: str) -> None:
    message = assert_error(await ask(gateway.url, request(method, target, b"{}")), 404)
    assert "path" in message


@pytest.mark.parametrize(
    ("target", "allowed"),
    [
        ("/v1/messages", "POST"),
        ("/v1/messages/count_tokens", "POST"),
        ("/v1/messages/anything", "POST"),
        ("/v1/jobs/6f0a5d2e-0000-4000-8000-000000000000/cancel", "POST"),
    ],
)
@pytest.mark.parametrize("method", ["GET", "PUT", "PATCH", "OPTIONS", "DELETE", "TRACE", "BREW"])
async def test_a_wrong_method_is_told_the_right_one(
    gateway: Gateway, target: str, allowed: str, method: str
) -> None:
    for prefix in ("", "/anthropic"):
        answer = await ask(gateway.url, request(method, prefix + target), method=method)
        assert_error(answer, 405)
        assert answer.header("allow") == allowed


async def test_head_has_no_body(gateway: Gateway) -> None:
    async with connect(gateway.url) as wire:
        for target, status in [
            ("/v1/messages", 405),
            ("/nowhere", 404),
            ("/", 200),
            ("/anthropic/", 200),
            ("/api/hello", 200),
            ("/v1/models", 200),
        ]:
            answer = await wire.ask(request("HEAD", target), method="HEAD")
            assert (target, answer.status, answer.body) == (target, status, b"")
            assert answer.header("request-id")


async def test_methods_that_only_read_are_told_apart(gateway: Gateway) -> None:
    for target, allowed in {
        "/v1/models": {"GET", "HEAD"},
        "/v1/jobs": {"GET", "HEAD"},
        "/v1/jobs/x": {"GET", "HEAD", "DELETE"},
        "/": {"GET", "HEAD"},
    }.items():
        answer = await ask(gateway.url, request("POST", target, b"{}"))
        assert_error(answer, 405)
        assert set((answer.header("allow") or "").split(", ")) == allowed


async def test_a_base_url_with_a_slash_at_its_end_is_forgiven(gateway: Gateway) -> None:
    for target in ("//v1/messages", "/anthropic//v1/messages"):
        assert (await ask(gateway.url, post(BODY, target=target))).status == 200


async def test_a_path_that_is_not_utf_8(gateway: Gateway) -> None:
    for target in ("/%ff%fe", "/v1/messages/%ff%fe", "/v1/models/%ff%00"):
        method = "POST" if "messages" in target else "GET"
        assert_error(await ask(gateway.url, request(method, target, b"{}"), method=method), 404)


async def test_queries_are_ignored(gateway: Gateway) -> None:
    for query in ("?beta=true", "?", "?%ff=%00&&==", "?" + "a" * 4000):
        answer = await ask(gateway.url, post(BODY, target="/v1/messages" + query))
        assert answer.status == 200


async def test_an_absolute_target(gateway: Gateway) -> None:
    answer = await ask(gateway.url, post(BODY, target=f"{gateway.url}/v1/messages"))
    assert answer.status in (200, 404)
    if answer.status == 404:
        assert_error(answer, 404)
