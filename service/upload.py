"""A request body that is read as it is used: its sender waits while the handler is busy.

The framework reads a whole body into memory, as fast as the network brings it. Routes that take uploads far
larger than memory should hold read theirs here, straight from the server's queue, which is bounded.
"""

import trio
from hypercorn.typing import ASGIReceiveCallable
from werkzeug.exceptions import RequestEntityTooLarge, RequestTimeout

DISCARD_S = 10.0
"""How long the rest of a refused upload is read and thrown away, so that its sender can read why
(RFC 9112, 9.6)."""


class Upload:
    """The body of one request, as an iterator over its chunks. One task iterates, once."""

    def __init__(self, receive: ASGIReceiveCallable, *, max_bytes: int, timeout_s: float) -> None:
        """``timeout_s`` bounds the time from the first chunk asked for to the last one received."""
        self._receive = receive
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._until: float | None = None
        self._size = 0
        self.over = trio.Event()
        """Nothing more will come."""
        self.client_left = False

    def __aiter__(self) -> "Upload":
        return self

    async def __anext__(self) -> bytes:
        """The next chunk. Raises the framework's errors for a body that is too large or too slow.

        Does not return when the client has left: whoever serves the request cancels it then.
        """
        if self._until is None:
            self._until = trio.current_time() + self._timeout_s
        while not self.over.is_set():
            with trio.move_on_at(self._until) as scope:
                chunk = await self._next_chunk()
            if scope.cancelled_caught:
                raise RequestTimeout
            self._size += len(chunk)
            if self._size > self._max_bytes:
                raise RequestEntityTooLarge
            if chunk:
                return chunk
        raise StopAsyncIteration

    async def _next_chunk(self) -> bytes:
        message = await self._receive()
        if message["type"] == "http.request":
            if not message.get("more_body", False):
                self.over.set()
            return message.get("body", b"")
        self.client_left = True
        self.over.set()
        await trio.sleep_forever()
        raise AssertionError("it sleeps until it is cancelled")

    def check_length(self, announced: str | None) -> None:
        """Raise RequestEntityTooLarge for a ``content-length`` beyond the bound."""
        if announced is not None and announced.isdigit() and int(announced) > self._max_bytes:
            raise RequestEntityTooLarge

    async def discard(self) -> None:
        """Read on and throw away, for a while, what the handler has not asked for."""
        with trio.move_on_after(DISCARD_S):
            while not self.over.is_set():
                await self._next_chunk()
