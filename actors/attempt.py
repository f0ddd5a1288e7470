"""One attempt at an upstream, plain or streamed: checks what comes, passes it on, says how it ended.

Knows nothing of the log, of watchers or of retries.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import orjson
import structlog

from actors.errors import ProviderError, UpstreamProtocolError, UpstreamStatusError, status_of
from actors.providers.base import Frame, Provider, ProviderCall
from events.errors import BadFrameError
from events.message import MessageFold
from events.types import Usage

Show = Callable[[tuple[bytes, ...]], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Answer:
    """What an attempt brought."""

    message: bytes
    """The Message; empty for a stream whose content is not kept."""
    usage: Usage = field(default_factory=dict)
    upstream_request_id: str | None = None


async def run_plain(provider: Provider, call: ProviderCall) -> Answer:
    """A plain call. Raises ProviderError; cancelling closes the upstream connection."""
    completion = await provider.complete(call)
    return Answer(completion.body, completion.usage, completion.upstream_request_id)


async def run_stream(
    provider: Provider,
    call: ProviderCall,
    *,
    fold: MessageFold,
    keeps_content: bool,
    show: Show,
    logger: structlog.typing.FilteringBoundLogger,
) -> Answer:
    """A streamed call, folded into ``fold``; ``show`` is given each run of good frames, in order.

    Raises ProviderError for an error frame, a frame out of order and an end without ``message_stop``, after
    the frames before it were shown; whatever ``show`` raises. Cancelling closes the upstream connection.
    """
    async with provider.open_stream(call) as source:
        while not fold.finished:
            frames = await source.receive()
            if not frames:
                raise UpstreamProtocolError("the upstream ended its stream before message_stop")
            good, error = _check(fold, frames, logger)
            if good:
                await show(good)
            if error is not None:
                raise error
        request_id = source.upstream_request_id
    return Answer(fold.message_json() if keeps_content else b"", fold.usage, request_id)


def _check(
    fold: MessageFold, frames: Sequence[Frame], logger: structlog.typing.FilteringBoundLogger
) -> tuple[tuple[bytes, ...], ProviderError | None]:
    """The good frames of one read, and the error that follows them, if one does."""
    good: list[bytes] = []
    for frame in frames:
        if frame.event == "error":
            return tuple(good), _error_of(frame.data)
        try:
            fold.apply(frame.event, frame.data)
        except BadFrameError as bad:
            logger.warning("bad frame", action="attempt.bad_frame", reason=str(bad))
            return tuple(good), UpstreamProtocolError(
                "the upstream sent a frame that breaks the stream protocol"
            )
        good.append(frame.wire)
        if fold.finished:
            break
    return tuple(good), None


def _error_of(data: bytes) -> ProviderError:
    """The error an ``error`` frame stands for, its status looked up by type."""
    try:
        envelope = orjson.loads(data)
    except orjson.JSONDecodeError:
        envelope = None
    match envelope:
        case {"error": {"type": str(error_type), "message": str(message)}}:
            return UpstreamStatusError(message, status=status_of(error_type), error_type=error_type)
        case _:
            return UpstreamProtocolError("the upstream broke its stream off with an error it did not explain")
