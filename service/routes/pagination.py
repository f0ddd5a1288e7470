"""Cursors and limits of lists, as the Anthropic API has them."""

from dataclasses import dataclass

from service.errors import InvalidRequestError
from service.http import Request

DEFAULT_LIMIT = 20
MAX_LIMIT = 1000
MAX_CURSOR_CHARS = 512


@dataclass(frozen=True, slots=True)
class PageQuery:
    """Which page is asked for."""

    limit: int
    after_id: str | None
    before_id: str | None


def page_query(request: Request) -> PageQuery:
    """Read ``limit``, ``after_id``, ``before_id``. Raises InvalidRequestError."""
    text = request.query.get("limit", str(DEFAULT_LIMIT))
    limit = int(text) if text.isascii() and text.isdigit() and len(text) <= 4 else 0
    if not 1 <= limit <= MAX_LIMIT:
        raise InvalidRequestError(f"limit: expected a whole number from 1 to {MAX_LIMIT}")
    after_id, before_id = request.query.get("after_id"), request.query.get("before_id")
    if after_id is not None and before_id is not None:
        raise InvalidRequestError("after_id, before_id: give one of them")
    if max(len(after_id or ""), len(before_id or "")) > MAX_CURSOR_CHARS:
        raise InvalidRequestError("after_id, before_id: too long")
    return PageQuery(limit, after_id, before_id)
