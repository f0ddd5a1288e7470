"""One attempt at an upstream, plain or streamed: checks what comes, passes it on, says how it ended.

Knows nothing of the log or of watchers; :func:`to_an_answer` puts one attempt after the other.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import orjson
import structlog

from actors.errors import ProviderError, UpstreamProtocolError, UpstreamStatusError, status_of
from actors.providers.base import Frame, Provider, ProviderCall
from actors.retry import Decision
from actors.targets import Course
from events.errors import BadFrameError
from events.log.content import trimmed
from events.message import MessageFold
from events.types import AttemptFailed, Event, Failure, JobCompleted, NextStep, Usage

MAX_HELD_FRAMES = 64
"""Frames before the content (``message_start``, pings) that are held back from watchers, so that another
attempt can follow unnoticed."""

Show = Callable[[tuple[bytes, ...]], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Answer:
    """What an attempt brought."""

    message: bytes
    """The Message; empty for a stream whose content is not kept."""
    usage: Usage = field(default_factory=dict)
    upstream_request_id: str | None = None


def completed(answer: Answer, message: bytes, *, attempt: int, at: float) -> JobCompleted:
    """The event that an attempt brought the answer; ``message``: what is kept of it."""
    return JobCompleted(
        at=at,
        attempt=attempt,
        message=trimmed(message),
        usage=answer.usage,
        upstream_request_id=answer.upstream_request_id,
    )


def attempt_failed(failure: Failure, decision: Decision, *, attempt: int, at: float) -> AttemptFailed:
    """The event that it failed, and what follows."""
    waits = decision.next is NextStep.RETRY
    return AttemptFailed(
        at=at,
        attempt=attempt,
        failure=failure,
        next=decision.next,
        retry_after_s=decision.after_s if waits else None,
    )


async def to_an_answer(
    course: Course,
    call: ProviderCall,
    *,
    begin: Callable[[], Awaitable[None]],
    attempt: Callable[[ProviderCall], Awaitable[list[Event]]],
    failed: Callable[[ProviderError], Awaitable[list[Event]]],
) -> list[Event]:
    """Attempts until one brings the answer or nothing is left to try: the events that end the job.

    ``begin`` returns once an attempt may be made, and is recorded; ``failed`` records why it failed, and
    returns once the next one may be begun, or with the events that end the job.
    """
    while True:
        await begin()
        try:
            last = await attempt(course.call(call))
        except ProviderError as error:
            last = await failed(error)
            if last:
                return last
        else:
            course.succeeded()
            return last


async def run_attempt(
    provider: Provider,
    call: ProviderCall,
    *,
    as_stream: bool,
    fold: MessageFold,
    keeps_content: bool,
    show: Show,
    logger: structlog.typing.FilteringBoundLogger,
) -> Answer:
    """One attempt, plain or streamed; see :func:`run_stream`.

    Raises ProviderError; cancelling closes the upstream connection.
    """
    if as_stream:
        return await run_stream(
            provider, call, fold=fold, keeps_content=keeps_content, show=show, logger=logger
        )
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
        if frame.event == "message_stop":
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
