"""What there is to say of an operation: the shape of the entries of :mod:`service.openapi_table`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel

from service.preferences import ASYNC_ID

JOB_HEADERS = (ASYNC_ID, "x-bf-async-status")

_ANY_ROUTE = (400, 431, 500)
_CREDENTIALS = (401, 403)
_NO_JOB_HERE = (404,)
"""Routes that make no job answer so to ``x-bf-async-id``."""
_READS_BODY = (408, 413)
_CALLS_UPSTREAM = (402, 409, 422, 429, 502, 503, 504, 529)


def nothing() -> Mapping[str, Any]:
    """No entries."""
    return MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One status of an operation that is no error."""

    description: str
    model: type[BaseModel] | None = None
    """The JSON body."""
    event: type[BaseModel] | None = None
    """One event of the stream of server-sent events that the body is where that is asked for."""
    text: str | None = None
    """The media type of a body that is a text."""
    headers: tuple[str, ...] = ()
    """Beside ``request-id``."""
    links: Mapping[str, Mapping[str, str]] = field(default_factory=nothing)
    """By the operation that follows: where in this answer its parameters are (OpenAPI 3.1, 4.8.20.4)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """What a client has to know of one method of one path."""

    id: str
    tag: str
    summary: str
    description: str = ""
    access: str = "key"
    """``key``; ``admin``; ``open``; or ``keyed``: asks for a key as soon as keys are configured."""
    query: type[BaseModel] | None = None
    headers: type[BaseModel] | None = None
    body: type[BaseModel] | None = None
    body_required: bool = True
    examples: Mapping[str, Mapping[str, Any]] = field(default_factory=nothing)
    """Bodies, by what they show."""
    answers: Mapping[int, Answer]
    errors: tuple[int, ...] = ()
    """Beside those that any route of this access gives."""
    upstream: bool = False
    """An upstream's error reaches the client with the upstream's status, whichever that is."""
    path: Mapping[str, str] = field(default_factory=nothing)
    """What the parts of the path are."""

    @property
    def all_errors(self) -> tuple[int, ...]:
        """Every error status to be reckoned with, in order."""
        statuses = {*self.errors, *_ANY_ROUTE}
        if self.access != "open":
            statuses.update(_CREDENTIALS)
        if self.access in ("key", "admin"):
            statuses.update(_NO_JOB_HERE)
        if self.body is not None:
            statuses.update(_READS_BODY)
        if self.upstream:
            statuses.update(_CALLS_UPSTREAM)
        return tuple(sorted(statuses - self.answers.keys()))
