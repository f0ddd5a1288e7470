"""An upstream's error answer, made fit to show: status, type and text kept, addresses and keys removed."""

import re
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import urlsplit

import orjson

from actors.errors import UpstreamProtocolError, UpstreamStatusError, error_type_of, status_of
from events.types import Headers

MAX_ERROR_TEXT_CHARS = 16_384
"""Of an upstream's error text; what is longer is cut."""
MAX_HEADER_VALUE_CHARS = 512
"""Of a header that travels with an error; a longer one is dropped."""

_KEPT = frozenset({"retry-after", "retry-after-ms", "x-should-retry"})
_KEPT_PREFIX = "anthropic-ratelimit-"
_VALUE = re.compile(r"[\x20-\x7e]*")
_TYPE = re.compile(r"[a-z][a-z0-9_]{0,63}")


class Scrubber:
    """Removes an upstream's address and other secrets from what it says."""

    def __init__(self, base_url: str, secrets: Iterable[str] = ()) -> None:
        """``secrets`` are removed as they are; empty ones are ignored."""
        address = urlsplit(base_url)
        netloc = address.netloc.rpartition("@")[2]
        found = {base_url.rstrip("/"), netloc, *secrets}
        host = address.hostname or ""
        if "." in host or ":" in host:  # a bare word such as `gateway` may be ordinary text
            found.add(host)
        longest_first = sorted((text for text in found if text), key=len, reverse=True)
        self._text = re.compile("|".join(map(re.escape, longest_first)), re.IGNORECASE)
        self._bytes = re.compile(self._text.pattern.encode(), re.IGNORECASE)

    def text(self, text: str) -> str:
        """``text`` with every occurrence replaced."""
        return self._text.sub("[removed]", text)

    def bytes(self, data: bytes) -> bytes:
        """``data`` with every occurrence replaced; the same object if there is none."""
        return self._bytes.sub(b"[removed]", data) if self._bytes.search(data) else data


def shown_headers(headers: Headers, scrub: Scrubber, *, also: frozenset[str] = frozenset()) -> Headers:
    """The retry and rate limit headers, and those named in ``also``, with printable values only."""
    return tuple(
        (name, scrub.text(value))
        for name, value in headers
        if (name in _KEPT or name in also or name.startswith(_KEPT_PREFIX))
        and len(value) <= MAX_HEADER_VALUE_CHARS
        and _VALUE.fullmatch(value)
    )


def status_error(status: int, headers: Headers, body: bytes, scrub: Scrubber) -> UpstreamStatusError:
    """The error for an answer with an error status (400 to 599).

    Understood are Anthropic's envelope, whose type is kept, and the one of OpenAI and llama.cpp
    (``{"error": {"message", "type"}}``), whose type is kept where Anthropic has it too. A missing or
    foreign type follows from the status; a body of another shape gives a text of our own.
    https://docs.anthropic.com/en/api/errors
    """
    parsed = _parse(body)
    error = parsed.get("error")
    fields: Mapping[str, Any] = error if isinstance(error, dict) else {}
    message = fields.get("message")
    if not isinstance(message, str) or not message:
        message = f"the upstream answered with status {status}"
    type_ = fields.get("type")
    if not isinstance(type_, str) or not _TYPE.fullmatch(type_) or not _keeps_type(parsed, type_):
        type_ = error_type_of(status)
    return UpstreamStatusError(
        scrub.text(message[:MAX_ERROR_TEXT_CHARS]),
        status=status,
        error_type=type_,
        headers=shown_headers(headers, scrub),
    )


def error_in_success(parsed: Mapping[str, Any], body: bytes, scrub: Scrubber) -> Exception:
    """The error for a 200 whose JSON is no Message: the error it holds, if it is an error envelope."""
    error = parsed.get("error")
    if parsed.get("type") == "error" and isinstance(error, dict):
        return status_error(status_of(str(error.get("type"))), (), body, scrub)
    return UpstreamProtocolError("the upstream's answer is not a Message")


def _keeps_type(parsed: Mapping[str, Any], type_: str) -> bool:
    # 500 is what status_of says of a type it does not know.
    return parsed.get("type") == "error" or type_ == "api_error" or status_of(type_) != 500


def _parse(body: bytes) -> Mapping[str, Any]:
    try:
        parsed = orjson.loads(body)
    except orjson.JSONDecodeError:
        return {}
    return parsed if isinstance(parsed, dict) else {}
