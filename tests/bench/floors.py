"""What the same work costs without messagesd: the floors its rows are compared with.

``python -m tests.bench.floors NAME UPSTREAM_PORT`` serves one of them on a free port of loopback, prints
``port N``, and runs until it is killed. Hypercorn is the stock server with its stock settings, but for the
bound of 1,000 requests a connection, which would measure reconnecting instead.

``quart-h11``       a Quart-Trio route that relays over kept h11 connections on trio sockets
``asgi-h11``        the same relay answered below Quart
``quart-httpx2``    the same route over httpx2
``quart-fixed``     a Quart-Trio route that returns fixed bytes
``hypercorn``       Hypercorn alone: a fixed answer, a stream's events one send each
``hypercorn-one``   the same, all events in one send
``h11``             trio and h11 alone, a fixed answer, a stream's events one send each

What a relay read from upstream in one go leaves in one send, as it does in messagesd.
"""

import socket
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any, cast

import h11
import httpx2
import trio
from hypercorn.config import Config
from hypercorn.trio import serve
from hypercorn.typing import Framework
from quart import Response, request
from quart_trio import QuartTrio

READ_BYTES = 65536
BACKLOG = 2048
REQUESTS_PER_CONNECTION = 1_000_000_000
MAX_CONNECTIONS = 1_000
"""Of the httpx2 relay to the upstream: more than any row has at once."""

_JSON = [(b"content-type", b"application/json")]
_EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8")]
_DELTA = (
    b'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,'
    b'"delta":{"type":"text_delta","text":" word00"}}\n\n'
)
FIXED_FRAMES = [_DELTA] * 68 + [b'event: message_stop\ndata: {"type":"message_stop"}\n\n']
FIXED_MESSAGE = (
    b'{"id":"msg_mock","type":"message","role":"assistant","model":"mock","content":[{"type":"text","text":"'
    + b"x" * 401
    + b'"}],"stop_reason":"end_turn","stop_sequence":null,"usage":{"input_tokens":25,"output_tokens":64}}'
)

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


class Exchange:
    """One answer over a kept connection, which is idle again at its end."""

    def __init__(self, stream: trio.SocketStream, connection: h11.Connection, pool: "Pool") -> None:
        self.status = 0
        self.content_type = b""
        self._stream = stream
        self._connection = connection
        self._pool = pool
        self._ended = False

    async def open(self, body: bytes) -> None:
        """Send the request, and read the head of the answer."""
        head = h11.Request(
            method="POST",
            target="/v1/messages",
            headers=[
                ("host", "upstream"),
                ("content-type", "application/json"),
                ("content-length", str(len(body))),
                ("anthropic-version", "2023-06-01"),
            ],
        )
        sent: list[h11.Event] = [head, h11.Data(body), h11.EndOfMessage()]
        await self._stream.send_all(b"".join(self._connection.send(event) or b"" for event in sent))
        while (event := self._connection.next_event()) is h11.NEED_DATA:
            self._connection.receive_data(await self._stream.receive_some(READ_BYTES))
        assert isinstance(event, h11.Response), event
        self.status = event.status_code
        self.content_type = dict(event.headers)[b"content-type"]

    async def receive(self) -> bytes:
        """What came in one read; empty at the end."""
        pieces: list[bytes] = []
        while not self._ended:
            event = self._connection.next_event()
            if isinstance(event, h11.Data):
                pieces.append(bytes(event.data))
            elif isinstance(event, h11.EndOfMessage):
                self._ended = True
                self._connection.start_next_cycle()
                self._pool.idle.append((self._stream, self._connection))
            elif pieces:
                break
            else:
                self._connection.receive_data(await self._stream.receive_some(READ_BYTES))
        return b"".join(pieces)

    async def read(self) -> bytes:
        """The whole body."""
        body = b""
        while piece := await self.receive():
            body += piece
        return body


class Pool:
    """Kept connections to the upstream, the last one used first."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.idle: list[tuple[trio.SocketStream, h11.Connection]] = []

    async def ask(self, body: bytes) -> Exchange:
        """Send a request on an idle connection, or on a new one."""
        if self.idle:
            stream, connection = self.idle.pop()
        else:
            stream = await trio.open_tcp_stream("127.0.0.1", self._port)
            connection = h11.Connection(h11.CLIENT)
        exchange = Exchange(stream, connection, self)
        await exchange.open(body)
        return exchange


def quart_h11(upstream: int) -> Framework:
    """A Quart-Trio route, relaying."""
    app = QuartTrio("floor")
    pool = Pool(upstream)

    @app.post("/v1/messages")
    async def messages() -> Response:
        body: bytes = await request.data
        exchange = await pool.ask(body)
        if exchange.content_type.startswith(b"application/json"):
            return Response(await exchange.read(), exchange.status, content_type="application/json")

        async def frames() -> AsyncGenerator[bytes, None]:
            while piece := await exchange.receive():
                yield piece

        return _streamed(frames(), exchange.status)

    return app


def quart_httpx2(upstream: int) -> Framework:
    """The same over httpx2."""
    app = QuartTrio("floor")
    limits = httpx2.Limits(max_connections=MAX_CONNECTIONS, max_keepalive_connections=MAX_CONNECTIONS)
    client = httpx2.AsyncClient(timeout=None, limits=limits, trust_env=False)
    url = f"http://127.0.0.1:{upstream}/v1/messages"
    headers = {"content-type": "application/json", "anthropic-version": "2023-06-01"}

    @app.post("/v1/messages")
    async def messages() -> Response:
        asked = client.build_request("POST", url, headers=headers, content=await request.get_data())
        answer = await client.send(asked, stream=True)
        if answer.headers["content-type"].startswith("application/json"):
            return Response(await answer.aread(), answer.status_code, content_type="application/json")

        async def frames() -> AsyncGenerator[bytes, None]:
            async for piece in answer.aiter_raw():
                yield piece
            await answer.aclose()

        return _streamed(frames(), answer.status_code)

    return app


def _streamed(frames: AsyncIterator[bytes], status: int) -> Response:
    response = Response(frames, status, content_type="text/event-stream; charset=utf-8")
    # Quart would cut the stream after a minute.
    response.timeout = None
    return response


def quart_fixed(_: int) -> Framework:
    """A Quart-Trio route without any work."""
    app = QuartTrio("floor")

    @app.post("/v1/messages")
    async def messages() -> Response:
        return Response(FIXED_MESSAGE, content_type="application/json")

    return app


async def _read_body(receive: Receive) -> bytes:
    body = b""
    more = True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return body


async def _answer(send: Send, headers: list[tuple[bytes, bytes]], pieces: list[bytes]) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for piece in pieces:
        await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def asgi_h11(upstream: int) -> Framework:
    """The relay below Quart."""
    pool = Pool(upstream)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await _lifespan(receive, send)
            return
        exchange = await pool.ask(await _read_body(receive))
        if exchange.content_type.startswith(b"application/json"):
            body = await exchange.read()
            headers = [*_JSON, (b"content-length", str(len(body)).encode())]
            await send({"type": "http.response.start", "status": exchange.status, "headers": headers})
            await send({"type": "http.response.body", "body": body, "more_body": False})
            return
        await send({"type": "http.response.start", "status": exchange.status, "headers": _EVENTS})
        while piece := await exchange.receive():
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    return cast(Framework, app)


def hypercorn_alone(_: int, *, at_once: bool) -> Framework:
    """Fixed answers from Hypercorn."""
    frames = [b"".join(FIXED_FRAMES)] if at_once else FIXED_FRAMES
    plain = [*_JSON, (b"content-length", str(len(FIXED_MESSAGE)).encode())]

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await _lifespan(receive, send)
        elif b'"stream":true' in await _read_body(receive):
            await _answer(send, _EVENTS, frames)
        else:
            await send({"type": "http.response.start", "status": 200, "headers": plain})
            await send({"type": "http.response.body", "body": FIXED_MESSAGE, "more_body": False})

    return cast(Framework, app)


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        event = await receive()
        await send({"type": f"{event['type']}.complete"})
        if event["type"] == "lifespan.shutdown":
            return


async def serve_h11(stream: trio.SocketStream) -> None:
    """One connection of a server that is trio and h11 alone."""
    connection = h11.Connection(h11.SERVER)
    body = b""
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await stream.receive_some(READ_BYTES))
        elif isinstance(event, h11.Data):
            body += bytes(event.data)
        elif isinstance(event, h11.EndOfMessage):
            streamed = b'"stream":true' in body
            body = b""
            if streamed:
                await _send_h11(stream, connection, h11.Response(status_code=200, headers=_EVENTS))
                for frame in FIXED_FRAMES:
                    await _send_h11(stream, connection, h11.Data(frame))
                await _send_h11(stream, connection, h11.EndOfMessage())
            else:
                headers = [*_JSON, (b"content-length", str(len(FIXED_MESSAGE)).encode())]
                head = h11.Response(status_code=200, headers=headers)
                await _send_h11(stream, connection, head, h11.Data(FIXED_MESSAGE), h11.EndOfMessage())
            connection.start_next_cycle()
        elif isinstance(event, h11.ConnectionClosed):
            return


async def _send_h11(stream: trio.SocketStream, connection: h11.Connection, *events: h11.Event) -> None:
    await stream.send_all(b"".join(connection.send(event) or b"" for event in events))


APPLICATIONS: dict[str, Callable[[int], Framework]] = {
    "quart-h11": quart_h11,
    "asgi-h11": asgi_h11,
    "quart-httpx2": quart_httpx2,
    "quart-fixed": quart_fixed,
    "hypercorn": partial(hypercorn_alone, at_once=False),
    "hypercorn-one": partial(hypercorn_alone, at_once=True),
}


async def main(name: str, upstream: int) -> None:
    """Serve one floor until killed."""
    sock = socket.create_server(("127.0.0.1", 0), backlog=BACKLOG)
    print(f"port {sock.getsockname()[1]}", flush=True)
    if name in APPLICATIONS:
        config = Config()
        config.bind = [f"fd://{sock.detach()}"]
        config.keep_alive_max_requests = REQUESTS_PER_CONNECTION
        await serve(APPLICATIONS[name](upstream), config)
    else:
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(sock))
        await trio.serve_listeners(serve_h11, [listener])


if __name__ == "__main__":
    trio.run(main, sys.argv[1], int(sys.argv[2]))
