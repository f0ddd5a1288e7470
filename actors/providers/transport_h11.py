"""The transport for upstreams that are called directly: h11 on trio streams, and a pool of idle connections.

One task has a connection at a time, so nothing here locks. The pool is a stack: the connection used last is
used next, and the others grow old and go. A request is written in as few sends as its size allows, and what
one read brought is given on as one piece.
"""

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from math import inf
from urllib.parse import urlsplit

import h11
import trio

from actors.errors import ProviderError, UpstreamConnectionError, UpstreamProtocolError
from actors.providers.options import UpstreamLimits
from actors.providers.transport import (
    KEEP_ALIVE_S,
    MAX_HEAD_BYTES,
    PIECE_BYTES,
    STALE_S,
    Response,
    check_head,
    timeout_error,
    too_large,
)
from events.types import Headers

READ_BYTES = 64 * 1024
"""Asked of the socket at once."""
TAIL_S = 0.05
"""How long reading the end of an answer may take once its content is complete and that end is here."""

REFUSAL_S = 1.0
"""How long an answer is looked for after the upstream stopped taking the request."""

_Stream = trio.SocketStream | trio.SSLStream[trio.SocketStream]


class _StaleConnectionError(Exception):
    """A kept connection was closed by its peer before it answered anything."""


class _Link:
    """One connection."""

    __slots__ = ("h11", "idle_since", "socket", "stream", "used")

    def __init__(self, stream: _Stream, socket: trio.socket.SocketType) -> None:
        self.stream = stream
        self.socket = socket
        self.h11 = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD_BYTES)
        self.used = False
        self.idle_since = 0.0

    def close(self) -> None:
        """At once, without a TLS farewell. Synchronous: it must not be lost to a cancellation."""
        self.socket.close()


class _Answer:
    """A :class:`~actors.providers.transport.StreamResponse` over a link."""

    def __init__(self, link: _Link, head: h11.Response, limits: UpstreamLimits, total_at: float) -> None:
        self.status = head.status_code
        self.headers: Headers = tuple(
            (name.decode("latin-1"), value.decode("latin-1")) for name, value in head.headers
        )
        self.complete = False
        """The end of the body was seen; the link can be used again."""
        self._link = link
        self._limits = limits
        self._total_at = total_at
        self._received = 0

    def header(self, name: str) -> str | None:
        """See the port."""
        for field, value in self.headers:
            if field == name:
                return value
        return None

    async def receive(self) -> bytes:
        """See the port."""
        while not self.complete:
            chunk = self._at_hand()
            if chunk:
                return chunk
            if not self.complete:
                await self._read_more()
        return b""

    async def read(self) -> bytes:
        """See the port."""
        pieces: list[bytes] = []
        while piece := await self.receive():
            pieces.append(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _at_hand(self) -> bytes:
        """All of the body that was read already."""
        pieces: list[bytes] = []
        try:
            while True:
                event = self._link.h11.next_event()
                if type(event) is h11.Data:
                    pieces.append(bytes(event.data))
                elif type(event) is h11.EndOfMessage:
                    self.complete = True
                    break
                else:
                    break
        except h11.RemoteProtocolError as error:
            raise _broken_off() from error
        chunk = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        self._received += len(chunk)
        if self._received > self._limits.max_response_bytes:
            raise too_large(self._limits)
        return chunk

    async def _read_more(self) -> None:
        deadline = min(trio.current_time() + self._limits.idle_timeout_s, self._total_at)
        data: bytes | bytearray | None = None
        try:
            with trio.move_on_at(deadline):
                data = await self._link.stream.receive_some(READ_BYTES)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise _broken_off() from error
        if data is None:
            raise timeout_error("total" if deadline == self._total_at else "idle", self._limits)
        self._feed(data)

    def _feed(self, data: bytes | bytearray) -> None:
        try:
            self._link.h11.receive_data(bytes(data))
        except (h11.RemoteProtocolError, RuntimeError) as error:
            raise _broken_off() from error

    async def finish(self) -> None:
        """Take the end of the answer if it is here already, so that the connection can be kept."""
        try:
            rest = b"" if self.complete else self._at_hand()
            while not rest and not self.complete and _readable(self._link):
                with trio.move_on_after(TAIL_S, shield=True):
                    self._feed(await self._link.stream.receive_some(READ_BYTES))
                rest = self._at_hand()
        except (UpstreamProtocolError, trio.BrokenResourceError, trio.ClosedResourceError):
            return


class DirectTransport:
    """:class:`~actors.providers.transport.Transport` over connections of our own."""

    def __init__(self, limits: UpstreamLimits, base_url: str, *, trust_env: bool = True) -> None:
        url = urlsplit(base_url)
        self._limits = limits
        self._host = url.hostname or ""
        self._port = url.port or (443 if url.scheme == "https" else 80)
        self._prefix = url.path.rstrip("/")
        self._tls = _tls_context(trust_env=trust_env) if url.scheme == "https" else None
        self._host_header = url.netloc.rpartition("@")[2].encode(
            "idna" if not url.netloc.isascii() else "ascii"
        )
        self._idle: list[_Link] = []
        self._links: set[_Link] = set()
        self._room = trio.Semaphore(limits.max_connections)
        self._closed = False

    async def request(self, method: str, path: str, *, headers: Headers = (), body: bytes = b"") -> Response:
        """See the port."""
        async with self.open_stream(method, path, headers=headers, body=body) as response:
            return Response(response.status, response.headers, await response.read())

    @asynccontextmanager
    async def open_stream(
        self, method: str, path: str, *, headers: Headers = (), body: bytes = b""
    ) -> AsyncIterator[_Answer]:
        """See the port."""
        total_at = trio.current_time() + self._limits.total_timeout_s
        request = self._request(method, path, headers, body)
        try:
            link, head = await self._exchange(request, body, total_at, fresh=False)
        except _StaleConnectionError:
            # The peer may close an idle connection at any moment, also while we write to it (RFC 9112,
            # 9.3.1). It did so before it can have done any work.
            link, head = await self._exchange(request, body, total_at, fresh=True)
        answer = _Answer(link, head, self._limits, total_at)
        try:
            check_head(answer, self._limits)
            yield answer
            await answer.finish()
        finally:
            self._give_back(link, reusable=answer.complete)

    def _request(self, method: str, path: str, headers: Headers, body: bytes) -> h11.Request:
        fields = [(b"host", self._host_header), (b"accept-encoding", b"identity")]
        if body:
            fields.append((b"content-length", b"%d" % len(body)))
        fields += [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]
        try:
            return h11.Request(method=method, target=self._prefix + path, headers=fields)
        except (h11.LocalProtocolError, UnicodeEncodeError) as error:
            raise ProviderError("the request cannot be put into HTTP", status=400) from error

    # -- one exchange ----------------------------------------------------------------------------

    async def _exchange(
        self, request: h11.Request, body: bytes, total_at: float, *, fresh: bool
    ) -> tuple[_Link, h11.Response]:
        """Send the request on a kept or fresh link; the link and the head of the answer."""
        link = await self._take(total_at, fresh=fresh)
        kept = link.used
        begun_at = trio.current_time()
        try:
            try:
                await self._send(link, request, body, total_at)
            except UpstreamConnectionError:
                # An upstream may refuse a request it has not read to its end, and say so.
                return link, await self._head(link, min(total_at, trio.current_time() + REFUSAL_S))
            return link, await self._head(link, total_at)
        except UpstreamConnectionError as error:
            self._give_back(link, reusable=False)
            if kept and trio.current_time() - begun_at < STALE_S:
                raise _StaleConnectionError from error
            raise
        except BaseException:
            self._give_back(link, reusable=False)
            raise

    async def _send(self, link: _Link, request: h11.Request, body: bytes, total_at: float) -> None:
        head = link.h11.send(request)
        pieces = [body[at : at + PIECE_BYTES] for at in range(0, len(body), PIECE_BYTES)] or [b""]
        sent: list[bytes] = [head + (link.h11.send(h11.Data(data=pieces[0])) if pieces[0] else b"")]
        sent += [link.h11.send(h11.Data(data=piece)) or b"" for piece in pieces[1:]]
        link.h11.send(h11.EndOfMessage())
        link.used = True
        for data in sent:
            deadline = min(trio.current_time() + self._limits.idle_timeout_s, total_at)
            with trio.move_on_at(deadline) as scope:
                try:
                    await link.stream.send_all(data)
                except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                    raise UpstreamConnectionError(
                        "the upstream closed the connection without an answer"
                    ) from error
            if scope.cancelled_caught:
                raise timeout_error("total" if deadline == total_at else "send", self._limits)

    async def _head(self, link: _Link, total_at: float) -> h11.Response:
        deadline = min(trio.current_time() + self._limits.first_byte_timeout_s, total_at)
        with trio.move_on_at(deadline):
            try:
                while True:
                    event = link.h11.next_event()
                    if type(event) is h11.Response:
                        return event
                    if event is h11.NEED_DATA:
                        link.h11.receive_data(bytes(await link.stream.receive_some(READ_BYTES)))
                    elif not isinstance(event, h11.InformationalResponse):
                        raise UpstreamConnectionError("the upstream closed the connection without an answer")
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise UpstreamConnectionError(
                    "the upstream closed the connection without an answer"
                ) from error
            except h11.RemoteProtocolError as error:
                if link.h11.trailing_data == (b"", True):
                    raise UpstreamConnectionError(
                        "the upstream closed the connection without an answer"
                    ) from error
                raise UpstreamProtocolError("the upstream's answer is not HTTP") from error
        raise timeout_error("total" if deadline == total_at else "first byte", self._limits)

    # -- the pool --------------------------------------------------------------------------------

    async def _take(self, total_at: float, *, fresh: bool) -> _Link:
        """An idle link that looks alive, or a new one. Belongs to the caller until given back."""
        deadline = min(trio.current_time() + self._limits.connect_timeout_s, total_at)
        with trio.move_on_at(deadline):
            # It counts calls, not links: an idle link must not keep a call waiting that could have it.
            await self._room.acquire()
            try:
                return self._kept(fresh=fresh) or await self._connect()
            except BaseException:
                self._room.release()
                raise
        raise timeout_error("total" if deadline == total_at else "connect", self._limits)

    def _kept(self, *, fresh: bool) -> _Link | None:
        """The idle link used last, if it looks alive. Links are opened only when none is idle."""
        if self._closed:
            raise UpstreamConnectionError("the provider is closed")
        now = trio.current_time()
        while self._idle:
            link = self._idle.pop()
            # Bytes, or the end, on an idle connection: either way it is of no use.
            if not fresh and now - link.idle_since < KEEP_ALIVE_S and not link.socket.is_readable():
                return link
            self._discard(link)
        return None

    async def _connect(self) -> _Link:
        try:
            stream = await trio.open_tcp_stream(self._host, self._port)
        except OSError as error:
            raise UpstreamConnectionError("no connection to the upstream") from error
        link = _Link(stream, stream.socket)
        try:
            stream.setsockopt(trio.socket.IPPROTO_TCP, trio.socket.TCP_NODELAY, True)
            if self._tls is not None:
                link.stream = trio.SSLStream(
                    stream, self._tls, server_hostname=self._host, https_compatible=True
                )
                await link.stream.do_handshake()
        except (trio.BrokenResourceError, ssl.SSLError, OSError) as error:
            link.close()
            raise UpstreamConnectionError("no connection to the upstream") from error
        except BaseException:
            link.close()
            raise
        self._links.add(link)
        return link

    def _give_back(self, link: _Link, *, reusable: bool) -> None:
        """Keep the link for the next call, or close it. Synchronous: it happens also when cancelled."""
        self._room.release()
        if reusable and not self._closed and link.h11.our_state is h11.DONE:
            try:
                link.h11.start_next_cycle()
            except h11.LocalProtocolError:
                self._discard(link)
                return
            link.idle_since = trio.current_time()
            self._idle.append(link)
            while len(self._idle) > self._limits.max_idle_connections or self._oldest_idle_s() > KEEP_ALIVE_S:
                self._discard(self._idle.pop(0))
        else:
            self._discard(link)

    def _oldest_idle_s(self) -> float:
        return trio.current_time() - self._idle[0].idle_since if self._idle else -inf

    def _discard(self, link: _Link) -> None:
        link.close()
        self._links.discard(link)

    async def aclose(self) -> None:
        """See the port."""
        self._closed = True
        self._idle.clear()
        for link in list(self._links):
            self._discard(link)
        await trio.lowlevel.checkpoint()


def _readable(link: _Link) -> bool:
    if not isinstance(link.stream, trio.SocketStream) or link.socket.fileno() < 0:
        return False
    return link.socket.is_readable()


def _broken_off() -> UpstreamProtocolError:
    return UpstreamProtocolError("the upstream broke off in the middle of its answer")


def _tls_context(*, trust_env: bool) -> ssl.SSLContext:
    """Certificates verified against the system's trust store, or what SSL_CERT_FILE and SSL_CERT_DIR name."""
    # The library that proxied upstreams are called with knows how; the two must not differ.
    import httpx2  # noqa: PLC0415 - late: upstreams on loopback need no TLS

    return httpx2.create_ssl_context(trust_env=trust_env)
