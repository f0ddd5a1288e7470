"""Any error -> the Anthropic error envelope and its status. A lookup, no logic.

The shape is that of https://docs.anthropic.com/en/api/errors, for every path and method.
"""

import orjson
import trio
from werkzeug.exceptions import HTTPException

from actors.errors import ActorError, JobNotFoundError, error_type_of
from events.errors import LogError, UnknownJobError
from events.types import Failure, Headers

INTERNAL_FAILURE = Failure(500, "api_error", "internal error of the gateway; its log has the request id")


class InvalidRequestError(ActorError):
    """The client's request cannot be understood."""

    status = 400


class NotFoundError(ActorError):
    """There is no such thing here."""

    status = 404


class MethodNotAllowedError(ActorError):
    """The path exists, the method does not."""

    status = 405


_TEXT_BY_STATUS = {
    404: "no such path",
    405: "method not allowed on this path",
    408: "the request body did not arrive in time",
    413: "the request body is too large",
}
"""What we say for the framework's own errors; their texts speak of browsers and servers."""


def envelope(failure: Failure, request_id: str) -> bytes:
    """The error body."""
    return orjson.dumps(
        {
            "type": "error",
            "error": {"type": failure.type, "message": failure.message},
            "request_id": request_id,
        }
    )


def failure_of(error: BaseException) -> Failure:
    """What the client is told of an error. Unknown ones are internal, and say nothing of themselves."""
    match error:
        case ActorError():
            return error.failure
        case UnknownJobError():
            # It was there a moment ago: deleted, or expired, while the request was under way.
            return JobNotFoundError().failure
        case LogError() | trio.TooSlowError():
            return Failure(
                529,
                "overloaded_error",
                "the event log cannot be used now; nothing was changed",
                (("retry-after", "5"),),
            )
        case HTTPException(code=int(status)) if 400 <= status <= 599:
            text = _TEXT_BY_STATUS.get(status) or f"the request was refused: {error.name.lower()}"
            return Failure(status, error_type_of(status), text, _headers_of(error))
        case _:
            return INTERNAL_FAILURE


def _headers_of(error: HTTPException) -> Headers:
    """The headers that belong to a framework error (``allow`` of a 405)."""
    return tuple(
        (name.lower(), value)
        for name, value in error.get_headers()
        if name.lower() in ("allow", "retry-after")
    )
