"""Frames -> bytes of a server-sent event stream (WHATWG HTML, 9.2), and what surrounds them.

``ping`` comes after a silence, ``error`` before an end that is not ``message_stop``; both as the Messages
API has them.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Protocol

import trio

from actors.broadcast import Nudged, Sink
from actors.errors import ActorError
from events.errors import LogError
from events.log.base import FrameCursor, FrameRun
from events.types import Failure
from service.errors import InvalidRequestError, envelope, failure_of
from service.heartbeat import Beat
from service.http import Outlet

CONTENT_TYPE = "text/event-stream; charset=utf-8"
PING = b'event: ping\ndata: {"type":"ping"}\n\n'
COMMENT = b":\n\n"
"""Keeps a connection alive where a ``ping`` event would not belong."""


def without_ids(runs: Sequence[FrameRun]) -> bytes:
    """The upstream's bytes as they came; what arrived together leaves together."""
    if len(runs) == 1:
        return b"".join(runs[0].frames)
    return b"".join(frame for run in runs for frame in run.frames)


def with_ids(runs: Sequence[FrameRun]) -> bytes:
    """The same with an ``id: ATTEMPT-FRAME`` line before each frame."""
    return b"".join(
        b"id: %d-%d\n%b" % (run.attempt, number, frame)
        for run in runs
        for number, frame in enumerate(run.frames, run.first)
    )


def error_frame(failure: Failure, request_id: str) -> bytes:
    """The event that ends a stream that failed."""
    return b"event: error\ndata: " + envelope(failure, request_id) + b"\n\n"


def parse_cursor(text: str) -> FrameCursor:
    """``ATTEMPT-FRAME`` -> cursor. Raises InvalidRequestError."""
    attempt, dash, frame = text.partition("-")
    digits = attempt + frame
    if not (dash and attempt and frame and digits.isascii() and digits.isdigit() and len(digits) <= 18):
        raise InvalidRequestError("Last-Event-ID: expected ATTEMPT-FRAME, for example 1-17")
    return FrameCursor(int(attempt), int(frame))


class Runs(Protocol):
    """Where a stream's runs come from: a subscription, or what stands before one."""

    def short_cut(self, sink: Sink) -> None:
        """See :meth:`actors.broadcast.Subscription.short_cut`."""
        ...

    def nudge(self) -> None:
        """See :meth:`actors.broadcast.Subscription.nudge`."""
        ...

    async def receive(self) -> Sequence[FrameRun]:
        """See :meth:`actors.broadcast.Subscription.receive`."""
        ...


class FrameStream:
    """The body of a watched job's stream: what is at hand, then live, then how it ended.

    Iterating may be cancelled at any point and frees nothing itself: the subscription belongs to the
    request, and is closed with it.
    """

    def __init__(
        self,
        subscription: Runs,
        *,
        first: Sequence[FrameRun],
        encode: Callable[[Sequence[FrameRun]], bytes],
        ending: Callable[[], Failure | None],
        beat: Beat,
        request_id: str,
    ) -> None:
        """``beat`` nudges the subscription."""
        self._subscription = subscription
        self._first = first
        self._encode = encode
        self._ending = ending
        self._beat = beat
        self._request_id = request_id
        self._over = False
        self._outlet: Outlet | None = None

    def attach(self, outlet: Outlet) -> None:
        """Have runs that the next chunk would bring pushed to ``outlet`` instead, as they come."""
        self._outlet = outlet
        self._subscription.short_cut(self._push)

    def _push(self, run: FrameRun) -> bool:
        outlet = self._outlet
        if outlet is None or not outlet.push(self._encode((run,))):
            return False
        self._beat.sent()
        if outlet.backlog:
            # Nothing but a chunk sends it on.
            self._subscription.nudge()
        return True

    def __aiter__(self) -> AsyncIterator[bytes]:
        """One pass over the stream."""
        return self

    async def __anext__(self) -> bytes:
        """The next bytes to leave: frames, a ping after silence, or the error that ended the job.

        None (``b""``) to have the rest of something pushed sent.
        """
        if self._over:
            raise StopAsyncIteration
        if self._first:
            runs, self._first = self._first, ()
            return self._encode(runs)
        failure: Failure | None
        try:
            runs = await self._subscription.receive()
        except Nudged:
            if self._outlet is not None and self._outlet.backlog:
                return b""
            self._beat.sent()
            return PING
        except (ActorError, LogError) as error:
            failure = failure_of(error)
        else:
            if runs:
                self._beat.sent()
                return self._encode(runs)
            failure = self._ending()
        self._over = True
        if failure is None:
            raise StopAsyncIteration
        return error_frame(failure, self._request_id)


class EventFeed:
    """The body of a job's event feed: what ``receive`` gives, with comments in between during silence."""

    def __init__(self, receive: Callable[[], Awaitable[bytes | None]], *, heartbeat_s: float) -> None:
        self._receive = receive
        self._heartbeat_s = heartbeat_s

    def __aiter__(self) -> AsyncIterator[bytes]:
        """One pass over the feed."""
        return self

    async def __anext__(self) -> bytes:
        """The next bytes to leave."""
        with trio.move_on_after(self._heartbeat_s) as silence:
            chunk = await self._receive()
        if silence.cancelled_caught:
            return COMMENT
        if chunk is None:
            raise StopAsyncIteration
        return chunk
