"""The content of an event (body, frames, message), apart from the fact that it happened."""

from dataclasses import replace

from events.types import Event, FramesReceived, JobAccepted, JobCompleted


def trimmed(content: bytes) -> bytes:
    """The same bytes, in memory of their own size: for what is kept.

    orjson's keep the buffer they were written to: 4 KiB at least, ten times their length at 3 KB.
    """
    return bytes(memoryview(content))


def content_of(event: Event) -> bytes | None:
    """Its content as one piece of bytes, frames joined; None where there is none, or it was redacted."""
    match event:
        case JobAccepted():
            return event.body or None
        case FramesReceived():
            return b"".join(event.frames) or None
        case JobCompleted():
            return event.message or None
        case _:
            return None


def content_bytes(event: Event) -> int:
    """The size of its content."""
    match event:
        case JobAccepted():
            return len(event.body)
        case FramesReceived():
            return sum(map(len, event.frames))
        case JobCompleted():
            return len(event.message)
        case _:
            return 0


def without_content(event: Event) -> Event:
    """The same fact, redacted."""
    match event:
        case JobAccepted(body=body) if body:
            return replace(event, body=b"")
        case FramesReceived():
            # There are many of them, and `replace` is slow.
            return FramesReceived(
                at=event.at, attempt=event.attempt, first=event.first, frames=(), count=event.count
            )
        case JobCompleted(message=message) if message:
            return replace(event, message=b"")
        case _:
            return event


def with_content(event: Event, content: bytes | None) -> Event:
    """The fact with its content again: undoes :func:`without_content` for all but frames."""
    if content is None:
        return event
    match event:
        case JobAccepted():
            return replace(event, body=content)
        case JobCompleted():
            return replace(event, message=content)
        case _:
            return event
