"""Plain Chat Completions answers to Messages. That streams give the same is tested beside the streams."""

from typing import Any

import pytest

from actors.errors import UpstreamProtocolError, UpstreamStatusError
from actors.providers.openai.response import MAX_ID_CHARS, translate_response
from tests.fake_openai import FOLDED_USAGE, completion, tool_call


def translated(message: dict[str, Any], finish: str = "stop", **fields: Any) -> dict[str, Any]:
    return translate_response({**completion(message, finish), **fields}, model="asked")


def test_everything_at_once() -> None:
    calls = [tool_call("a", "f", '{"x":1}'), tool_call("b", "g", "")]
    message = translated({"reasoning_content": "hm", "content": "Hi", "tool_calls": calls}, "tool_calls")
    assert message == {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "content": [
            {"type": "thinking", "thinking": "hm", "signature": ""},
            {"type": "text", "text": "Hi"},
            {"type": "tool_use", "id": "a", "name": "f", "input": {"x": 1}},
            {"type": "tool_use", "id": "b", "name": "g", "input": {}},
        ],
        "model": "m",
        "stop_reason": "tool_use",
        "stop_sequence": None,
        "usage": FOLDED_USAGE,
    }


@pytest.mark.parametrize(
    ("finish", "reason"), [("stop", "tool_use"), ("length", "max_tokens"), ("content_filter", "refusal")]
)
def test_a_tool_call_means_tool_use_unless_it_was_cut_off(finish: str, reason: str) -> None:
    assert translated({"tool_calls": [tool_call("a", "f", "{}")]}, finish)["stop_reason"] == reason


def test_a_refusal() -> None:
    # https://platform.openai.com/docs/guides/structured-outputs#refusals-with-structured-outputs
    message = translated({"content": None, "refusal": "I won't"})
    assert (message["stop_reason"], message["content"]) == ("refusal", [{"type": "text", "text": "I won't"}])


def test_thinking_in_parts() -> None:
    # https://docs.mistral.ai/capabilities/reasoning
    parts = [
        {"type": "thinking", "thinking": [{"type": "text", "text": "h"}]},
        {"type": "thinking", "thinking": "m"},
        {"type": "reference", "reference_ids": [1]},
        {"type": "text", "text": "Hi"},
    ]
    assert translated({"content": parts})["content"] == [
        {"type": "thinking", "thinking": "hm", "signature": ""},
        {"type": "text", "text": "Hi"},
    ]


@pytest.mark.parametrize(
    ("arguments", "input_"),
    [
        ("null", {}),
        (" ", {}),
        ('"{\\"x\\":1}"', {"x": 1}),
        ({"x": 1}, {"x": 1}),
        (None, {}),
        ('{"x":1,"y":', {"x": 1}),
    ],
)
def test_arguments(arguments: Any, input_: object) -> None:
    assert translated({"tool_calls": [tool_call("a", "f", arguments)]})["content"][0]["input"] == input_


@pytest.mark.parametrize("arguments", ["[1]", '"x"', '"x', "7", "hello", '{"x" 1'])
def test_arguments_that_are_no_object(arguments: str) -> None:
    with pytest.raises(UpstreamProtocolError, match="arguments"):
        translated({"tool_calls": [tool_call("a", "f", arguments)]})


def test_an_answer_that_was_given_up() -> None:
    # https://api-docs.deepseek.com/api/create-chat-completion
    with pytest.raises(UpstreamStatusError) as caught:
        translated({"content": "Hi"}, "insufficient_system_resource")
    assert (caught.value.status, caught.value.error_type) == (529, "overloaded_error")


@pytest.mark.parametrize(
    ("given", "id_"),
    [
        ("chatcmpl-1", "msg_1"),
        ("msg_1", "msg_1"),
        ("gen/1:2", "msg_gen_1_2"),
        ("x" * 999, "msg_" + "x" * MAX_ID_CHARS),
    ],
)
def test_ids(given: str, id_: str) -> None:
    assert translated({"content": "Hi"}, id=given)["id"] == id_
    assert translated({"content": "Hi"}, id=None)["id"] != translated({"content": "Hi"}, id=None)["id"]


def test_cached_tokens_are_never_more_than_there_are() -> None:
    usage = {"prompt_tokens": 5, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 9}}
    assert translated({"content": "Hi"}, usage=usage)["usage"] == {
        "cache_read_input_tokens": 5,
        "input_tokens": 0,
        "output_tokens": 1,
    }


@pytest.mark.parametrize(
    "usage", [None, {}, [], {"prompt_tokens": 0, "completion_tokens": 0}, {"prompt_tokens": "x"}]
)
def test_usage_that_is_none(usage: object) -> None:
    assert translated({"content": "Hi"}, usage=usage)["usage"] == {}
