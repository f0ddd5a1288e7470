"""Requests for the tests of their translation to Chat Completions."""

from typing import Any

import pytest

from actors.errors import UnsupportedError
from actors.providers.openai.dialect import Dialect
from actors.providers.openai.request import translate_request

HI = {"role": "user", "content": "Hi"}
TOOL = {"name": "f", "description": "d", "input_schema": {"type": "object", "properties": {}}}


def translated(*, dialect: Dialect | None = None, stream: bool = False, **fields: Any) -> dict[str, Any]:
    return translate_request(
        {"model": "asked", "max_tokens": 9, "messages": [HI], **fields},
        model="m",
        dialect=dialect or Dialect(),
        stream=stream,
    )


def problem(**fields: Any) -> str:
    with pytest.raises(UnsupportedError) as caught:
        translated(**fields)
    assert (caught.value.status, caught.value.error_type) == (400, "invalid_request_error")
    return caught.value.message
