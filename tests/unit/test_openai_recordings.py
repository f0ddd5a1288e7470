"""Recordings of llama.cpp, replayed. See ``tests/fixtures/record_openai.py``."""

from typing import Any

import orjson
import pytest

from actors.errors import UpstreamStatusError
from actors.providers.openai.dialect import Dialect
from actors.providers.openai.errors import status_error
from actors.providers.openai.request import translate_request
from actors.providers.openai.response import translate_response
from tests.fake_openai import SCRUB, folded, translate
from tests.fixtures.record_openai import CASES, DIRECTORY, fields_of

EXPECTED = {
    "text": ("end_turn", ["text"]),
    "blocks": ("end_turn", ["text"]),
    "max_tokens": ("max_tokens", ["text"]),
    "stop_sequence": ("end_turn", ["text"]),
    "json_schema": ("end_turn", ["text"]),
    "tool": ("tool_use", ["tool_use"]),
    "tool_cut": ("max_tokens", ["tool_use"]),
    "tools_parallel": ("tool_use", ["tool_use", "tool_use"]),
    "tool_answered": ("end_turn", ["text"]),
}
_NAMES = [pytest.param(name, id=name) for name in EXPECTED]


def recording(name: str) -> dict[str, Any]:
    parsed: dict[str, Any] = orjson.loads((DIRECTORY / f"{name}.json").read_bytes())
    return parsed


def compared(message: dict[str, Any]) -> dict[str, Any]:
    """What does not differ from call to call: no ids, and all input tokens together."""
    usage = message["usage"]
    content = [{key: value for key, value in block.items() if key != "id"} for block in message["content"]]
    counts = usage["input_tokens"] + usage["cache_read_input_tokens"], usage["output_tokens"]
    return {**message, "id": "", "content": content, "usage": counts}


def plain(recorded: dict[str, Any]) -> dict[str, Any]:
    return translate_response(recorded["plain"], model="asked")


def test_every_recording_is_expected_and_every_request_is_the_one_recorded() -> None:
    assert CASES.keys() == EXPECTED.keys() | {"too_long"}
    for name in CASES:
        recorded = recording(name)
        assert recorded["fields"] == fields_of(name)
        sent = translate_request(recorded["fields"], model="local", dialect=Dialect(), stream=False)
        assert sent == recorded["request"]


@pytest.mark.parametrize("name", _NAMES)
@pytest.mark.parametrize("bytes_at_once", [1, 7, 1000, 1_000_000])
def test_stream_and_plain_answer_are_one_message(name: str, bytes_at_once: int) -> None:
    recorded = recording(name)
    data = recorded["stream"].encode()
    pieces = [data[at : at + bytes_at_once] for at in range(0, len(data), bytes_at_once)]
    message = folded(translate(pieces))
    assert compared(message) == compared(plain(recorded))
    assert message["stop_reason"] == EXPECTED[name][0]
    assert [block["type"] for block in message["content"]] == EXPECTED[name][1]


@pytest.mark.parametrize("name", [name for name in EXPECTED if name != "json_schema"])
def test_both_endpoints_give_one_message(name: str) -> None:
    # llama.cpp's /v1/messages knows no output_config.
    recorded = recording(name)
    translated = compared(plain(recorded))
    if name == "stop_sequence":
        # /v1/chat/completions does not tell which one was met.
        translated["stop_sequence"] = recorded["fields"]["stop_sequences"][0]
    assert translated == compared(recorded["message"])


def test_structured_output_is_what_the_schema_says() -> None:
    text = plain(recording("json_schema"))["content"][0]["text"]
    assert orjson.loads(text).keys() == {"capital", "country"}


def test_the_error_of_a_prompt_that_is_too_long() -> None:
    recorded = recording("too_long")
    error = status_error(recorded["status"], (), orjson.dumps(recorded["plain"]), SCRUB)
    assert (error.status, error.error_type) == (400, "invalid_request_error")
    assert error.message == recorded["message"]["error"]["message"]
    with pytest.raises(UpstreamStatusError):
        translate([b"data: " + recorded["stream"].encode() + b"\n\n"])
