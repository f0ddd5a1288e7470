"""An HTTP/1.1 upstream that does exactly what a test tells it, down to the byte.

A script is an async function that is called once a request with an :class:`Exchange`. It may send any
bytes, stall, or hang up. When it returns, the connection goes on with the next request if the script
called :meth:`Exchange.keep_alive`, and is closed otherwise.
"""

import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import orjson
import trio

STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"request-id: req_fake\r\ntransfer-encoding: chunked\r\n\r\n"
)
LAST_CHUNK = b"0\r\n\r\n"


@dataclass(frozen=True)
class Request:
    """A request as it came."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


class Exchange:
    """One request and the way to answer it."""

    def __init__(self, stream: trio.abc.Stream, request: Request, upstream: "FakeUpstream") -> None:
        self.request = request
        self.kept_alive = False
        self._stream = stream
        self._upstream = upstream

    async def send(self, data: bytes) -> None:
        """Send these bytes as they are."""
        await self._stream.send_all(data)

    async def send_chunk(self, data: bytes) -> None:
        """Send one chunk of a chunked body."""
        await self.send(b"%x\r\n%b\r\n" % (len(data), data))

    async def stall(self) -> None:
        """Do nothing until the client hangs up, which is then counted."""
        await _read_to_end(self._stream)
        self._upstream.gone.set()

    def keep_alive(self) -> None:
        """Serve another request on this connection once the script returns."""
        self.kept_alive = True


Script = Callable[[Exchange], Awaitable[None]]


@dataclass
class FakeUpstream:
    """What the upstream has seen."""

    url: str
    requests: list[Request] = field(default_factory=list)
    connections: int = 0
    """Accepted so far."""
    open: int = 0
    """Open now."""
    gone: trio.Event = field(default_factory=trio.Event)
    """Set once a stalled script has seen the client hang up."""
    asked: trio.Event = field(default_factory=trio.Event)
    """Set once a request was read."""
    changed: trio.Event = field(default_factory=trio.Event)

    def count(self, change: int) -> None:
        """Note that a connection was opened or closed."""
        self.open += change
        self.changed.set()
        self.changed = trio.Event()

    async def wait_open(self, wanted: int) -> None:
        """Wait until exactly so many connections are open. Polls nothing, so clocks may jump."""
        while self.open != wanted:
            await self.changed.wait()


def answer(status: int, body: bytes, content_type: str = "application/json", *extra: str) -> bytes:
    """A whole answer with a content-length; ``extra`` are header lines."""
    lines = [f"HTTP/1.1 {status} X", f"content-type: {content_type}", f"content-length: {len(body)}", *extra]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + body


def frame(event: str, **fields: object) -> bytes:
    """A frame of the Messages stream."""
    return f"event: {event}\ndata: ".encode() + orjson.dumps({"type": event, **fields}) + b"\n\n"


def message(text: str, model: str = "m") -> dict[str, object]:
    """A Message that says ``text``."""
    return {
        "id": "msg_fake",
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": [{"type": "text", "text": text}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {"input_tokens": 3, "output_tokens": len(text.split())},
    }


def message_frames(text: str, model: str = "m") -> list[bytes]:
    """The stream of :func:`message`, a delta a word."""
    whole = message(text, model)
    start = whole | {"content": [], "stop_reason": None, "usage": {"input_tokens": 3, "output_tokens": 0}}
    words = [word + " " for word in text.split(" ")]
    words[-1] = words[-1][:-1]
    deltas = [
        frame("content_block_delta", index=0, delta={"type": "text_delta", "text": word}) for word in words
    ]
    return [
        frame("message_start", message=start),
        frame("content_block_start", index=0, content_block={"type": "text", "text": ""}),
        *deltas,
        frame("content_block_stop", index=0),
        frame(
            "message_delta",
            delta={"stop_reason": "end_turn", "stop_sequence": None},
            usage={"output_tokens": len(words)},
        ),
        frame("message_stop"),
    ]


@asynccontextmanager
async def open_upstream(
    script: Script, *, tls: ssl.SSLContext | None = None, greets: bool = True
) -> AsyncIterator[FakeUpstream]:
    """A fake upstream on a loopback port, gone on leaving.

    With ``greets=False`` it accepts connections and never reads (a TLS handshake that does not come).
    """
    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = listeners[0].socket.getsockname()[1]
        upstream = FakeUpstream(f"{'https' if tls or not greets else 'http'}://127.0.0.1:{port}")

        async def serve(stream: trio.SocketStream) -> None:
            upstream.connections += 1
            upstream.count(1)
            try:
                async with stream:
                    if greets:
                        await _serve(trio.SSLStream(stream, tls, server_side=True) if tls else stream)
                    else:
                        upstream.asked.set()
                        await _read_to_end(stream)
                        upstream.gone.set()
            finally:
                upstream.count(-1)

        async def _serve(stream: trio.abc.Stream) -> None:
            buffer = bytearray()
            while request := await _read_request(stream, buffer):
                upstream.requests.append(request)
                upstream.asked.set()
                exchange = Exchange(stream, request, upstream)
                try:
                    await script(exchange)
                except trio.BrokenResourceError:
                    upstream.gone.set()
                    return
                if not exchange.kept_alive:
                    return

        nursery.start_soon(trio.serve_listeners, serve, listeners)  # noqa: ASYNC113 - the listeners listen already
        try:
            yield upstream
        finally:
            nursery.cancel_scope.cancel()


async def _read_request(stream: trio.abc.Stream, buffer: bytearray) -> Request | None:
    while b"\r\n\r\n" not in buffer:
        if not await _read_some(stream, buffer):
            return None
    head, _, rest = bytes(buffer).partition(b"\r\n\r\n")
    buffer[:] = rest
    first, *lines = head.decode("latin-1").split("\r\n")
    method, path, _ = first.split(" ")
    headers = {}
    for line in lines:
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip()
    length = int(headers.get("content-length", "0"))
    while len(buffer) < length:
        if not await _read_some(stream, buffer):
            return None
    body = bytes(buffer[:length])
    del buffer[:length]
    return Request(method, path, headers, body)


async def _read_some(stream: trio.abc.Stream, buffer: bytearray) -> bool:
    try:
        data = await stream.receive_some(65536)
    except trio.BrokenResourceError:
        return False
    buffer += data
    return bool(data)


async def _read_to_end(stream: trio.abc.Stream) -> None:
    ignored = bytearray()
    while await _read_some(stream, ignored):
        ignored.clear()
