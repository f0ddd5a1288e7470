"""How Chat Completions streams end, what they count, and how they fail."""

from typing import Any

import pytest

from actors.errors import UpstreamProtocolError, UpstreamStatusError
from tests.fake_openai import (
    DONE,
    FOLDED_USAGE,
    HELLO,
    USAGE,
    blocks,
    call_piece,
    chunk,
    event,
    folded,
    translate,
    usage_chunk,
)

# --- how it ends ---------------------------------------------------------------------------------


@pytest.mark.parametrize("last", [{"content": "a"}, {"reasoning": "a"}, call_piece(0, '{"x', "a", "f")])
def test_no_block_is_left_open(last: dict[str, Any]) -> None:
    # "Unclosed blocks" is what LiteLLM and Bifrost got wrong.
    events = [frame.event for frame in translate([chunk(last), chunk(finish="length")])]
    assert events.count("content_block_start") == events.count("content_block_stop") == 1
    assert events[-3:] == ["content_block_stop", "message_delta", "message_stop"]


@pytest.mark.parametrize(
    ("finish", "reason"),
    [
        ("stop", "end_turn"),
        ("length", "max_tokens"),
        ("model_length", "max_tokens"),
        ("content_filter", "refusal"),
        ("eos", "end_turn"),
        ("something_new", "end_turn"),
    ],
)
def test_finish_reasons(finish: str, reason: str) -> None:
    assert folded(translate([*HELLO, chunk(finish=finish), DONE]))["stop_reason"] == reason


def test_a_refusal() -> None:
    # https://platform.openai.com/docs/guides/structured-outputs#refusals-with-structured-outputs
    message = folded(
        translate([chunk({"refusal": "I "}), chunk({"refusal": "won't"}), chunk(finish="stop"), DONE])
    )
    assert message["stop_reason"] == "refusal"
    assert message["content"] == [{"type": "text", "text": "I won't"}]


def test_the_stop_sequence_that_was_met() -> None:
    # vLLM names it: https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html
    end = event(choices=[{"delta": {}, "finish_reason": "stop", "stop_reason": "END"}])
    message = folded(translate([*HELLO, end, DONE], stop_sequences=["END"]))
    assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", "END")
    token = event(choices=[{"delta": {}, "finish_reason": "stop", "stop_reason": 2}])
    assert folded(translate([*HELLO, token, DONE], stop_sequences=["END"]))["stop_sequence"] is None


def test_a_finish_reason_without_done_is_an_end() -> None:
    assert folded(translate([*HELLO, chunk(finish="stop")]))["stop_reason"] == "end_turn"


def test_done_without_a_finish_reason_is_an_end() -> None:
    assert folded(translate([*HELLO, DONE]))["stop_reason"] == "end_turn"


@pytest.mark.parametrize("pieces", [[], HELLO, [b": nothing yet\n\n"], [DONE], [usage_chunk(), DONE]])
def test_neither_is_none(pieces: list[bytes]) -> None:
    with pytest.raises(ValueError, match="not complete"):
        translate(pieces)


def test_more_after_the_finish_reason() -> None:
    message = folded(
        translate([*HELLO, chunk(finish="stop"), chunk({"content": "!"}), chunk(finish="stop"), DONE])
    )
    assert message["content"] == [{"type": "text", "text": "Hello!"}]


def test_nothing_counts_after_done() -> None:
    assert blocks(*HELLO, chunk(finish="stop"), DONE, b"data: garbage\n\n", event(error="late")) == [
        {"type": "text", "text": "Hello"}
    ]


def test_comments_and_keep_alives() -> None:
    # https://openrouter.ai/docs/api-reference/streaming, https://api-docs.deepseek.com/quick_start/rate_limit
    silence = [b": OPENROUTER PROCESSING\n\n", b": keep-alive\n\n", b"\n", b"\r\n\r\n"]
    assert blocks(*silence, HELLO[0], *silence, *HELLO[1:]) == [{"type": "text", "text": "Hello"}]


# --- usage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pieces",
    [
        pytest.param([*HELLO, chunk(finish="stop"), usage_chunk(), DONE], id="late"),
        pytest.param([*HELLO, chunk(finish="stop", usage=USAGE), DONE], id="with the finish reason"),
        pytest.param([*HELLO, chunk(finish="stop"), DONE[:0], usage_chunk()], id="last of all"),
        pytest.param(
            [
                *(
                    chunk({"content": c}, usage={**USAGE, "completion_tokens": i})
                    for i, c in enumerate("Hello")
                ),
                chunk(finish="stop", usage=USAGE),
                DONE,
            ],
            id="in every chunk",
        ),
        pytest.param(
            [chunk({"content": "Hello"}, usage=None), chunk(finish="stop"), usage_chunk(), DONE], id="null"
        ),
        pytest.param([*HELLO, chunk(finish="stop", x_groq={"id": "r", "usage": USAGE}), DONE], id="Groq"),
        pytest.param(
            [*HELLO, chunk(finish="stop"), usage_chunk(), usage_chunk({}), DONE], id="and then none"
        ),
    ],
)
def test_usage_comes_when_it_comes(pieces: list[bytes]) -> None:
    # "Usage 0/0" is what the others tell when it comes after the finish reason.
    message = folded(translate(pieces))
    assert message["usage"] == FOLDED_USAGE
    assert message["content"] == [{"type": "text", "text": "Hello"}]


def test_usage_that_never_comes_is_estimated() -> None:
    usage = folded(translate([*HELLO, chunk(finish="stop"), DONE]))["usage"]
    assert usage == {"cache_read_input_tokens": 0, "input_tokens": 7, "output_tokens": 2}


def test_cached_tokens_are_kept_apart_where_deepseek_tells_them() -> None:
    # https://api-docs.deepseek.com/guides/kv_cache
    usage = {"prompt_tokens": 12, "completion_tokens": 5, "prompt_cache_hit_tokens": 8}
    assert (
        folded(translate([*HELLO, chunk(finish="stop"), usage_chunk(usage), DONE]))["usage"] == FOLDED_USAGE
    )


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "status", "type_"),
    [
        # https://platform.openai.com/docs/guides/error-codes
        (event(error={"message": "no", "type": "server_error", "code": None}), 500, "api_error"),
        # https://openrouter.ai/docs/api-reference/errors
        (event(id="g", error={"code": 429, "message": "no"}, choices=[]), 429, "rate_limit_error"),
        (event(error={"message": "no", "code": "503"}), 503, "api_error"),
        # vLLM
        (
            event(error={"message": "no", "type": "BadRequestError", "code": 400}),
            400,
            "invalid_request_error",
        ),
        (event(object="error", message="no", type="NotFoundError", code=404), 404, "not_found_error"),
        (b'event: error\ndata: {"message": "no", "code": "529"}\n\n', 529, "overloaded_error"),
        (event(error="no"), 500, "api_error"),
        (event(error={"message": "no", "type": "rate_limit_error"}), 429, "rate_limit_error"),
    ],
)
def test_an_error_in_the_stream(sent: bytes, status: int, type_: str) -> None:
    with pytest.raises(UpstreamStatusError) as caught:
        translate([*HELLO, sent, DONE])
    assert (caught.value.status, caught.value.error_type, caught.value.message) == (status, type_, "no")


@pytest.mark.parametrize(("finish", "status"), [("insufficient_system_resource", 529), ("error", 500)])
def test_an_answer_that_was_given_up(finish: str, status: int) -> None:
    # https://api-docs.deepseek.com/api/create-chat-completion
    with pytest.raises(UpstreamStatusError) as caught:
        translate([*HELLO, chunk(finish=finish), DONE])
    assert caught.value.status == status


def test_an_error_shows_no_secret() -> None:
    with pytest.raises(UpstreamStatusError) as caught:
        translate([event(error={"message": "sk-1 refused by http://upstream.invalid/v1"})])
    assert "sk-1" not in caught.value.message
    assert "upstream.invalid" not in caught.value.message


def test_a_null_error_is_none() -> None:
    assert blocks(chunk({"content": "a"}, error=None)) == [{"type": "text", "text": "a"}]


@pytest.mark.parametrize("sent", [b"data: {\n\n", b"data: [1]\n\n", b"data: hello\n\n"])
def test_garbage(sent: bytes) -> None:
    with pytest.raises(UpstreamProtocolError):
        translate([*HELLO, sent])
