"""Hypercorn's trio connections, accepted and ended by us.

Why not ``hypercorn.trio.serve``: it shields every socket send, so that a client that stops reading pins its
task beyond any cancel scope, drain deadline included; it answers malformed HTTP with an empty body; and one
connection's unexpected error ends the server. Written against Hypercorn 0.18 (``pyproject.toml`` holds it to
that minor version): what is used of it is ``TCPServer``, ``H11Protocol`` and ``WorkerContext``.

HTTP/1.1 only: no TLS here, hence no ALPN, and cleartext HTTP/2 is not offered.
"""

import secrets
import socket
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import h11
import structlog
import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.protocol.events import Body, EndBody, Request, StreamClosed
from hypercorn.protocol.events import Event as StreamEvent
from hypercorn.protocol.h11 import STREAM_ID, H11Protocol
from hypercorn.protocol.http_stream import HTTPStream
from hypercorn.trio.task_group import TaskGroup
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ASGIFramework, ConnectionState
from hypercorn.utils import parse_socket_addr

from actors.errors import error_type_of
from events.types import Failure
from service.errors import envelope

MAX_EARLY_BYTES = 256 * 1024
"""Of requests that came before the one under way was answered. Beyond it nothing more is read until it is."""
RECYCLE_TIMEOUT_S = 1.0
"""For a connection to be made ready for its next request, or closed. It takes no I/O that could wait."""


def listen(host: str, port: int, *, backlog: int, send_timeout_s: float) -> list[socket.socket]:
    """Listening sockets for ``host`` (every address it resolves to). Raises OSError.

    ``send_timeout_s`` becomes TCP_USER_TIMEOUT, which accepted sockets inherit: a peer that takes nothing
    for so long is cut off by the kernel.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    sockets: list[socket.socket] = []
    try:
        for family, kind, protocol, _, address in dict.fromkeys(found):
            sock = socket.socket(family, kind, protocol)
            sockets.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if hasattr(socket, "TCP_USER_TIMEOUT"):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(send_timeout_s * 1000))
            sock.bind(address)
            sock.listen(backlog)
            # Port 0 was asked for: the other addresses listen on the one that was given.
            port = sock.getsockname()[1]
    except OSError:
        for sock in sockets:
            sock.close()
        raise
    return sockets


class _Protocol(H11Protocol):
    """HTTP/1.1 whose own error answers are Anthropic errors, and which never changes protocol."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._handling = trio.Lock()

    async def _handle_events(self) -> None:
        """Act on what was received, up to the end of the request under way.

        Hypercorn would wait here until that request is answered, and read nothing meanwhile: a client that
        sent its next request early and then left would not be missed.
        """
        async with self._handling:
            while True:
                if self.connection.they_are_waiting_for_100_continue:
                    await self._send_h11_event(h11.InformationalResponse(status_code=100, headers=[]))
                try:
                    event = self.connection.next_event()
                except h11.RemoteProtocolError as error:
                    if self.connection.our_state in {h11.IDLE, h11.SEND_RESPONSE}:
                        await self._send_error_response(error.error_status_hint)
                    await self.send(Closed())
                    return
                if isinstance(event, h11.Request):
                    await self.send(Updated(idle=False))
                    await self._create_stream(event)
                elif event is h11.PAUSED and len(self.connection.trailing_data[0]) > MAX_EARLY_BYTES:
                    await self.can_read.clear()
                    await self.can_read.wait()
                elif isinstance(event, h11.Data) and self.stream is not None:
                    await self.stream.handle(Body(stream_id=STREAM_ID, data=bytes(event.data)))
                elif isinstance(event, h11.EndOfMessage) and self.stream is not None:
                    await self.stream.handle(EndBody(stream_id=STREAM_ID))
                else:
                    return

    async def stream_send(self, event: StreamEvent) -> None:
        if not isinstance(event, StreamClosed):
            await super().stream_send(event)
            return
        # This runs in the application's task, and its first step tells the application that the exchange is
        # over, which cancels that task. Unshielded, what follows would never happen: the connection would
        # neither be closed where it must be nor get its idle timeout, and would hold up shutdown.
        with trio.move_on_after(RECYCLE_TIMEOUT_S, shield=True):
            await super().stream_send(event)
        if self.connection.trailing_data[0]:
            self.task_group.spawn(self._handle_events)

    async def _create_stream(self, request: h11.Request) -> None:
        """Every request is plain HTTP: an ``upgrade`` is ignored, as RFC 9110 (7.8) lets a server do."""
        # h11 holds its bound to what has come in part only; a head that came in one read is checked here.
        size = len(request.target) + sum(len(name) + len(value) for name, value in request.headers)
        if size > self.config.h11_max_incomplete_size:
            await self._send_error_response(431)
            await self.send(Closed())
            return
        self.stream = HTTPStream(
            self.app,
            self.config,
            self.context,
            self.task_group,
            self.ssl,
            self.client,
            self.server,
            self.stream_send,
            STREAM_ID,
        )
        await self.stream.handle(
            Request(
                stream_id=STREAM_ID,
                headers=list(request.headers),
                http_version=request.http_version.decode(),
                method=request.method.decode("ascii").upper(),
                raw_path=request.target,
                state=self.connection_state,
            )
        )
        self.keep_alive_requests += 1

    async def _send_error_response(self, status_code: int) -> None:
        request_id = f"req_{secrets.token_hex(12)}"
        text = "the request header is too large" if status_code == 431 else "the request is not valid HTTP"
        body = envelope(Failure(status_code, error_type_of(status_code), text), request_id)
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
            (b"request-id", request_id.encode()),
        ]
        await self._send_h11_event(
            h11.Response(status_code=status_code, headers=[*headers, *self.config.response_headers("h11")])
        )
        await self._send_h11_event(h11.Data(data=body))
        await self._send_h11_event(h11.EndOfMessage())


class _Connection(TCPServer):
    """One connection. A send can be cancelled; the connection is then of no further use, and closed."""

    async def run(self) -> None:
        sock = self.stream.socket
        try:
            client = parse_socket_addr(sock.family, sock.getpeername())
            server = parse_socket_addr(sock.family, sock.getsockname())
            async with TaskGroup() as task_group:
                self._task_group = task_group
                self.protocol = cast(
                    Any,
                    _Protocol(
                        self.app,
                        self.config,
                        self.context,
                        task_group,
                        ConnectionState(self.state),
                        False,
                        client,
                        server,
                        self.protocol_send,
                    ),
                )
                await self.idle_task.restart(task_group, self._idle_timeout)
                await self._read_data()
        except* OSError:
            # The peer went away between two system calls.
            pass
        finally:
            # Whoever serves a connection closes it forcefully after this, should this be cancelled.
            await self._close()  # noqa: ASYNC102 - see above

    async def protocol_send(self, event: Event) -> None:
        if not isinstance(event, RawData):
            await super().protocol_send(event)
            return
        async with self.send_lock:
            try:
                await self.stream.send_all(event.data)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                await self.protocol.handle(Closed())
            except trio.Cancelled:
                # Part of it may have left: nothing that could follow would make sense to the peer.
                self.stream.socket.close()
                raise


class Server:
    """Accepts connections for an application until told to stop."""

    def __init__(
        self,
        app: ASGIFramework,
        config: Config,
        sockets: Sequence[socket.socket],
        *,
        logger: structlog.typing.FilteringBoundLogger,
    ) -> None:
        self._app = ASGIWrapper(app)
        self._config = config
        self._sockets = sockets
        self._logger = logger
        self._context = WorkerContext(None)
        self._stop = trio.Event()
        self._connections = trio.CancelScope()

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until :meth:`stop`, then until its deadline or the last connection's end."""
        listeners = [trio.SocketListener(trio.socket.from_stdlib_socket(sock)) for sock in self._sockets]
        with self._connections:
            async with trio.open_nursery() as connections, trio.open_nursery() as accepting:
                accepting.start_soon(
                    partial(trio.serve_listeners, self._serve, listeners, handler_nursery=connections)
                )
                task_status.started()
                await self._stop.wait()
                accepting.cancel_scope.cancel()

    def stop(self, *, deadline: float) -> None:
        """Accept nothing more, close idle connections, and cut those left at ``deadline`` (trio time)."""
        self._stop.set()
        self._connections.deadline = deadline

    async def close_idle(self) -> None:
        """Connections with no request under way close now, the others after their answer."""
        await self._context.terminated.set()

    async def _serve(self, stream: trio.SocketStream) -> None:
        """One connection; whatever it raises stays here."""
        try:
            await _Connection(self._app, self._config, self._context, cast(Any, {}), cast(Any, stream))
        except Exception:
            self._logger.exception("connection failed", action="http.connection_failed")
