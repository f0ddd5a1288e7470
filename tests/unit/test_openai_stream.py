"""Chat Completions streams to Messages streams: what providers send, by the provider that sends it."""

from typing import Any

import orjson
import pytest

from actors.errors import UpstreamProtocolError
from tests.fake_openai import (
    DONE,
    FOLDED_USAGE,
    HELLO,
    blocks,
    call_piece,
    chunk,
    event,
    folded,
    tool,
    translate,
    usage_chunk,
)

# --- the whole -----------------------------------------------------------------------------------


def test_text() -> None:
    message = folded(translate([*HELLO, chunk(finish="stop"), usage_chunk(), DONE]))
    assert message == {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "content": [{"type": "text", "text": "Hello"}],
        "model": "m",
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": FOLDED_USAGE,
    }


def test_each_piece_leaves_at_once() -> None:
    frames = translate([*HELLO, chunk(finish="stop"), DONE])
    assert [frame.event for frame in frames] == [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]


def test_one_message_start_though_every_chunk_names_the_role() -> None:
    # Azure and Groq repeat the role; LiteLLM made a message_start of each.
    repeated = [chunk({"role": "assistant", "content": piece}) for piece in ("a", "b", "c")]
    frames = translate([*repeated, chunk({"role": "assistant"}, "stop"), DONE])
    assert sum(frame.event == "message_start" for frame in frames) == 1
    assert folded(frames)["content"] == [{"type": "text", "text": "abc"}]


def test_an_answer_without_content() -> None:
    assert blocks(chunk({"role": "assistant", "content": None})) == []


def test_a_prompt_filter_chunk_comes_first() -> None:
    # Azure: https://learn.microsoft.com/azure/ai-services/openai/concepts/content-filter
    first = event(id="", model="", choices=[], prompt_filter_results=[{"prompt_index": 0}])
    message = folded(translate([first, *HELLO, chunk(finish="stop"), DONE]))
    assert (message["id"], message["model"]) == ("msg_1", "m")


def test_the_asked_model_is_named_where_the_upstream_names_none() -> None:
    bare = event(choices=[{"delta": {"content": "a"}, "finish_reason": "stop"}])
    message = folded(translate([bare, DONE]))
    assert message["model"] == "asked"
    assert message["id"].startswith("msg_")
    assert len(message["id"]) > 10


# --- thinking ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_thinking_has_a_block_of_its_own(name: str) -> None:
    # reasoning_content: https://api-docs.deepseek.com/guides/reasoning_model, llama.cpp, older vLLM;
    # reasoning: https://openrouter.ai/docs/use-cases/reasoning-tokens, Groq, Ollama, vLLM.
    pieces = [chunk({name: "hm", "content": None}), chunk({name: "m", "content": ""}), *HELLO]
    assert blocks(*pieces) == [
        {"type": "thinking", "thinking": "hmm", "signature": ""},
        {"type": "text", "text": "Hello"},
    ]


def test_thinking_and_text_in_one_chunk() -> None:
    # "Thinking deltas in text blocks" is what LiteLLM and Bifrost got wrong.
    assert [block["type"] for block in blocks(chunk({"reasoning": "a", "content": "b"}))] == [
        "thinking",
        "text",
    ]


def test_thinking_in_parts() -> None:
    # https://docs.mistral.ai/capabilities/reasoning
    thinking = {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}
    text = {"type": "text", "text": "Hi"}
    assert blocks(
        chunk({"content": [thinking]}), chunk({"content": [thinking, text]}), chunk({"content": "!"})
    ) == [
        {"type": "thinking", "thinking": "hmhm", "signature": ""},
        {"type": "text", "text": "Hi!"},
    ]


# --- tool calls ----------------------------------------------------------------------------------


def test_calls_one_after_the_other_are_streamed_as_they_come() -> None:
    # https://platform.openai.com/docs/guides/function-calling#streaming
    frames = translate(
        [
            chunk({"content": "I see."}),
            chunk(call_piece(0, "", "call_a", "f")),
            chunk(call_piece(0, '{"x"')),
            chunk(call_piece(0, ":1}")),
            chunk(call_piece(1, "", "call_b", "g")),
            chunk(call_piece(1, '{"y":2}')),
            chunk(finish="tool_calls"),
            usage_chunk(),
            DONE,
        ]
    )
    message = folded(frames)
    assert message["content"][1:] == [tool("call_a", "f", {"x": 1}), tool("call_b", "g", {"y": 2})]
    assert message["stop_reason"] == "tool_use"
    assert message["usage"] == FOLDED_USAGE
    pieces = [orjson.loads(frame.data)["delta"] for frame in frames if frame.event == "content_block_delta"]
    assert [piece.get("partial_json") for piece in pieces] == [None, '{"x"', ":1}", '{"y":2}']


def test_interleaved_calls_are_put_in_order() -> None:
    assert blocks(
        chunk(call_piece(0, "", "a", "f")),
        chunk(call_piece(1, "", "b", "g")),
        chunk(call_piece(1, '{"y"')),
        chunk(call_piece(0, '{"x"')),
        chunk(call_piece(1, ":2}")),
        chunk(call_piece(0, ":1}")),
    ) == [tool("a", "f", {"x": 1}), tool("b", "g", {"y": 2})]


def test_the_start_of_a_call_has_an_empty_input() -> None:
    frames = translate([chunk(call_piece(0, '{"x":1}', "a", "f")), chunk(finish="tool_calls"), DONE])
    start = orjson.loads(frames[1].data)["content_block"]
    assert start == {"type": "tool_use", "id": "a", "name": "f", "input": {}}


@pytest.mark.parametrize("arguments", [None, "", " ", "null", "{}"])
def test_a_call_without_arguments(arguments: str | None) -> None:
    assert blocks(chunk(call_piece(0, arguments, "a", "f"))) == [tool("a", "f", {})]


def test_arguments_as_an_object_or_as_a_string_of_one() -> None:
    as_object = {"tool_calls": [{"index": 0, "id": "a", "function": {"name": "f", "arguments": {"x": 1}}}]}
    assert blocks(chunk(as_object)) == [tool("a", "f", {"x": 1})]
    pieces = [chunk(call_piece(0, None, "a", "f")), *(chunk(call_piece(0, c)) for c in '"{\\"x\\":1}"')]
    assert blocks(*pieces) == [tool("a", "f", {"x": 1})]


@pytest.mark.parametrize("finish", ["stop", "tool_calls", "function_call"])
def test_a_tool_call_means_tool_use(finish: str) -> None:
    # "Wrong stop reason after tools": Ollama and Gemini say stop after calls.
    message = folded(translate([chunk(call_piece(0, "{}", "a", "f")), chunk(finish=finish), DONE]))
    assert message["stop_reason"] == "tool_use"


def test_no_tool_call_means_no_tool_use() -> None:
    assert folded(translate([*HELLO, chunk(finish="tool_calls"), DONE]))["stop_reason"] == "end_turn"


def test_all_calls_with_one_index_and_ids() -> None:
    # Ollama and Gemini's compatible endpoint: ollama/ollama#7881.
    assert blocks(
        chunk(call_piece(0, '{"x":1}', "a", "f")),
        chunk(call_piece(0, '{"x":2}', "b", "f")),
    ) == [tool("a", "f", {"x": 1}), tool("b", "f", {"x": 2})]


def test_calls_without_an_index_or_an_id() -> None:
    # Gemini's compatible endpoint: https://ai.google.dev/gemini-api/docs/openai
    both = {"tool_calls": [*call_piece(None, '{"x":1}', "", "f")["tool_calls"]] * 2}
    first, second = blocks(chunk(both))
    assert (first["input"], second["input"]) == ({"x": 1}, {"x": 1})
    assert first["id"] != second["id"]
    assert all(block["id"].startswith("toolu_") for block in (first, second))


def test_pieces_without_an_index_go_by_id_or_to_the_last() -> None:
    assert blocks(
        chunk(call_piece(None, "", "a", "f")),
        chunk(call_piece(None, '{"x"')),
        chunk(call_piece(None, ":1}", "a")),
    ) == [tool("a", "f", {"x": 1})]


def test_a_call_that_is_named_in_every_chunk() -> None:
    pieces = [chunk(call_piece(0, piece, "a", "f")) for piece in ('{"x"', ":", "1}")]
    assert blocks(*pieces) == [tool("a", "f", {"x": 1})]
    unnamed = [chunk(call_piece(0, piece, None, "f")) for piece in ('{"x"', ":", "1}")]
    assert [block["input"] for block in blocks(*unnamed)] == [{"x": 1}]


def test_a_name_that_comes_late_is_waited_for() -> None:
    assert blocks(chunk(call_piece(0, '{"x"', "a")), chunk(call_piece(0, ":1}", "a", "f"))) == [
        tool("a", "f", {"x": 1})
    ]


def test_ids_that_are_no_ids_are_made_fit_and_unlike() -> None:
    content = blocks(
        chunk(call_piece(0, "{}", "functions.f:0", "f")),
        chunk(call_piece(1, "{}", "functions.f:0", "f")),
    )
    assert content[0]["id"] == "functions_f_0"
    assert content[1]["id"].startswith("toolu_")


def test_text_after_a_call_is_a_block_of_its_own() -> None:
    assert [b["type"] for b in blocks(*HELLO, chunk(call_piece(0, "{}", "a", "f")), *HELLO)] == [
        "text",
        "tool_use",
        "text",
    ]


def test_text_between_the_pieces_of_a_call_waits() -> None:
    assert blocks(chunk(call_piece(0, '{"x"', "a", "f")), *HELLO, chunk(call_piece(0, ":1}"))) == [
        tool("a", "f", {"x": 1}),
        {"type": "text", "text": "Hello"},
    ]


def test_white_space_after_a_call_that_is_over() -> None:
    assert blocks(
        chunk(call_piece(0, "{}", "a", "f")),
        chunk(call_piece(1, "{}", "b", "g")),
        chunk(call_piece(0, " \n")),
    ) == [tool("a", "f", {}), tool("b", "g", {})]


@pytest.mark.parametrize(
    "pieces",
    [
        [call_piece(0, "{}", "a", "f"), call_piece(1, "{}", "b", "g"), call_piece(0, "{}")],
        [call_piece(0, "{}", "a")],
        [call_piece(0, "[1]", "a", "f")],
        [call_piece(0, '"no', "a", "f")],
        [{"tool_calls": ["f"]}],
        [{"tool_calls": [{"index": 0}]}],
    ],
)
def test_calls_that_make_no_sense(pieces: list[dict[str, Any]]) -> None:
    with pytest.raises(UpstreamProtocolError):
        translate([*map(chunk, pieces), chunk(finish="tool_calls"), DONE])


def test_a_call_that_max_tokens_cut() -> None:
    cut = call_piece(0, '{"city":"Paris","unit":"cels', "a", "f")
    message = folded(translate([chunk(cut), chunk(finish="length"), DONE]))
    assert message["stop_reason"] == "max_tokens"
    assert message["content"] == [tool("a", "f", {"city": "Paris"})]
