"""One connection to an upstream, and the parser of what comes over it.

Answers are parsed by httptools (llhttp, the parser of Node.js), in C: a stream's events come as a chunk each,
and a parser in Python costs more for them than all the rest of their way. It is strict; what it leaves to its
caller is done here: the sizes of heads and trailers, and answers that end with their connection.
"""

import os
from math import inf

import httptools
import trio

from actors.errors import UpstreamConnectionError, UpstreamProtocolError
from actors.providers.transport import MAX_HEAD_BYTES
from actors.timers import Timers

READ_BYTES = 64 * 1024
"""Asked of the socket at once."""

Stream = trio.SocketStream | trio.SSLStream[trio.SocketStream]

_VERSIONS = ("1.1", "1.0")


class Link:
    """One connection, and the parser of its answers. The ``on_`` methods are the parser's to call."""

    __slots__ = (
        "_between",
        "_parser",
        "_timed_out",
        "_timer",
        "complete",
        "fields",
        "has_head",
        "idle_since",
        "on_body",
        "pieces",
        "reusable",
        "socket",
        "status",
        "stream",
        "used",
    )

    def __init__(self, stream: Stream, socket: trio.socket.SocketType, timers: Timers) -> None:
        self.stream = stream
        self.socket = socket
        self._timer = timers.timer(self._time_out)
        self._timed_out = False
        self.used = False
        self.idle_since = 0.0
        self.pieces: list[bytes] = []
        """Of the body, not taken yet."""
        self.on_body = self.pieces.append
        self.fields: list[tuple[str, str]] = []
        self.status = 0
        self.has_head = False
        self.complete = False
        """The end of the answer was seen."""
        self.reusable = False
        """Another request may follow once it is."""
        self._between = 0
        self._parser = httptools.HttpResponseParser(self)

    def begin(self) -> None:
        """An answer is to come."""
        self.used = True
        self.status = self._between = 0
        self.fields = []
        self.pieces.clear()
        self.has_head = self.complete = self.reusable = False

    async def read_until(self, deadline: float) -> bytes | bytearray:
        """As :meth:`read`. Raises trio.TooSlowError at that moment of trio's clock, the link closed."""
        self._timer.set(deadline)
        try:
            data = await self.read()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            if self._timed_out:
                raise trio.TooSlowError from None
            raise
        finally:
            self._timer.at = inf
        if self._timed_out:
            # TLS gave what it had read before.
            raise trio.TooSlowError
        return data

    def _time_out(self) -> None:
        # It ends the read, and nothing else would be done with the link after that.
        self._timed_out = True
        self.close()

    async def read(self) -> bytes | bytearray:
        """What has come, or comes next; empty at the connection's end.

        Raises trio.BrokenResourceError, or trio.ClosedResourceError when it was closed meanwhile.
        """
        if isinstance(self.stream, trio.SSLStream):
            return await self.stream.receive_some(READ_BYTES)
        # A stream of trio's would first ask the socket in vain, and pause once more when it has its bytes.
        while True:
            if self.socket.fileno() < 0:
                raise trio.ClosedResourceError
            await trio.lowlevel.wait_readable(self.socket)
            try:
                return os.read(self.socket.fileno(), READ_BYTES)
            except BlockingIOError:
                continue
            except OSError as error:
                raise trio.BrokenResourceError from error

    def write_now(self, data: bytes) -> int:
        """How many bytes the socket took at once; 0 over TLS. Raises trio.BrokenResourceError."""
        if isinstance(self.stream, trio.SSLStream):
            return 0
        try:
            return os.write(self.socket.fileno(), data)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise trio.BrokenResourceError from error

    def feed(self, data: bytes | bytearray) -> None:
        """Take what was read; no bytes are the end of the connection. Raises UpstreamProtocolError.

        It is told as UpstreamConnectionError before the first byte of an answer.
        """
        if not data:
            self._end()
            return
        found = len(self.pieces)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            # What is not an answer any more concerns the connection, not the answer before it.
            self.reusable = False
            if not self.complete:
                raise broken_off() if self.has_head else not_http() from error
        # The parser itself bounds neither the head, nor what lies between chunks, nor trailers.
        self._between = 0 if len(self.pieces) > found else self._between + len(data)
        if self._between > MAX_HEAD_BYTES and not self.complete:
            raise broken_off() if self.has_head else not_http()

    def _end(self) -> None:
        self.reusable = False
        if self.complete:
            return
        if not self.has_head:
            if self._between:
                raise not_http()
            raise UpstreamConnectionError("the upstream closed the connection without an answer")
        if any(name in ("content-length", "transfer-encoding") for name, _ in self.fields):
            raise broken_off()
        # RFC 9112, 6.3: such an answer ends with its connection.
        self.complete = True

    def on_message_begin(self) -> None:
        """A status line begins."""
        if self.complete:
            self.reusable = False

    def on_header(self, name: bytes, value: bytes) -> None:
        """A field of the head, or of the trailer, which is not wanted."""
        if not self.has_head:
            self.fields.append((name.decode("latin-1").lower(), value.decode("latin-1").strip()))

    def on_headers_complete(self) -> None:
        """The head is here: that of the answer, or an interim one (RFC 9110, 15.2)."""
        if self.complete:
            return
        self.status = self._parser.get_status_code()
        if self.status < 200:
            self.fields = []
            return
        self.has_head = True
        self.reusable = self._parser.should_keep_alive()

    def on_message_complete(self) -> None:
        """The answer, or an interim one, is over."""
        self.complete = self.complete or self.has_head

    def check_framing(self) -> None:
        """Raise UpstreamProtocolError for a head this cannot go on from."""
        codings = [value.lower() for name, value in self.fields if name == "transfer-encoding"]
        if self._parser.get_http_version() not in _VERSIONS or codings not in ([], ["chunked"]):
            raise not_http()

    def close(self) -> None:
        """At once, without a TLS farewell. Synchronous: it must not be lost to a cancellation."""
        self._timer.stop()
        self.socket.close()


def not_http() -> UpstreamProtocolError:
    """The error for bytes that are no answer."""
    return UpstreamProtocolError("the upstream's answer is not HTTP")


def broken_off() -> UpstreamProtocolError:
    """The error for an answer without its end."""
    return UpstreamProtocolError("the upstream broke off in the middle of its answer")
