"""One signed POST to an endpoint, and what came of it.

Every try resolves the name anew, checks what it resolves to (:mod:`actors.webhooks.addresses`), and connects
to an address that was checked; TLS still asks for, and verifies, the name. A connection serves one try.
Redirects are not followed, no proxy is used, and of an answer's body at most 1 KB is read, and dropped.
"""

import ssl
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

import h11
import trio

from actors.webhooks.addresses import AddressRefusedError, Resolve, checked_addresses, resolve
from events.types import Headers

MAX_HEAD_BYTES = 16 * 1024
"""Of an answer's status line and header fields."""
MAX_BODY_BYTES = 1024
"""Of an answer's body: read, so that the endpoint sees its answer taken, and dropped."""
READ_BYTES = 256
"""Taken from the connection at once, so that no more is read than that."""
BODY_S = 1.0
"""How long that may take. The answer's status has decided by then."""
CONNECT_S = 3.0
"""For one of several addresses to take the connection before the next is tried."""
USER_AGENT = b"messagesd"


@dataclass(frozen=True, slots=True)
class Answered:
    """The endpoint answered."""

    status: int
    retry_after: str | None = None
    """The header field, as it came."""


@dataclass(frozen=True, slots=True)
class NotReached:
    """No answer: another try may get one."""

    reason: str
    """For people. Names no address."""


@dataclass(frozen=True, slots=True)
class NotCalled:
    """The endpoint's address is not one to be called. Nothing was sent."""

    reason: str


Outcome = Answered | NotReached | NotCalled


class _NotReachedError(Exception):
    """Why there is no answer."""


class EndpointClient:
    """Calls one endpoint. Safe to use from several tasks; holds nothing open between calls."""

    def __init__(
        self,
        url: str,
        *,
        allow_private: bool,
        timeout_s: float,
        tls: ssl.SSLContext | None = None,
        resolve: Resolve = resolve,
    ) -> None:
        """``tls``: needed for an https URL, without credentials or fragment."""
        parts = urlsplit(url)
        self._tls = tls if parts.scheme == "https" else None
        self._host = parts.hostname or ""
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._host_header = parts.netloc.encode("ascii")
        self._target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        self._allow_private = allow_private
        self._timeout_s = timeout_s
        self._resolve = resolve

    async def post(self, headers: Headers, body: str) -> Outcome:
        """Send ``body`` (JSON) and wait for the answer's head, ``timeout_s`` in all. Raises nothing.

        Cancelled, it closes the connection; the endpoint may have heard all the same.
        """
        with trio.move_on_after(self._timeout_s):
            try:
                return await self._call(headers, body)
            except AddressRefusedError as error:
                return NotCalled(str(error))
            except _NotReachedError as error:
                return NotReached(str(error))
            except (trio.BrokenResourceError, h11.RemoteProtocolError):
                return NotReached("no answer, or not one in HTTP")
        return NotReached(f"no answer within {self._timeout_s:g} s")

    async def _call(self, headers: Headers, body: str) -> Answered:
        """One exchange on a connection of its own. Raises what says that there is no answer."""
        connection = await self._connect()
        stream: trio.abc.Stream = connection
        try:
            if self._tls is not None:
                stream = await self._secured(connection, self._tls)
            http = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD_BYTES)
            await stream.send_all(self._request(http, headers, body.encode()))
            head = await _next(http, stream)
            while isinstance(head, h11.InformationalResponse):
                head = await _next(http, stream)
            if not isinstance(head, h11.Response):
                raise _NotReachedError("the connection broke before an answer")
            await _take_body(http, stream)
            return _answered(head)
        finally:
            # At once, without a TLS farewell: it must not be lost to a cancellation.
            connection.socket.close()

    async def _connect(self) -> trio.SocketStream:
        """A connection to an address that was checked. Raises AddressRefusedError, _NotReachedError."""
        try:
            addresses = await checked_addresses(
                self._host, self._port, allow_private=self._allow_private, resolve=self._resolve
            )
        except (OSError, UnicodeError) as error:
            # UnicodeError: no name that DNS could hold (RFC 1035, 2.3.4).
            raise _NotReachedError("its name cannot be resolved") from error
        for address in addresses:
            last = address == addresses[-1]
            with trio.move_on_after(self._timeout_s if last else min(CONNECT_S, self._timeout_s)):
                try:
                    return await trio.open_tcp_stream(str(address), self._port)
                except OSError:
                    continue
        raise _NotReachedError("no connection")

    async def _secured(self, connection: trio.SocketStream, tls: ssl.SSLContext) -> trio.abc.Stream:
        stream = trio.SSLStream(connection, tls, server_hostname=self._host, https_compatible=True)
        try:
            await stream.do_handshake()
        except trio.BrokenResourceError as error:
            unverified = isinstance(error.__cause__, ssl.SSLCertVerificationError)
            raise _NotReachedError(
                "its certificate cannot be verified" if unverified else "no TLS connection"
            ) from error
        return stream

    def _request(self, http: h11.Connection, headers: Headers, body: bytes) -> bytes:
        fields = [
            (b"host", self._host_header),
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"user-agent", USER_AGENT),
            (b"connection", b"close"),
        ]
        fields += [(name.encode("ascii"), value.encode("ascii")) for name, value in headers]
        request = h11.Request(method="POST", target=self._target, headers=fields)
        parts = (http.send(request), http.send(h11.Data(data=body)), http.send(h11.EndOfMessage()))
        return b"".join(part for part in parts if part)


async def _next(http: h11.Connection, stream: trio.abc.Stream) -> object:
    """The next event of the answer. Raises RemoteProtocolError, BrokenResourceError."""
    while (event := http.next_event()) is h11.NEED_DATA:
        http.receive_data(bytes(await stream.receive_some(READ_BYTES)))
    return event


async def _take_body(http: h11.Connection, stream: trio.abc.Stream) -> None:
    """Read what may be read of the body. An answer counts, whatever comes after its head."""
    size = 0
    with trio.move_on_after(BODY_S):
        try:
            while size <= MAX_BODY_BYTES - READ_BYTES:
                event = await _next(http, stream)
                if not isinstance(event, h11.Data):
                    return
                size += len(event.data)
        except (trio.BrokenResourceError, h11.RemoteProtocolError):
            return


def _answered(head: h11.Response) -> Answered:
    retry_after = next((value for name, value in head.headers if name == b"retry-after"), None)
    return Answered(head.status_code, None if retry_after is None else retry_after.decode("latin-1"))


def retry_after_s(value: str | None, *, now: float) -> float:
    """``Retry-After`` (RFC 9110, 10.2.3) in seconds from ``now`` (Unix seconds); 0 where it says nothing."""
    if value is None:
        return 0.0
    text = value.strip()
    if text.isascii() and text.isdigit() and len(text) <= 9:
        return float(text)
    try:
        moment = parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        # OverflowError: the parser's answer to a number that no date has.
        return 0.0
    # RFC 9110, 5.6.7: the date is in GMT, whatever it calls that.
    aware = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment
    return max(0.0, (aware - datetime.fromtimestamp(now, UTC)).total_seconds())


def tls_context() -> ssl.SSLContext:
    """Certificates verified against the system's trust store, or what SSL_CERT_FILE and SSL_CERT_DIR name."""
    # Late: an endpoint on plain HTTP needs none, and making one takes a while.
    import httpx2  # noqa: PLC0415 - see above

    return httpx2.create_ssl_context()
