"""The transport for upstreams behind a proxy: httpx2 does the talking, we keep the bounds.

Its pool walks all its connections for every request, which a hot path could not afford.
"""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any

import h11
import httpx2
import trio

from actors.errors import ProviderError, UpstreamConnectionError, UpstreamProtocolError
from actors.providers.options import UpstreamLimits
from actors.providers.transport import (
    CLOSE_TIMEOUT_S,
    KEEP_ALIVE_S,
    PIECE_BYTES,
    STALE_S,
    Response,
    check_head,
    timeout_error,
    too_large,
)
from events.types import Headers


class _Answer:
    """A :class:`~actors.providers.transport.StreamResponse` over httpx2's."""

    def __init__(self, response: httpx2.Response, limits: UpstreamLimits, total_at: float) -> None:
        self.status = response.status_code
        self.headers: Headers = tuple(
            (name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in response.headers.raw
        )
        self._response = response
        self._chunks = response.aiter_raw()
        self._limits = limits
        self._total_at = total_at
        self._received = 0
        self._started = False

    def header(self, name: str) -> str | None:
        """See the port."""
        return next((value for field, value in self.headers if field == name), None)

    async def receive(self) -> bytes:
        """See the port."""
        deadline = min(trio.current_time() + self._limits.idle_timeout_s, self._total_at)
        chunk: bytes | None = None
        self._started = True
        try:
            with trio.move_on_at(deadline):
                chunk = await anext(self._chunks, b"")
        except httpx2.TransportError as error:
            # A cut connection and broken chunks are the same type to the client library.
            raise UpstreamProtocolError("the upstream broke off in the middle of its answer") from error
        if chunk is None:
            bound = "total" if deadline == self._total_at else "idle"
            raise timeout_error(bound, self._limits)
        self._received += len(chunk)
        if self._received > self._limits.max_response_bytes:
            raise too_large(self._limits)
        return chunk

    async def read(self) -> bytes:
        """See the port."""
        pieces: list[bytes] = []
        while piece := await self.receive():
            pieces.append(piece)
        return b"".join(pieces)

    async def aclose(self) -> None:
        """Give the connection back if the body was read to its end, else close it. Idempotent."""
        await self._response.aclose()
        # Closing the library's iterator would leave the one inside it to the garbage collector. Going on
        # with it ends both: what was read already comes out, then the closed connection breaks it.
        if self._started:
            with suppress(httpx2.TransportError):
                async for _ in self._chunks:
                    pass


class ProxiedTransport:
    """:class:`~actors.providers.transport.Transport` through httpx2."""

    def __init__(self, limits: UpstreamLimits, base_url: str, *, trust_env: bool = True) -> None:
        """``trust_env``: take proxies and certificate locations from the environment."""
        self._limits = limits
        self._base_url = base_url.rstrip("/")
        self._client = httpx2.AsyncClient(
            timeout=None,  # every wait is under a cancel scope of ours
            follow_redirects=False,
            trust_env=trust_env,
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
            limits=httpx2.Limits(
                max_connections=limits.max_connections,
                max_keepalive_connections=limits.max_idle_connections,
                keepalive_expiry=KEEP_ALIVE_S,
            ),
        )

    async def request(self, method: str, path: str, *, headers: Headers = (), body: bytes = b"") -> Response:
        """See the port."""
        async with self.open_stream(method, path, headers=headers, body=body) as response:
            return Response(response.status, response.headers, await response.read())

    @asynccontextmanager
    async def open_stream(
        self, method: str, path: str, *, headers: Headers = (), body: bytes = b""
    ) -> AsyncIterator[_Answer]:
        """See the port."""
        if self._client.is_closed:
            raise UpstreamConnectionError("the provider is closed")
        total_at = trio.current_time() + self._limits.total_timeout_s
        response = await self._send(method, self._base_url + path, headers, body, total_at)
        stream = _Answer(response, self._limits, total_at)
        try:
            check_head(stream, self._limits)
            yield stream
        finally:
            with trio.move_on_after(CLOSE_TIMEOUT_S, shield=True):
                await stream.aclose()

    async def _send(
        self, method: str, url: str, headers: Headers, body: bytes, total_at: float
    ) -> httpx2.Response:
        attempt = _Attempt(self._limits, total_at)
        begun_at = trio.current_time()
        try:
            return await attempt.send(self._client, method, url, headers, body)
        except UpstreamConnectionError:
            # The peer may close an idle connection at any moment, also while we write to it (RFC 9112,
            # 9.3.1). The pool has dropped it, so the next one is fresh or at least looked alive just now.
            if attempt.connected or trio.current_time() - begun_at >= STALE_S:
                raise
        return await _Attempt(self._limits, total_at).send(self._client, method, url, headers, body)

    async def aclose(self) -> None:
        """See the port."""
        with trio.move_on_after(CLOSE_TIMEOUT_S, shield=True):
            await self._client.aclose()


class _Attempt:
    """One request up to the head of its answer: moves the deadline from bound to bound on the way."""

    def __init__(self, limits: UpstreamLimits, total_at: float) -> None:
        self.connected = False
        """Whether it opened a connection of its own."""
        self._limits = limits
        self._total_at = total_at
        self._scope = trio.CancelScope()
        self._bound = "connect"
        self._network: Any = None
        self._enter("connect", limits.connect_timeout_s)

    async def send(
        self, client: httpx2.AsyncClient, method: str, url: str, headers: Headers, body: bytes
    ) -> httpx2.Response:
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]
        raw.append((b"accept-encoding", b"identity"))
        if body:
            raw.append((b"content-length", str(len(body)).encode()))
        try:
            request = httpx2.Request(
                method,
                url,
                headers=raw,
                content=self._pieces(body) if body else None,
                extensions={"trace": self._trace},
            )
            with self._scope:
                return await client.send(request, stream=True)
        except (httpx2.TransportError, httpx2.InvalidURL) as error:
            await self._close_network()  # noqa: ASYNC120 - it is shielded and has a deadline
            raise _error_before_answer(error) from error
        except BaseException:
            await self._close_network()  # noqa: ASYNC102 - it is shielded and has a deadline
            raise
        await self._close_network()
        raise timeout_error("total" if self._scope.deadline == self._total_at else self._bound, self._limits)

    async def _pieces(self, body: bytes) -> AsyncIterator[bytes]:
        for start in range(0, len(body), PIECE_BYTES):
            self._enter("send", self._limits.idle_timeout_s)
            yield body[start : start + PIECE_BYTES]

    async def _trace(self, name: str, info: Mapping[str, Any]) -> None:
        step = name.partition(".")[2]
        if step == "connect_tcp.started":
            self.connected = True
        elif step == "connect_tcp.complete":
            self._network = info["return_value"]
        elif step == "send_request_headers.started":
            self._enter("send", self._limits.idle_timeout_s)
        elif step == "receive_response_headers.started":
            self._enter("first byte", self._limits.first_byte_timeout_s)

    def _enter(self, bound: str, seconds: float) -> None:
        self._bound = bound
        self._scope.deadline = min(trio.current_time() + seconds, self._total_at)

    async def _close_network(self) -> None:
        # The pool forgets a connection whose TLS handshake was cancelled without closing its socket.
        if self._network is not None:
            with trio.move_on_after(CLOSE_TIMEOUT_S, shield=True):
                await self._network.aclose()


def _error_before_answer(error: Exception) -> ProviderError:
    if isinstance(error, httpx2.LocalProtocolError | httpx2.UnsupportedProtocol | httpx2.InvalidURL):
        return ProviderError("the request cannot be put into HTTP", status=400)
    if isinstance(error, httpx2.RemoteProtocolError) and _is_garbage(error):
        return UpstreamProtocolError("the upstream's answer is not HTTP")
    if isinstance(error, httpx2.ConnectError | httpx2.ProxyError):
        return UpstreamConnectionError("no connection to the upstream")
    return UpstreamConnectionError("the upstream closed the connection without an answer")


def _is_garbage(error: BaseException) -> bool:
    """Whether the HTTP parser refused the bytes (as against: there were none)."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, h11.RemoteProtocolError):
            return True
        cause = cause.__cause__ or cause.__context__
    return False
