"""The bodies of the wire that we act on. They never leave :mod:`service`.

We check what we use (model, the outer shape of messages, max_tokens, stream) and nothing deeper: the API
grows every week, and what we do not know is passed on as it came.
"""

from typing import Annotated, Any, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from service.errors import InvalidRequestError

MAX_MODEL_CHARS = 256
MAX_CUSTOM_ID_CHARS = 64
SHOWN_PROBLEMS = 3
"""Validation problems named in one answer."""


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())


class InputMessage(_Body):
    """One turn, by its outer shape."""

    role: str
    content: str | list[Any]


class CountTokensBody(_Body):
    """``POST /v1/messages/count_tokens``."""

    model: Annotated[str, Field(min_length=1, max_length=MAX_MODEL_CHARS)]
    messages: Annotated[list[InputMessage], Field(min_length=1)]


class MessagesBody(CountTokensBody):
    """``POST /v1/messages``."""

    max_tokens: Annotated[int, Field(ge=1)]
    stream: bool | None = None


class BatchRequest(_Body):
    """One element of ``requests`` of ``POST /v1/messages/batches``."""

    custom_id: Annotated[str, Field(min_length=1, max_length=MAX_CUSTOM_ID_CHARS)]
    params: dict[str, Any]


class Usage(BaseModel):
    """Tokens of one Message; further fields as the upstream sent them."""

    model_config = ConfigDict(extra="allow")

    input_tokens: int = 0
    output_tokens: int = 0


class Message(BaseModel):
    """The answer to a Messages call, or the pending body of a job (empty content, null stop_reason)."""

    model_config = ConfigDict(extra="allow")

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[dict[str, Any]]
    stop_reason: str | None
    stop_sequence: str | None
    usage: Usage


def parse_object(body: bytes) -> dict[str, Any]:
    """The body as a JSON object. Raises InvalidRequestError: not JSON, not UTF-8, too deep, no object."""
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequestError(f"the request body is not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise InvalidRequestError("the request body is not a JSON object")
    return fields


def check(schema: type[_Body], fields: dict[str, Any], *, within: str = "") -> None:
    """Validate the outer shape. Raises InvalidRequestError naming each field, as the API itself words it.

    ``within`` is where ``fields`` are in the body, a dot at its end.
    """
    try:
        schema.model_validate(fields)
    except ValidationError as error:
        problems = [
            f"{within}{'.'.join(str(part) for part in problem['loc'])}: {problem['msg']}"
            for problem in error.errors(include_url=False, include_context=False, include_input=False)
        ]
        raise InvalidRequestError("; ".join(problems[:SHOWN_PROBLEMS])) from None


def pending_body(job_id: str, model: str) -> bytes:
    """What stands in for the Message of a job that has none yet."""
    return orjson.dumps(
        {
            "id": job_id,
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {"input_tokens": 0, "output_tokens": 0},
        }
    )
