"""The errors of Chat Completions providers, in the taxonomy of the Messages API.

The status decides the type: OpenAI says ``invalid_request_error`` for a wrong key, too. The text is found
wherever a provider puts it; the retry headers are kept.

    OpenAI, Groq, OpenRouter, llama.cpp   {"error": {"message", "type", "code"}}
    vLLM, Mistral                         {"message", "type", "code"}; {"detail"} from their web framework
    Gemini                                [{"error": {"message", "code", "status"}}]
    Ollama                                {"error": "text"}

https://platform.openai.com/docs/guides/error-codes, https://docs.anthropic.com/en/api/errors
"""

from collections.abc import Mapping
from typing import Any

import orjson

from actors.errors import UpstreamStatusError, error_type_of, status_of
from actors.providers.upstream_errors import MAX_ERROR_TEXT_CHARS, Scrubber, shown_headers
from events.types import Headers

_STATUS = {498: 529}
"""Statuses no HTTP client knows: Groq's "flex tier capacity exceeded"."""
_STATUS_BY_WORD = {
    "rate_limit_exceeded": 429,
    "rate_limit": 429,
    "insufficient_quota": 429,
    "requests": 429,
    "tokens": 429,
    "server_error": 500,
    "internal_server_error": 500,
    "service_unavailable": 503,
    "unavailable_error": 503,
    "engine_overloaded": 529,
    "overloaded": 529,
    "context_length_exceeded": 400,
    "exceed_context_size_error": 400,
    "BadRequestError": 400,
    "NotFoundError": 404,
    "invalid_api_key": 401,
    "model_not_found": 404,
    "timeout": 504,
}
_INTERRUPTED = {"insufficient_system_resource": 529, "error": 500}
"""Finish reasons of answers that were given up (DeepSeek, OpenRouter)."""


def status_error(status: int, headers: Headers, body: bytes, scrub: Scrubber) -> UpstreamStatusError:
    """The error for an answer with an error status."""
    parsed = _parse(body)
    message = _message_of(parsed) or f"the upstream answered with status {status}"
    status = _STATUS.get(status, status)
    return _error(status, message, headers, scrub)


def stream_error(chunk: Mapping[str, Any], scrub: Scrubber) -> UpstreamStatusError:
    """The error that a 200, or an event of a stream, holds in place of an answer."""
    message = _message_of(chunk) or "the upstream answered with an error it did not explain"
    return _error(_status_in(_error_of(chunk) or chunk), message, (), scrub)


def interruption(choice: Mapping[str, Any]) -> UpstreamStatusError | None:
    """The error that a finish reason tells; None for one that is an end."""
    finish = choice.get("finish_reason")
    status = _INTERRUPTED.get(finish) if isinstance(finish, str) else None
    if status is None:
        return None
    return UpstreamStatusError(f"the upstream gave its answer up ({finish})", status=status)


def _error(status: int, message: str, headers: Headers, scrub: Scrubber) -> UpstreamStatusError:
    return UpstreamStatusError(
        scrub.text(message[:MAX_ERROR_TEXT_CHARS]),
        status=status,
        error_type=error_type_of(status),
        headers=shown_headers(headers, scrub),
    )


def _parse(body: bytes) -> object:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        return None


def _error_of(parsed: object) -> Mapping[str, Any] | None:
    """The error object, wherever it is."""
    if isinstance(parsed, list) and parsed:
        parsed = parsed[0]
    if not isinstance(parsed, dict):
        return None
    error = parsed.get("error")
    if isinstance(error, dict):
        return error
    if isinstance(error, str) and error:
        return {"message": error}
    if parsed.get("object") == "error" or "detail" in parsed:
        return parsed
    return None


def _message_of(parsed: object) -> str:
    error = _error_of(parsed)
    if error is None and isinstance(parsed, dict):
        error = parsed
    for name in ("message", "detail"):
        value = error.get(name) if error else None
        if isinstance(value, str) and value:
            return value
        if isinstance(value, dict | list) and value:
            return orjson.dumps(value).decode()
    return ""


def _status_in(error: Mapping[str, Any]) -> int:
    """The status an error object tells by its code or type; 500 if by neither."""
    for name in ("code", "status_code", "type"):
        value = error.get(name)
        if isinstance(value, str) and value.isascii() and value.isdigit():
            value = int(value)
        if isinstance(value, int) and 400 <= value <= 599:
            return _STATUS.get(value, value)
        if isinstance(value, str):
            status = _STATUS_BY_WORD.get(value) or status_of(value)
            if status != 500:
                return status
    return 500
