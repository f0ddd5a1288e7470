"""HTTP/1.1 by hand: any bytes out, and answers read as strictly as h11 reads them."""

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import h11
import orjson
import trio

from actors.errors import error_type_of

BODY = {"model": "m", "max_tokens": 50, "messages": [{"role": "user", "content": "one two three"}]}
READ_BYTES = 65536


@dataclass(frozen=True)
class Answer:
    """An HTTP answer as it came."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes

    def header(self, name: str) -> str | None:
        """The value of a header that comes at most once."""
        values = self.headers_of(name)
        assert len(values) <= 1, f"{name} came {len(values)} times"
        return values[0] if values else None

    def headers_of(self, name: str) -> list[str]:
        """Every value of a header."""
        return [value for other, value in self.headers if other == name]

    def json(self) -> Any:
        """The body."""
        assert self.header("content-type") == "application/json"
        return orjson.loads(self.body)


def assert_error(answer: Answer, status: int) -> str:
    """The answer is the error envelope of ``status``, as the contract has it; return its message."""
    assert answer.status == status, (answer.status, answer.body)
    body = answer.json()
    assert set(body) == {"type", "error", "request_id"}
    assert body["type"] == "error"
    assert set(body["error"]) == {"type", "message"}
    assert body["error"]["type"] == error_type_of(status)
    assert body["error"]["message"]
    assert body["request_id"] == answer.header("request-id")
    assert body["request_id"].startswith("req_")
    return str(body["error"]["message"])


def request(
    method: str, target: str, body: bytes = b"", headers: list[tuple[str, str]] | None = None
) -> bytes:
    """A well-formed request with a content-length; ``headers`` come as they are, repeated ones too."""
    given = headers or []
    names = {name.lower() for name, _ in given}
    lines = [f"{method} {target} HTTP/1.1"]
    if "host" not in names:
        lines.append("host: test")
    if body and not names & {"content-length", "transfer-encoding"}:
        lines.append(f"content-length: {len(body)}")
    if body and "content-type" not in names:
        lines.append("content-type: application/json")
    lines += [f"{name}: {value}" for name, value in given]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + body


def post(body: dict[str, Any] | bytes, *headers: tuple[str, str], target: str = "/v1/messages") -> bytes:
    """A Messages call."""
    data = body if isinstance(body, bytes) else orjson.dumps(body)
    return request("POST", target, data, list(headers))


class Wire:
    """One connection."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self._left = b""

    async def send(self, data: bytes) -> None:
        """Send these bytes as they are."""
        await self.stream.send_all(data)

    async def ask(self, data: bytes, *, method: str = "POST") -> Answer:
        """Send these bytes, and read one answer."""
        await self.send(data)
        return await self.answer(method=method)

    async def answer(self, *, method: str = "POST") -> Answer:
        """Read one answer to a request of this ``method``; informational ones are passed over."""
        # h11 reads answers only of what it has sent itself: it is told of a request that never leaves.
        reader = h11.Connection(h11.CLIENT)
        reader.send(h11.Request(method=method, target="/", headers=[("host", "test")]))
        reader.send(h11.EndOfMessage())
        if self._left:
            reader.receive_data(self._left)
            self._left = b""
        head: h11.Response | None = None
        body = b""
        while True:
            event = reader.next_event()
            if event is h11.NEED_DATA:
                reader.receive_data(await self.stream.receive_some(READ_BYTES))
            elif isinstance(event, h11.Response):
                head = event
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                self._left = reader.trailing_data[0]
                break
        assert head is not None
        headers = [(name.decode(), value.decode("latin-1")) for name, value in head.headers]
        return Answer(head.status_code, headers, body)

    async def read_until(self, wanted: bytes) -> bytes:
        """Read raw bytes until ``wanted`` has come."""
        while wanted not in self._left:
            data = await self.stream.receive_some(READ_BYTES)
            assert data, f"the connection ended before {wanted!r}: {self._left!r}"
            self._left += data
        return self._left

    async def read_some(self, size: int) -> None:
        """Read about so many bytes of an answer, which stay to be read."""
        until = len(self._left) + size
        while len(self._left) < until:
            data = await self.stream.receive_some(READ_BYTES)
            assert data, "the connection ended"
            self._left += data

    async def is_closed(self) -> bool:
        """Whether the peer has hung up, once it has said all it had to say."""
        try:
            while data := await self.stream.receive_some(READ_BYTES):
                self._left += data
        except trio.BrokenResourceError:
            return True
        return True

    def reset(self) -> None:
        """Hang up with a RST instead of a FIN."""
        self.stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        self.stream.socket.close()


async def open_stream(url: str, *, receive_buffer_bytes: int | None = None) -> trio.SocketStream:
    """A TCP connection to ``url``; ``receive_buffer_bytes`` bounds what the kernel takes for us unread."""
    where = urlsplit(url)
    sock = trio.socket.socket()
    if receive_buffer_bytes is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
    await sock.connect((where.hostname or "", where.port or 80))
    return trio.SocketStream(sock)


@asynccontextmanager
async def connect(url: str, *, receive_buffer_bytes: int | None = None) -> AsyncIterator[Wire]:
    """A connection to ``url``, closed on leaving."""
    stream = await open_stream(url, receive_buffer_bytes=receive_buffer_bytes)
    with stream.socket:
        yield Wire(stream)


async def ask(url: str, data: bytes, *, method: str = "POST") -> Answer:
    """One request on a connection of its own."""
    async with connect(url) as wire:
        return await wire.ask(data, method=method)
