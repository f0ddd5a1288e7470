"""The hottest routes, answered in the connection's own terms: no framework, no channel, one task a request.

The handler is the same function that the framework's view calls; what differs is only who reads the request
and writes the reply.
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol
from urllib.parse import parse_qsl

import h11
import trio
from hypercorn.protocol.events import Body, EndBody, Event, Response, StreamClosed
from hypercorn.protocol.h11 import STREAM_ID

from service.http import Reply

if TYPE_CHECKING:
    from service.connection import Protocol as HttpProtocol

Respond = Callable[[Reply, str], Awaitable[None]]
"""Writes a reply with its request id, streams to their end."""


@dataclass(frozen=True, slots=True)
class DirectCall:
    """A whole request."""

    method: str
    path: str
    """Decoded no further than ASCII; without query and prefix."""
    prefix: str
    query: Mapping[str, str]
    headers: list[tuple[bytes, bytes]]
    body: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectRoute:
    """A route that needs no framework."""

    path: str
    prefix: str
    query: bytes
    max_body_bytes: int
    body_timeout_s: float
    reads_body: bool
    """False: the answer does not wait for the body, which may be empty, invalid or never come."""
    serve: Callable[[DirectCall, Respond], Awaitable[None]]
    """Answers the call: raises nothing of its own, and may be cancelled when the client leaves."""


class DirectApp(Protocol):
    """An application that answers some routes itself."""

    def direct(self, request: h11.Request) -> DirectRoute | None:
        """The route for a request, if it is one of those."""
        ...


class DirectStream:
    """One exchange, in the place of Hypercorn's ``HTTPStream``."""

    idle = False

    def __init__(self, protocol: "HttpProtocol", route: DirectRoute, request: h11.Request) -> None:
        self._protocol = protocol
        self._route = route
        self._request = request
        self._scope = trio.CancelScope()
        self._pieces: list[bytes] = []
        self._size = 0
        self.incomplete = route.reads_body
        """The body is still waited for."""
        self._finished = False

    async def start(self) -> None:
        """The head of the request is here."""
        if not self.incomplete:
            self._protocol.task_group.spawn(self._run)
            return
        length = next((value for name, value in self._request.headers if name == b"content-length"), b"0")
        # h11 has checked that it is a number.
        if int(length) > self._route.max_body_bytes:
            await self._protocol.refuse(413)
        else:
            self._protocol.connection_.read_until(trio.current_time() + self._route.body_timeout_s)

    async def handle(self, event: Event) -> None:
        """What the protocol has received for this exchange."""
        if isinstance(event, Body) and self.incomplete:
            self._size += len(event.data)
            if self._size > self._route.max_body_bytes:
                self._pieces.clear()
                await self._protocol.refuse(413)
            else:
                self._pieces.append(event.data)
        elif isinstance(event, EndBody) and self.incomplete:
            self.incomplete = False
            self._protocol.connection_.set_idle(False)
            self._protocol.task_group.spawn(self._run)
        elif isinstance(event, StreamClosed) and not self._finished:
            # The client left.
            self._scope.cancel()

    async def _run(self) -> None:
        route = self._route
        call = DirectCall(
            method=self._request.method.decode("ascii"),
            path=route.path,
            prefix=route.prefix,
            query=dict(parse_qsl(route.query.decode("latin-1"))) if route.query else {},
            headers=list(self._request.headers),
            body=self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces),
        )
        self._pieces.clear()
        with self._scope:
            await route.serve(call, self._respond)

    async def _respond(self, reply: Reply, request_id: str) -> None:
        send = self._protocol.stream_send
        headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in reply.all_headers()]
        headers.append((b"request-id", request_id.encode("ascii")))
        body = reply.body
        if isinstance(body, bytes):
            headers.append((b"content-length", b"%d" % len(body)))
            await send(Response(stream_id=STREAM_ID, status_code=reply.status, headers=headers))
            if body:
                await send(Body(stream_id=STREAM_ID, data=body))
        else:
            await send(Response(stream_id=STREAM_ID, status_code=reply.status, headers=headers))
            if reply.attach is not None:
                reply.attach(self._protocol)
            async for chunk in body:
                await self._protocol.send_piece(chunk)
        await send(EndBody(stream_id=STREAM_ID))
        self._finished = True
        await send(StreamClosed(stream_id=STREAM_ID))
