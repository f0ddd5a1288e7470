"""HTTP to an upstream, with every wait and every size bounded. The one place that knows the HTTP client.

Time bounds are trio cancel scopes, so they follow trio's clock. A call passes through these, one after
the other, with ``total_timeout_s`` over all of them:

    wait for a connection, connect, TLS   connect_timeout_s
    each piece of the request sent        idle_timeout_s
    request sent until the status line    first_byte_timeout_s
    each read of the answer               idle_timeout_s

What holds besides: certificates are verified against the system's trust store; no redirect is followed;
no cookie is kept; a compressed answer is refused, since ``identity`` was asked for; the head of an answer
is bounded by the client library (100 KiB). Proxies are taken from the environment unless told otherwise.

No error raised here names the upstream's address or shows a header.
"""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any

import h11
import httpx2
import trio

from actors.errors import (
    ProviderError,
    UpstreamConnectionError,
    UpstreamProtocolError,
    UpstreamTimeoutError,
)
from actors.providers.options import UpstreamLimits
from events.types import Headers

CLOSE_TIMEOUT_S = 2.0
"""How long closing a connection, or all of them, may take; it goes on under cancellation."""
KEEP_ALIVE_S = 30.0
"""How long an idle connection is kept."""
_PIECE_BYTES = 256 * 1024  # of a request body, sent under one idle bound


@dataclass(frozen=True, slots=True)
class Response:
    """A whole answer, within the size bound."""

    status: int
    headers: Headers
    body: bytes


class StreamResponse:
    """An answer whose body is still coming. Belongs to :meth:`Transport.open_stream`."""

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
        """The first header field of that (lower-case) name."""
        return next((value for field, value in self.headers if field == name), None)

    async def receive(self) -> bytes:
        """The next bytes of the body, as they come; ``b""`` at its end, and ever after.

        Raises UpstreamTimeoutError after ``idle_timeout_s`` or at the end of ``total_timeout_s``, and
        UpstreamProtocolError when the upstream hangs up, sends garbage or passes ``max_response_bytes``.
        When cancelled or failed, the connection is closed and nothing more comes.
        """
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
            raise _timeout(bound, self._limits)
        self._received += len(chunk)
        if self._received > self._limits.max_response_bytes:
            raise _too_large(self._limits)
        return chunk

    async def read(self) -> bytes:
        """What is left of the body, whole. Raises as :meth:`receive` does."""
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


class Transport:
    """Calls to one upstream over a bounded pool of HTTP/1.1 connections. Closed by :meth:`aclose`."""

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
        """The whole answer, whatever its status. Raises and cancels as :meth:`open_stream` does."""
        async with self.open_stream(method, path, headers=headers, body=body) as response:
            return Response(response.status, response.headers, await response.read())

    @asynccontextmanager
    async def open_stream(
        self, method: str, path: str, *, headers: Headers = (), body: bytes = b""
    ) -> AsyncIterator[StreamResponse]:
        """Send a request; entering returns once the head of the answer is here, whatever its status.

        ``path`` is appended to the base URL. Leaving gives the connection back if the body was read to its
        end and closes it otherwise; so does cancellation, at any point. A kept connection that turns out to
        be closed before a byte of the answer came is replaced once.

        Raises UpstreamConnectionError (no connection, or none that answered), UpstreamTimeoutError (which
        names the bound) and UpstreamProtocolError (not HTTP, a redirect, compressed, announced too large).
        """
        if self._client.is_closed:
            raise UpstreamConnectionError("the provider is closed")
        total_at = trio.current_time() + self._limits.total_timeout_s
        response = await self._send(method, self._base_url + path, headers, body, total_at)
        stream = StreamResponse(response, self._limits, total_at)
        try:
            _check_head(stream, self._limits)
            yield stream
        finally:
            with trio.move_on_after(CLOSE_TIMEOUT_S, shield=True):
                await stream.aclose()

    async def _send(
        self, method: str, url: str, headers: Headers, body: bytes, total_at: float
    ) -> httpx2.Response:
        attempt = _Attempt(self._limits, total_at)
        try:
            return await attempt.send(self._client, method, url, headers, body)
        except UpstreamConnectionError:
            # The peer may close an idle connection at any moment, also while we write to it (RFC 9112,
            # 9.3.1). The pool has dropped it, so the next one is fresh or at least looked alive just now.
            if attempt.connected:
                raise
        return await _Attempt(self._limits, total_at).send(self._client, method, url, headers, body)

    async def aclose(self) -> None:
        """Close every connection. Takes at most ``CLOSE_TIMEOUT_S``, also when cancelled."""
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
        raise _timeout("total" if self._scope.deadline == self._total_at else self._bound, self._limits)

    async def _pieces(self, body: bytes) -> AsyncIterator[bytes]:
        for start in range(0, len(body), _PIECE_BYTES):
            self._enter("send", self._limits.idle_timeout_s)
            yield body[start : start + _PIECE_BYTES]

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


def _check_head(response: StreamResponse, limits: UpstreamLimits) -> None:
    if 300 <= response.status < 400:
        raise UpstreamProtocolError("the upstream answered with a redirect, which is not followed")
    if not 200 <= response.status < 600:
        raise UpstreamProtocolError("the upstream answered with an unknown status")
    if (response.header("content-encoding") or "identity").lower() != "identity":
        raise UpstreamProtocolError("the upstream answered with a compressed body, which was not asked for")
    length = response.header("content-length")
    # The client library has checked that it is a number.
    if length is not None and int(length) > limits.max_response_bytes:
        raise _too_large(limits)


def _too_large(limits: UpstreamLimits) -> UpstreamProtocolError:
    return UpstreamProtocolError(f"the upstream's answer is larger than {limits.max_response_bytes} bytes")


def _timeout(bound: str, limits: UpstreamLimits) -> UpstreamTimeoutError:
    text = {
        "connect": f"no connection to the upstream within {limits.connect_timeout_s:g} s (connect timeout)",
        "send": f"the upstream took no data for {limits.idle_timeout_s:g} s (idle timeout)",
        "first byte": f"no answer from the upstream within {limits.first_byte_timeout_s:g} s"
        " (first byte timeout)",
        "idle": f"the upstream was silent for {limits.idle_timeout_s:g} s (idle timeout)",
        "total": f"the upstream was not done within {limits.total_timeout_s:g} s (total timeout)",
    }
    return UpstreamTimeoutError(text[bound])


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
