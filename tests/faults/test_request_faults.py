"""Well-formed HTTP that asks for nonsense: the error envelope, and the connection stays of use."""

from collections.abc import AsyncIterator
from uuid import UUID

import orjson
import pytest
import trio

from events.log.base import JobFilter
from service.main import Gateway
from tests.e2e.daemon import running
from tests.e2e.wire import BODY, Answer, ask, assert_error, connect, post, request

MAX_BODY_BYTES = 20_000
MAX_HEADER_BYTES = 8192
BODY_TIMEOUT_S = 0.2
WIRE_TIMEOUT_S = 10


@pytest.fixture
async def gateway() -> AsyncIterator[Gateway]:
    """One that is healthy, and holds nothing, after whatever the test did to it."""
    bounds = {
        "max_body_bytes": MAX_BODY_BYTES,
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


# --- control headers -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        [("x-bf-async", value)]
        for value in ("True", "TRUE", "1", "yes", "", " ", "true, true", "tr\u00fce", "null", "false;q=1")
    ]
    + [[("x-bf-async", "true"), ("x-bf-async", other)] for other in ("true", "false")]
    + [[("x-bf-detach", value)] for value in ("1", "yes", "")]
    + [
        [("x-bf-async", "true"), ("x-bf-async-job-result-ttl", value)]
        for value in (
            "0",
            "-1",
            "+60",
            "1e9",
            "60.0",
            "0x10",
            "604801",
            "",
            "\u00b2\u00b3",
            "\u00ef\u00bc\u0091",
            "1 0",
            "6_0",
            "inf",
            "nan",
            "60, 60",
            "9" * 400,
            "1" + "0" * 400,
        )
    ]
    + [[("x-bf-async-job-result-ttl", "60"), ("x-bf-async-job-result-ttl", "60")]],
)
async def test_absurd_control_headers(gateway: Gateway, headers: list[tuple[str, str]]) -> None:
    message = assert_error(await ask_twice(gateway, post(BODY, *headers)), 400)
    assert headers[-1][0] in message
    assert not (await gateway.log.page(JobFilter(), limit=5)).jobs[1:]


async def test_an_unreadable_preference_is_ignored(gateway: Gateway) -> None:
    for value in (
        "wait=soon",
        "wait",
        "wait=-1",
        "wait=nan",
        "wait=inf",
        "wait=1e400",
        ";;==,,",
        "wait=" * 99,
    ):
        answer = await ask(gateway.url, post(BODY, ("prefer", value)))
        assert answer.status == 200
        assert answer.header("preference-applied") is None


@pytest.mark.parametrize(
    "job_id",
    ["", "x", "../../etc/passwd", "0" * 4000, str(UUID(int=7)), "\u00e9", "a b"],
)
async def test_polling_for_what_is_no_job(gateway: Gateway, job_id: str) -> None:
    assert_error(await ask_twice(gateway, post(b"not read at all", ("x-bf-async-id", job_id))), 404)


async def test_two_job_ids(gateway: Gateway) -> None:
    assert_error(await ask_twice(gateway, post(b"", ("x-bf-async-id", "a"), ("x-bf-async-id", "a"))), 400)


async def test_a_stream_cannot_be_async(gateway: Gateway) -> None:
    answer = await ask_twice(gateway, post(BODY | {"stream": True}, ("x-bf-async", "true")))
    assert "stream" in assert_error(answer, 400)


@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("POST", "/v1/messages/count_tokens"),
        ("POST", "/v1/messages/else"),
        ("GET", "/v1/models"),
        ("GET", "/v1/models/echo/echo"),
        ("GET", "/v1/jobs"),
        ("GET", "/v1/jobs/x"),
    ],
)
async def test_job_headers_on_other_routes(gateway: Gateway, method: str, target: str) -> None:
    body = orjson.dumps(BODY) if method == "POST" else b""
    for prefix in ("", "/anthropic"):
        for value in ("true", "false", "nonsense"):
            data = request(method, prefix + target, body, [("x-bf-async", value)])
            assert "x-bf-async" in assert_error(await ask(gateway.url, data, method=method), 400)
        data = request(method, prefix + target, body, [("x-bf-async-id", "x")])
        assert_error(await ask(gateway.url, data, method=method), 404)


# --- bodies ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content_type",
    [
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "json",
        "\u00ff",
    ],
)
async def test_a_wrong_content_type(gateway: Gateway, content_type: str) -> None:
    message = assert_error(await ask_twice(gateway, post(BODY, ("content-type", content_type))), 400)
    assert "content-type" in message


@pytest.mark.parametrize("charset", ["latin-1", "utf-16", "none"])
async def test_a_wrong_charset(gateway: Gateway, charset: str) -> None:
    given = ("content-type", f"application/json; charset={charset}")
    assert "UTF-8" in assert_error(await ask_twice(gateway, post(BODY, given)), 400)


@pytest.mark.parametrize("encoding", ["gzip", "br", "identity, gzip", "x"])
async def test_a_compressed_body(gateway: Gateway, encoding: str) -> None:
    assert "content-encoding" in assert_error(
        await ask_twice(gateway, post(BODY, ("content-encoding", encoding))), 400
    )


@pytest.mark.parametrize(
    "content_type",
    [
        "application/json; charset=UTF-8",
        'application/json;charset="utf-8"',
        "Application/JSON",
        "application/x+json",
    ],
)
async def test_the_right_content_types(gateway: Gateway, content_type: str) -> None:
    assert (await ask(gateway.url, post(BODY, ("content-type", content_type)))).status == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"{",
        b"{}{}",
        b"[]",
        b"null",
        b'"text"',
        b"nan",
        b'{"model": NaN}',
        b"{'model': 'm'}",
        b"\xef\xbb\xbf{}",
        b'{"model": "\xff\xfe"}',
        b'{"model": "\xed\xa0\x80"}',
        orjson.dumps(BODY).decode().encode("utf-16"),
        b"\0" * 100,
        b"[" * 9000,
        b'{"a":' * 3000,
        b"[" * 5000 + b"]" * 5000,
        b'{"model":' + b"9" * 5000 + b"}",
    ],
)
async def test_not_a_json_object(gateway: Gateway, body: bytes) -> None:
    for target in ("/v1/messages", "/v1/messages/count_tokens", "/v1/messages/else"):
        data = request(
            "POST", target, body, [("content-type", "application/json"), ("content-length", str(len(body)))]
        )
        async with connect(gateway.url) as wire:
            assert_error(await wire.ask(data), 400)
            assert (await wire.ask(post(BODY))).status == 200


@pytest.mark.parametrize(
    "change",
    [
        {"model": None},
        {"model": ""},
        {"model": 7},
        {"model": "m" * 300},
        {"messages": None},
        {"messages": []},
        {"messages": "hi"},
        {"messages": [1]},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": 5}]},
        {"max_tokens": None},
        {"max_tokens": 0},
        {"max_tokens": -5},
        {"max_tokens": "5"},
        {"max_tokens": True},
        {"max_tokens": 1.5},
        {"stream": "yes"},
        {"stream": 1},
    ],
)
async def test_fields_we_act_on(gateway: Gateway, change: dict[str, object]) -> None:
    message = assert_error(await ask_twice(gateway, post(BODY | change)), 400)
    assert next(iter(change)) in message


async def test_a_nesting_bomb_of_100_000_brackets() -> None:
    bomb = b'{"model":"m","max_tokens":1,"messages":[{"role":"user","content":'
    async with running() as gateway:
        for body in (b"[" * 100_000, bomb + b"[" * 100_000 + b"]" * 100_000 + b"}]}"):
            for target in ("/v1/messages", "/v1/messages/count_tokens"):
                assert_error(await ask(gateway.url, post(body, target=target)), 400)
        assert (await ask(gateway.url, post(BODY))).status == 200


# --- bodies that are too large, or too slow --------------------------------------------------------


async def test_a_body_declared_too_large_is_not_read(gateway: Gateway) -> None:
    length = ("content-length", str(MAX_BODY_BYTES + 1))
    async with connect(gateway.url) as wire:
        answer = await wire.ask(request("POST", "/v1/messages", headers=[length]))
        assert "too large" in assert_error(answer, 413)
        assert await wire.is_closed()


async def test_a_chunked_body_that_grows_too_large(gateway: Gateway) -> None:
    head = request("POST", "/v1/messages", headers=[("transfer-encoding", "chunked")])
    chunk = b"1000\r\n" + b" " * 0x1000 + b"\r\n"
    async with connect(gateway.url) as wire:
        answer = await wire.ask(head + chunk * (MAX_BODY_BYTES // 0x1000 + 1))
        assert "too large" in assert_error(answer, 413)


async def test_a_body_of_just_the_right_size(gateway: Gateway) -> None:
    body = orjson.dumps(BODY)
    body += b" " * (MAX_BODY_BYTES - len(body))
    assert (await ask(gateway.url, post(body))).status == 200
    assert_error(await ask(gateway.url, post(body + b" ")), 413)
    chunked = request("POST", "/v1/messages", headers=[("transfer-encoding", "chunked")])
    data = chunked + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    assert (await ask(gateway.url, data)).status == 200


async def test_a_poll_does_not_read_its_body(gateway: Gateway) -> None:
    pending = await ask(gateway.url, post(BODY, ("x-bf-async", "true")))
    job_id = pending.json()["id"]
    async with connect(gateway.url) as wire:
        length = ("content-length", str(MAX_BODY_BYTES - 1))
        head = request("POST", "/v1/messages", headers=[length, ("x-bf-async-id", job_id)])
        answer = await wire.ask(head + b"never the rest")
        assert answer.header("x-bf-async-id") == job_id


async def test_a_slow_body_is_given_up() -> None:
    async with running(server={"body_timeout_s": BODY_TIMEOUT_S}) as gateway, connect(gateway.url) as wire:
        with trio.fail_after(WIRE_TIMEOUT_S):
            data = request("POST", "/v1/messages", headers=[("content-length", "1000")]) + b"{"
            assert_error(await wire.ask(data), 408)
            assert await wire.is_closed()
