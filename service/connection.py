"""One HTTP/1.1 connection: Hypercorn's, with what it does per request taken off, and its sends cancellable.

Written against Hypercorn 0.18 (``pyproject.toml`` holds it to that minor version); what is used of it is
``TCPServer``, ``H11Protocol`` and ``HTTPStream``. What differs:

* A send can be cancelled: Hypercorn shields it, so that a client that stops reading pins its task beyond
  any cancel scope, drain deadline included.
* A waiting connection is a deadline on its read, not a task that is started and cancelled per request.
* The head of an answer of known length leaves together with its body, in one send.
* Malformed HTTP is answered with an Anthropic error.
* A request that came early does not stop the connection from being read, so that a leaving client is missed
  at once.
* A body that an answer did not wait for is let come, and does not cost the connection.
* Some routes are answered without the framework (:mod:`service.direct`).
"""

import os
import secrets
from math import inf
from typing import Any, cast

import h11
import trio
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.protocol.events import Body, EndBody, Request, StreamClosed
from hypercorn.protocol.events import Event as StreamEvent
from hypercorn.protocol.h11 import STREAM_ID, H11Protocol
from hypercorn.protocol.http_stream import HTTPStream
from hypercorn.trio.task_group import TaskGroup
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.typing import ConnectionState
from hypercorn.utils import parse_socket_addr

from actors.errors import error_type_of
from events.types import Failure
from service.direct import DirectApp, DirectStream
from service.errors import envelope

MAX_EARLY_BYTES = 256 * 1024
"""Of requests that came before the one under way was answered. Beyond it nothing more is read until it is."""
RECYCLE_TIMEOUT_S = 1.0
"""For a connection to be made ready for its next request, or closed. It takes no I/O that could wait."""
LINGER_S = 2.0
"""How long a refused upload, or a body the answer did not wait for, is read on and thrown away, so that its
sender can read the answer (RFC 9112, 9.6)."""
READ_BYTES = 64 * 1024
"""Asked of the socket at once."""
PAUSE_BYTES = 32 * 1024
"""After a send of so many, other tasks have their turn, however fast its reader is."""

_REFUSALS = {
    400: "the request is not valid HTTP",
    408: "the request body did not arrive in time",
    413: "the request body is too large",
    431: "the request header is too large",
}


class Protocol(H11Protocol):
    """HTTP/1.1, one request after the other."""

    direct_app: DirectApp
    """Asked first whether it answers a request itself."""
    connection_: "Connection"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._handling = trio.Lock()
        self._held = b""
        self._unwanted = False
        """The answer is out, and the rest of the request it did not wait for is still to come."""

    async def handle(self, event: Event) -> None:
        """Bytes came, or the connection ended."""
        if isinstance(event, RawData):
            self.connection.receive_data(event.data)
            await self._handle_events()
        elif self.stream is not None:
            await self._close_stream()

    async def _handle_events(self) -> None:
        """Act on what was received, up to the end of the request under way."""
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
                elif self._unwanted and isinstance(event, h11.Data | h11.EndOfMessage):
                    if isinstance(event, h11.EndOfMessage):
                        self._unwanted = False
                        await self._maybe_recycle()
                elif isinstance(event, h11.Data) and self.stream is not None:
                    await self.stream.handle(Body(stream_id=STREAM_ID, data=bytes(event.data)))
                elif isinstance(event, h11.EndOfMessage) and self.stream is not None:
                    await self.stream.handle(EndBody(stream_id=STREAM_ID))
                else:
                    return

    async def stream_send(self, event: StreamEvent) -> None:
        """An exchange has something for the client; StreamClosed ends it."""
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

    async def _maybe_recycle(self) -> None:
        """Make ready for the next request, or close; not before a body that nobody waited for is here.

        Its sender does not know that it was not waited for, and would send the next request here.
        """
        connection = cast(h11.Connection, self.connection)
        self._unwanted = (
            connection.our_state is h11.DONE
            and connection.their_state is h11.SEND_BODY
            and not connection.they_are_waiting_for_100_continue
        )
        if self._unwanted:
            await self._close_stream()
            self.connection_.read_until(trio.current_time() + LINGER_S)
        else:
            await super()._maybe_recycle()

    async def _create_stream(self, request: h11.Request) -> None:
        """Every request is plain HTTP: an ``upgrade`` is ignored, as RFC 9110 (7.8) lets a server do."""
        # h11 holds its bound to what has come in part only; a head that came in one read is checked here.
        size = len(request.target) + sum(len(name) + len(value) for name, value in request.headers)
        if size > self.config.h11_max_incomplete_size:
            await self.refuse(431)
            return
        self.keep_alive_requests += 1
        route = self.direct_app.direct(request)
        if route is not None:
            direct = DirectStream(self, route, request)
            self.stream = cast(Any, direct)
            await direct.start()
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

    async def _send_h11_event(self, event: Any) -> None:
        try:
            data = self.connection.send(event)
        except h11.LocalProtocolError:
            if self.connection.their_state != h11.ERROR:
                raise
            return
        if type(event) is h11.Response and any(name == b"content-length" for name, _ in event.headers):
            self._held = data or b""
            return
        if self._held:
            self._held += data or b""
            if type(event) is not h11.EndOfMessage:
                return
            data, self._held = self._held, b""
        await self.send(RawData(data=data or b""))

    async def send_piece(self, data: bytes) -> None:
        """A piece of an answer of unknown length, past h11, which adds nothing but the chunk around it."""
        if cast(h11.Connection, self.connection).their_http_version == b"1.0":
            await self._send_h11_event(h11.Data(data=data))
        elif data or self.backlog:
            await self.connection_.write(_chunk(data) if data else b"")

    @property
    def backlog(self) -> int:
        """See :class:`service.http.Outlet`."""
        return self.connection_.backlog

    def push(self, piece: bytes) -> bool:
        """See :class:`service.http.Outlet`; for an answer whose pieces :meth:`send_piece` sends."""
        if cast(h11.Connection, self.connection).their_http_version == b"1.0":
            return False
        return self.connection_.push(_chunk(piece))

    async def refuse(self, status: int) -> None:
        """Answer a request that cannot be taken, and read no other from this connection."""
        await self._send_error_response(status)
        self.stream = None
        await self.connection_.linger()

    async def _send_error_response(self, status_code: int) -> None:
        request_id = f"req_{secrets.token_hex(12)}"
        text = _REFUSALS.get(status_code, _REFUSALS[400])
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


class Connection(TCPServer):
    """One connection. After a send was cancelled it is of no further use, and closed."""

    def __init__(self, *args: Any, direct_app: DirectApp) -> None:
        super().__init__(*args)
        self._direct_app = direct_app
        self._deadline = inf
        self._reading = trio.CancelScope()
        self._lingering = False
        self._unsent = b""
        self.idle = True
        """Whether no request is under way."""

    async def run(self) -> None:
        """Serve the connection to its end."""
        sock = self.stream.socket
        try:
            client = parse_socket_addr(sock.family, sock.getpeername())
            server = parse_socket_addr(sock.family, sock.getsockname())
            async with TaskGroup() as task_group:
                protocol = Protocol(
                    self.app,
                    self.config,
                    self.context,
                    task_group,
                    ConnectionState(self.state),
                    False,
                    client,
                    server,
                    self.protocol_send,
                )
                protocol.direct_app = self._direct_app
                protocol.connection_ = self
                self.protocol = cast(Any, protocol)
                self.set_idle(True)
                await self._read_data()
        except* OSError:
            # The peer went away between two system calls.
            pass
        finally:
            # Whoever serves a connection closes it forcefully after this, should this be cancelled.
            await self._close()  # noqa: ASYNC102 - see above
            # They refer to each other; what forms no cycle needs no collector to go.
            self.__dict__.pop("protocol", None)

    def set_idle(self, idle: bool) -> None:
        """Between requests a connection waits for ``keep_alive_timeout`` at most; during one, for ever."""
        self.idle = idle
        self.read_until(trio.current_time() + self.config.keep_alive_timeout if idle else inf)

    def read_until(self, deadline: float) -> None:
        """Bound the reading of this connection; what is read then decides how it goes on."""
        self._deadline = self._reading.deadline = deadline

    def close_if_idle(self) -> None:
        """End a connection with no request under way."""
        if self.idle:
            self._reading.cancel()

    async def linger(self) -> None:
        """Send nothing more; read on for a moment and throw it away."""
        self._lingering = True
        self.read_until(trio.current_time() + LINGER_S)
        try:
            await self.stream.send_eof()
        except (trio.BrokenResourceError, trio.ClosedResourceError, trio.BusyResourceError):
            self._reading.cancel()

    async def _read(self) -> bytes:
        """What comes next. A stream of trio's would ask in vain first, and pause once more after."""
        sock = self.stream.socket
        while True:
            if sock.fileno() < 0:
                # Closed after an answer that allows no other request.
                raise trio.ClosedResourceError
            await trio.lowlevel.wait_readable(sock)
            try:
                return os.read(sock.fileno(), READ_BYTES)
            except BlockingIOError:
                continue
            except OSError as error:
                raise trio.BrokenResourceError from error

    async def _read_data(self) -> None:
        while True:
            data = b""
            try:
                with trio.CancelScope(deadline=self._deadline) as self._reading:
                    data = await self._read()
            except (trio.ClosedResourceError, trio.BrokenResourceError):
                break
            if self._reading.cancelled_caught:
                stream = getattr(self.protocol, "stream", None)
                if isinstance(stream, DirectStream) and stream.incomplete:
                    await cast(Protocol, self.protocol).refuse(408)
                    continue
                break
            if not self._lingering:
                await self.protocol.handle(RawData(data))
            if not data:
                break
        await self.protocol.handle(Closed())

    async def protocol_send(self, event: Event) -> None:
        """Hypercorn's protocol has something for the socket, or about it."""
        if isinstance(event, RawData):
            await self.write(event.data)
        elif isinstance(event, Updated):
            self.set_idle(event.idle)
        else:
            await super().protocol_send(event)

    @property
    def backlog(self) -> int:
        """Bytes of :meth:`push` that the next :meth:`write` sends first."""
        return len(self._unsent)

    def push(self, data: bytes) -> bool:
        """Hand ``data`` to the socket without waiting; False, and nothing done, where that would not do."""
        if self._unsent or self.send_lock.locked() or len(data) > PAUSE_BYTES:
            return False
        try:
            sent = self._send_now(data)
        except trio.BrokenResourceError:
            # Whoever writes next finds that, too, and can tell everyone.
            return False
        self._unsent = data[sent:] if sent else b""
        return sent > 0

    async def write(self, data: bytes) -> None:
        """Hand ``data`` to the socket. What it takes at once takes no pause, up to ``PAUSE_BYTES``."""
        try:
            self.send_lock.acquire_nowait()
        except trio.WouldBlock:
            await self.send_lock.acquire()
        if self._unsent:
            data, self._unsent = self._unsent + data, b""
        try:
            sent = self._send_now(data)
            if sent < len(data):
                await self.stream.send_all(memoryview(data)[sent:])
            elif sent >= PAUSE_BYTES:
                await trio.lowlevel.checkpoint()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            await self.protocol.handle(Closed())
        except trio.Cancelled:
            # Part of it may have left: nothing that could follow would make sense to the peer.
            self.stream.socket.close()
            raise
        finally:
            self.send_lock.release()

    def _send_now(self, data: bytes) -> int:
        """How many bytes the socket took. Raises trio.BrokenResourceError."""
        try:
            return os.write(self.stream.socket.fileno(), data)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise trio.BrokenResourceError from error


def _chunk(data: bytes) -> bytes:
    """RFC 9112, 7.1."""
    return b"%x\r\n%b\r\n" % (len(data), data)
