"""The transport for upstreams that are called directly: trio streams, and a pool of idle connections.

One task has a connection at a time, so nothing here locks. The pool is a stack: the connection used last is
used next, and the others grow old and go. A request is written in as few sends as its size allows, and what
one read brought is given on as one piece.
"""

import re
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from math import inf
from urllib.parse import urlsplit

import trio

from actors.errors import ProviderError, UpstreamConnectionError, UpstreamProtocolError
from actors.providers.link import Link, broken_off
from actors.providers.options import UpstreamLimits
from actors.providers.transport import (
    KEEP_ALIVE_S,
    PIECE_BYTES,
    STALE_S,
    Response,
    check_head,
    timeout_error,
    too_large,
)
from actors.timers import Timers
from events.types import Headers

TAIL_S = 0.05
"""How long reading the end of an answer may take once its content is complete and that end is here."""

REFUSAL_S = 1.0
"""How long an answer is looked for after the upstream stopped taking the request."""

# RFC 9110 (5.5, 5.6.2, 9.1) and RFC 9112 (3.2): nothing that could end a line early.
_METHOD = re.compile(r"[A-Z]+")
_TARGET = re.compile(r"[!-~]+")
_FIELD = re.compile(r"[-!#$%&'*+.^_`|~0-9A-Za-z]+: [\t -~\x80-\xff]*")


class _StaleConnectionError(Exception):
    """A kept connection was closed by its peer before it answered anything."""


class _Answer:
    """A :class:`~actors.providers.transport.StreamResponse` over a link."""

    def __init__(self, link: Link, limits: UpstreamLimits, total_at: float) -> None:
        self.status = link.status
        self.headers: Headers = tuple(link.fields)
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
        link = self._link
        while not link.pieces:
            if link.complete:
                return b""
            await self._read_more()
        return self._at_hand()

    async def read(self) -> bytes:
        """See the port."""
        pieces: list[bytes] = []
        while piece := await self.receive():
            pieces.append(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _at_hand(self) -> bytes:
        """All of the body that was read already."""
        pieces = self._link.pieces
        chunk = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        self._received += len(chunk)
        if self._received > self._limits.max_response_bytes:
            raise too_large(self._limits)
        return chunk

    async def _read_more(self) -> None:
        deadline = min(trio.current_time() + self._limits.idle_timeout_s, self._total_at)
        try:
            data = await self._link.read_until(deadline)
        except trio.TooSlowError:
            raise timeout_error("total" if deadline == self._total_at else "idle", self._limits) from None
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise broken_off() from error
        self._link.feed(data)

    async def finish(self) -> None:
        """Take the end of the answer if it is here already, so that the connection can be kept."""
        link = self._link
        try:
            while not link.pieces and not link.complete and _readable(link):
                with trio.move_on_after(TAIL_S, shield=True):
                    link.feed(await link.read())
        except (UpstreamProtocolError, trio.BrokenResourceError, trio.ClosedResourceError):
            link.reusable = False


class DirectTransport:
    """:class:`~actors.providers.transport.Transport` over connections of our own."""

    def __init__(
        self, limits: UpstreamLimits, base_url: str, *, timers: Timers, trust_env: bool = True
    ) -> None:
        """``timers`` keep the time of reads."""
        url = urlsplit(base_url)
        self._timers = timers
        self._limits = limits
        self._host = url.hostname or ""
        self._port = url.port or (443 if url.scheme == "https" else 80)
        self._prefix = url.path.rstrip("/")
        self._tls = _tls_context(trust_env=trust_env) if url.scheme == "https" else None
        host = url.netloc.rpartition("@")[2]
        host = host if host.isascii() else host.encode("idna").decode("ascii")
        self._fixed_fields = (f"host: {host}", "accept-encoding: identity")
        self._idle: list[Link] = []
        self._links: set[Link] = set()
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
        head = self._head_of(method, path, headers, body)
        try:
            link = await self._exchange(head, body, total_at, fresh=False)
        except _StaleConnectionError:
            # The peer may close an idle connection at any moment, also while we write to it (RFC 9112,
            # 9.3.1). It did so before it can have done any work.
            link = await self._exchange(head, body, total_at, fresh=True)
        try:
            link.check_framing()
            answer = _Answer(link, self._limits, total_at)
            check_head(answer, self._limits)
            yield answer
            await answer.finish()
        finally:
            self._give_back(link)

    def _head_of(self, method: str, path: str, headers: Headers, body: bytes) -> bytes:
        """The head of a request. Raises ProviderError for what HTTP has no place for."""
        fields = [f"{name}: {value}" for name, value in headers]
        target = self._prefix + path
        if not (
            _METHOD.fullmatch(method) and _TARGET.fullmatch(target) and all(map(_FIELD.fullmatch, fields))
        ):
            raise ProviderError("the request cannot be put into HTTP", status=400)
        lines = [f"{method} {target} HTTP/1.1", *self._fixed_fields, *fields]
        if body or method != "GET":
            lines.append(f"content-length: {len(body)}")
        lines += ("", "")
        return "\r\n".join(lines).encode("latin-1")

    # -- one exchange ----------------------------------------------------------------------------

    async def _exchange(self, head: bytes, body: bytes, total_at: float, *, fresh: bool) -> Link:
        """Send the request on a kept or fresh link; the link, the head of the answer parsed."""
        link = await self._take(total_at, fresh=fresh)
        kept = link.used
        begun_at = trio.current_time()
        link.begin()
        try:
            try:
                await self._send(link, head, body, total_at)
            except UpstreamConnectionError:
                # An upstream may refuse a request it has not read to its end, and say so.
                await self._await_head(link, min(total_at, trio.current_time() + REFUSAL_S))
                link.reusable = False
                return link
            await self._await_head(link, total_at)
        except UpstreamConnectionError as error:
            self._give_back(link)
            if kept and trio.current_time() - begun_at < STALE_S:
                raise _StaleConnectionError from error
            raise
        except BaseException:
            self._give_back(link)
            raise
        return link

    async def _send(self, link: Link, head: bytes, body: bytes, total_at: float) -> None:
        sent = [head + body[:PIECE_BYTES]]
        sent += [body[at : at + PIECE_BYTES] for at in range(PIECE_BYTES, len(body), PIECE_BYTES)]
        for data in sent:
            try:
                done = link.write_now(data)
                if done < len(data):
                    await self._send_rest(link, memoryview(data)[done:], total_at)
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise UpstreamConnectionError(
                    "the upstream closed the connection without an answer"
                ) from error

    async def _send_rest(self, link: Link, data: memoryview, total_at: float) -> None:
        deadline = min(trio.current_time() + self._limits.idle_timeout_s, total_at)
        with trio.move_on_at(deadline):
            await link.stream.send_all(data)
            return
        raise timeout_error("total" if deadline == total_at else "send", self._limits)

    async def _await_head(self, link: Link, total_at: float) -> None:
        deadline = min(trio.current_time() + self._limits.first_byte_timeout_s, total_at)
        try:
            while not link.has_head:
                link.feed(await link.read_until(deadline))
        except trio.TooSlowError:
            raise timeout_error("total" if deadline == total_at else "first byte", self._limits) from None
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise UpstreamConnectionError("the upstream closed the connection without an answer") from error

    # -- the pool --------------------------------------------------------------------------------

    async def _take(self, total_at: float, *, fresh: bool) -> Link:
        """An idle link that looks alive, or a new one. Belongs to the caller until given back."""
        if not fresh and (link := self._take_at_once()) is not None:
            return link
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

    def _take_at_once(self) -> Link | None:
        """The same, where there is room and an idle link: most calls need no deadline for that."""
        if not self._idle or not self._room.value:
            return None
        link = self._kept(fresh=False)
        if link is not None:
            self._room.acquire_nowait()
        return link

    def _kept(self, *, fresh: bool) -> Link | None:
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

    async def _connect(self) -> Link:
        try:
            stream = await trio.open_tcp_stream(self._host, self._port)
        except OSError as error:
            raise UpstreamConnectionError("no connection to the upstream") from error
        link = Link(stream, stream.socket, self._timers)
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

    def _give_back(self, link: Link) -> None:
        """Keep the link for the next call, or close it. Synchronous: it happens also when cancelled."""
        self._room.release()
        if not (link.complete and link.reusable) or link.pieces or self._closed:
            self._discard(link)
            return
        link.idle_since = trio.current_time()
        self._idle.append(link)
        while len(self._idle) > self._limits.max_idle_connections or self._oldest_idle_s() > KEEP_ALIVE_S:
            self._discard(self._idle.pop(0))

    def _oldest_idle_s(self) -> float:
        return trio.current_time() - self._idle[0].idle_since if self._idle else -inf

    def _discard(self, link: Link) -> None:
        link.close()
        self._links.discard(link)

    async def aclose(self) -> None:
        """See the port."""
        self._closed = True
        self._idle.clear()
        for link in list(self._links):
            self._discard(link)
        await trio.lowlevel.checkpoint()


def _readable(link: Link) -> bool:
    if not isinstance(link.stream, trio.SocketStream) or link.socket.fileno() < 0:
        return False
    return link.socket.is_readable()


def _tls_context(*, trust_env: bool) -> ssl.SSLContext:
    """Certificates verified against the system's trust store, or what SSL_CERT_FILE and SSL_CERT_DIR name."""
    # The library that proxied upstreams are called with knows how; the two must not differ.
    import httpx2  # noqa: PLC0415 - late: upstreams on loopback need no TLS

    return httpx2.create_ssl_context(trust_env=trust_env)
