"""HTTP to an upstream, with every wait and every size bounded. The port; its two adapters lie beside it.

Time bounds follow trio's clock. A call passes through these, one after the other, with ``total_timeout_s``
over all of them:

    wait for a connection, connect, TLS   connect_timeout_s
    each piece of the request sent        idle_timeout_s
    request sent until the status line    first_byte_timeout_s
    each read of the answer               idle_timeout_s

What holds besides: certificates are verified against the system's trust store; no redirect is followed;
no cookie is kept; a compressed answer is refused, since ``identity`` was asked for; the head of an answer
is bounded (100 KiB). Proxies are taken from the environment unless told otherwise: an upstream behind one
is called through httpx2, any other over connections of our own, since a client library's pool and layers
cost more than all the rest of a call.

No error raised here names the upstream's address or shows a header.
"""

from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from actors.errors import UpstreamProtocolError, UpstreamTimeoutError
from actors.providers.options import UpstreamLimits
from actors.timers import Timers
from events.types import Headers

CLOSE_TIMEOUT_S = 2.0
"""How long closing a connection, or all of them, may take; it goes on under cancellation."""
KEEP_ALIVE_S = 30.0
"""How long an idle connection is kept."""
PIECE_BYTES = 256 * 1024
"""Of a request body, sent under one idle bound."""
STALE_S = 1.0
"""A kept connection that ends so soon after a request was sent on it was closed before it: try a fresh one.
One that ends later may have worked on the request, which is then not sent a second time."""
MAX_HEAD_BYTES = 100 * 1024
"""Of an answer's status line and header fields."""


@dataclass(frozen=True, slots=True)
class Response:
    """A whole answer, within the size bound."""

    status: int
    headers: Headers
    body: bytes


class StreamResponse(Protocol):
    """An answer whose body is still coming. Belongs to :meth:`Transport.open_stream`."""

    status: int
    headers: Headers

    def header(self, name: str) -> str | None:
        """The first header field of that (lower-case) name."""
        ...

    async def receive(self) -> bytes:
        """The next bytes of the body, as they come; ``b""`` at its end, and ever after.

        Raises UpstreamTimeoutError after ``idle_timeout_s`` or at the end of ``total_timeout_s``, and
        UpstreamProtocolError when the upstream hangs up, sends garbage or passes ``max_response_bytes``.
        When cancelled or failed, the connection is closed and nothing more comes.
        """
        ...

    async def read(self) -> bytes:
        """What is left of the body, whole. Raises as :meth:`receive` does."""
        ...


class Transport(Protocol):
    """Calls to one upstream over a bounded pool of HTTP/1.1 connections. Closed by :meth:`aclose`."""

    async def request(self, method: str, path: str, *, headers: Headers = (), body: bytes = b"") -> Response:
        """The whole answer, whatever its status. Raises and cancels as :meth:`open_stream` does."""
        ...

    def open_stream(
        self, method: str, path: str, *, headers: Headers = (), body: bytes = b""
    ) -> AbstractAsyncContextManager[StreamResponse]:
        """Send a request; entering returns once the head of the answer is here, whatever its status.

        ``path`` is appended to the base URL. Leaving gives the connection back if the body was read to its
        end and closes it otherwise; so does cancellation, at any point. A kept connection that turns out to
        have been closed before the request is replaced once; a request that may have been worked on is never
        sent twice.

        Raises UpstreamConnectionError (no connection, or none that answered), UpstreamTimeoutError (which
        names the bound) and UpstreamProtocolError (not HTTP, a redirect, compressed, announced too large).
        """
        ...

    async def aclose(self) -> None:
        """Close every connection. Takes at most ``CLOSE_TIMEOUT_S``, also when cancelled."""
        ...


def make_transport(
    limits: UpstreamLimits, base_url: str, *, timers: Timers, trust_env: bool = True
) -> Transport:
    """The transport for an upstream. ``trust_env``: take proxies and certificates from the environment.

    Time bounds run out only while ``timers`` run.
    """
    # Late: most daemons need one of the two.
    if trust_env and _behind_proxy(base_url):
        from actors.providers.transport_httpx2 import ProxiedTransport  # noqa: PLC0415 - see above

        return ProxiedTransport(limits, base_url, trust_env=True)
    from actors.providers.transport_direct import DirectTransport  # noqa: PLC0415 - see above

    return DirectTransport(limits, base_url, timers=timers, trust_env=trust_env)


def _behind_proxy(base_url: str) -> bool:
    """Whether HTTP(S)_PROXY, ALL_PROXY and NO_PROXY put a proxy before this upstream."""
    url = urlsplit(base_url)
    proxies = getproxies()
    named = proxies.get(url.scheme) or proxies.get("all")
    return bool(named) and not proxy_bypass(url.hostname or "")


def check_head(response: StreamResponse, limits: UpstreamLimits) -> None:
    """Raise UpstreamProtocolError for an answer that is not to be read."""
    if 300 <= response.status < 400:
        raise UpstreamProtocolError("the upstream answered with a redirect, which is not followed")
    if not 200 <= response.status < 600:
        raise UpstreamProtocolError("the upstream answered with an unknown status")
    if (response.header("content-encoding") or "identity").lower() != "identity":
        raise UpstreamProtocolError("the upstream answered with a compressed body, which was not asked for")
    length = response.header("content-length")
    # h11 has checked that it is a number.
    if length is not None and int(length) > limits.max_response_bytes:
        raise too_large(limits)


def too_large(limits: UpstreamLimits) -> UpstreamProtocolError:
    """The error for an answer beyond the bound. Asking again would bring it again."""
    return UpstreamProtocolError(
        f"the upstream's answer is larger than {limits.max_response_bytes} bytes",
        headers=(("x-should-retry", "false"),),
    )


def timeout_error(bound: str, limits: UpstreamLimits) -> UpstreamTimeoutError:
    """The error for a time bound that ran out, named in it."""
    text = {
        "connect": f"no connection to the upstream within {limits.connect_timeout_s:g} s (connect timeout)",
        "send": f"the upstream took no data for {limits.idle_timeout_s:g} s (idle timeout)",
        "first byte": f"no answer from the upstream within {limits.first_byte_timeout_s:g} s"
        " (first byte timeout)",
        "idle": f"the upstream was silent for {limits.idle_timeout_s:g} s (idle timeout)",
        "total": f"the upstream was not done within {limits.total_timeout_s:g} s (total timeout)",
    }
    return UpstreamTimeoutError(text[bound])
