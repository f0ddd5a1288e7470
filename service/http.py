"""A request and a reply of the wire, as handlers see them. Nothing here knows the web framework.

That is what lets a handler be one function, whatever serves it.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Protocol

from service.auth import Principal
from service.errors import InvalidRequestError
from service.upload import Upload


class RequestHeaders:
    """Request header fields. Names are looked up in lower case; values are Latin-1 (RFC 9110, 5.5)."""

    __slots__ = ("_fields",)

    def __init__(self, fields: Iterable[tuple[bytes, bytes]]) -> None:
        self._fields: dict[str, list[str]] = {}
        for name, value in fields:
            self._fields.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))

    def get(self, name: str, default: str | None = None) -> str | None:
        """The first value."""
        values = self._fields.get(name)
        return values[0] if values else default

    def getlist(self, name: str) -> list[str]:
        """All values, in order."""
        return self._fields.get(name, [])

    def single(self, name: str) -> str | None:
        """The value of a field that may come once. Raises InvalidRequestError when it comes twice."""
        values = self._fields.get(name)
        if values is None:
            return None
        if len(values) > 1:
            raise InvalidRequestError(f"{name}: this header may be given only once")
        return values[0].strip()

    def __contains__(self, name: str) -> bool:
        return name in self._fields

    def items(self) -> Iterable[tuple[str, str]]:
        """Every field, repeated names repeated, grouped by name."""
        return ((name, value) for name, values in self._fields.items() for value in values)


@dataclass(slots=True, kw_only=True)
class Request:
    """One HTTP request."""

    method: str
    path: str
    """Without the ``/anthropic`` prefix."""
    headers: RequestHeaders
    query: Mapping[str, str]
    principal: Principal
    request_id: str
    origin: str
    """Scheme, host and prefix under which the client reached us, no slash at the end."""
    read_body: Callable[[], Awaitable[bytes]]
    """The whole body; raises the framework's errors for one that is too large or too slow."""
    closing: ExitStack
    """Closed when the request is over, however it ends: finished, failed, or its client gone."""

    upload: Upload | None = None
    """The body, piece by piece, on routes that take uploads; :attr:`read_body` is not to be used there."""

    @property
    def owner(self) -> str | None:
        """Whose jobs the caller may see; None: everybody's."""
        return None if self.principal.admin else self.principal.name


class Outlet(Protocol):
    """A connection, as a stream sees it that may write to it from another task."""

    @property
    def backlog(self) -> int:
        """Bytes it was handed and could not send yet. They leave with the next chunk, be it an empty one."""
        ...

    def push(self, piece: bytes) -> bool:
        """Send a piece now, or as much of it as leaves. False: nothing of it was taken. Never raises."""
        ...


class ReplyStream(Protocol):
    """The body of a streamed reply."""

    def __aiter__(self) -> AsyncIterator[bytes]:
        """Chunks as they are to leave."""
        ...


HeaderList = list[tuple[str, str]]


@dataclass(slots=True)
class Reply:
    """One HTTP response."""

    status: int
    body: bytes | ReplyStream
    headers: HeaderList = field(default_factory=list)
    content_type: str = "application/json"
    attach: Callable[[Outlet], None] | None = None
    """For a streamed body that can make use of an outlet: while its next chunk is waited for, it may push."""
    on_sent: Callable[[], None] | None = None
    """Called once all of it has left; not when the client was gone before."""

    def all_headers(self) -> HeaderList:
        """Every header but ``content-length``."""
        found = [("content-type", self.content_type), *self.headers]
        if not isinstance(self.body, bytes):
            # Reverse proxies buffer a stream unless told not to.
            found += [("cache-control", "no-cache"), ("x-accel-buffering", "no")]
        return found
