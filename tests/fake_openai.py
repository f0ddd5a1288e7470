"""What Chat Completions upstreams send: chunks, streams and answers, for tests to put together."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import orjson

from actors.providers.base import Frame
from actors.providers.openai.stream import StreamTranslator
from actors.providers.sse_decoder import SSEDecoder
from actors.providers.upstream_errors import Scrubber
from events.message import MessageFold
from tests.fake_upstream import LAST_CHUNK, STREAM_HEAD, Exchange, answer

DONE = b"data: [DONE]\n\n"
SCRUB = Scrubber("http://upstream.invalid/v1", ("sk-1",))
USAGE = {"prompt_tokens": 12, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 8}}
FOLDED_USAGE = {"cache_read_input_tokens": 8, "input_tokens": 4, "output_tokens": 5}


def event(**fields: Any) -> bytes:
    """One server-sent event with these fields."""
    return b"data: " + orjson.dumps(fields) + b"\n\n"


def chunk(delta: Mapping[str, Any] | None = None, finish: str | None = None, **fields: Any) -> bytes:
    """One chunk of a stream."""
    choice: dict[str, Any] = {"index": 0, "delta": delta or {}, "finish_reason": finish}
    named = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "model": "m", **fields}
    return event(choices=[choice], **named)


def usage_chunk(usage: Mapping[str, Any] = USAGE) -> bytes:
    """The last chunk where ``include_usage`` was asked for."""
    return event(id="chatcmpl-1", object="chat.completion.chunk", model="m", choices=[], usage=usage)


def call_piece(
    index: int | None, arguments: str | None = None, id_: str | None = None, name: str | None = None
) -> dict[str, Any]:
    """A delta with a piece of one tool call."""
    function = {"name": name, "arguments": arguments}
    call: dict[str, Any] = {"function": {key: value for key, value in function.items() if value is not None}}
    if index is not None:
        call["index"] = index
    if id_ is not None:
        call |= {"id": id_, "type": "function"}
    return {"tool_calls": [call]}


HELLO = [chunk({"role": "assistant", "content": ""}), chunk({"content": "Hel"}), chunk({"content": "lo"})]
"""Chunks that say so, without an end."""


def completion(
    message: Mapping[str, Any], finish: str = "stop", usage: Mapping[str, Any] | None = USAGE
) -> dict[str, Any]:
    """A plain answer."""
    choice = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": finish}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "model": "m",
        "choices": [choice],
        "usage": usage,
    }


def tool_call(id_: str, name: str, arguments: str) -> dict[str, Any]:
    """A tool call of a plain answer."""
    return {"id": id_, "type": "function", "function": {"name": name, "arguments": arguments}}


def translate(pieces: Iterable[bytes], stop_sequences: Iterable[str] = ()) -> list[Frame]:
    """The frames that a whole stream becomes. Raises as the translator does; ValueError for a hang-up."""
    decoder = SSEDecoder(1 << 20, named=False)
    translator = StreamTranslator(model="asked", scrub=SCRUB, stop_sequences=tuple(stop_sequences))
    frames: list[Frame] = []
    for piece in pieces:
        for name, data, _ in decoder.feed(piece):
            frames += translator.feed(name, data)
    if not translator.complete:
        raise ValueError("the stream is not complete")
    return frames + translator.finish(input_tokens=7)


def check_order(frames: Iterable[Frame]) -> None:
    """The contract's order: one block at a time, each opened and closed once, deltas of the block's kind."""
    kinds = {"text": "text_delta", "thinking": "thinking_delta", "tool_use": "input_json_delta"}
    state, count, kind = "new", 0, ""
    for frame in frames:
        data = orjson.loads(frame.data)
        assert frame.wire == b"event: %b\ndata: %b\n\n" % (frame.event.encode(), frame.data)
        assert data["type"] == frame.event
        match frame.event:
            case "message_start":
                assert state == "new"
                state = "between"
            case "content_block_start":
                assert (state, data["index"]) == ("between", count)
                state, kind = "open", data["content_block"]["type"]
            case "content_block_delta":
                assert (state, data["index"], data["delta"]["type"]) == ("open", count, kinds[kind])
            case "content_block_stop":
                assert (state, data["index"]) == ("open", count)
                state, count = "between", count + 1
            case "message_delta":
                assert state == "between"
                assert data["usage"]["output_tokens"] >= 0
                state = "ending"
            case _:
                assert (frame.event, state) == ("message_stop", "ending")
                state = "over"
    assert state == "over"


def folded(frames: Iterable[Frame]) -> dict[str, Any]:
    """The Message of a whole stream, whose order is checked, too."""
    kept = list(frames)
    check_order(kept)
    fold = MessageFold()
    for frame in kept:
        fold.apply(frame.event, frame.data)
    return fold.message()


def blocks(*pieces: bytes) -> list[dict[str, Any]]:
    """The content that chunks without an end become."""
    content: list[dict[str, Any]] = folded(translate([*pieces, chunk(finish="stop"), DONE]))["content"]
    return content


def tool(id_: str, name: str, input_: Any) -> dict[str, Any]:
    """A block of a Message."""
    return {"type": "tool_use", "id": id_, "name": name, "input": input_}


async def speak(exchange: Exchange) -> None:
    """Chat Completions, as far as the provider contract needs it: says the last text back. Counts nothing."""
    exchange.keep_alive()
    asked = orjson.loads(exchange.request.body)
    if exchange.request.path.partition("?")[0] != "/v1/chat/completions":
        await exchange.send(answer(404, b'{"error":{"message":"no such path"}}'))
        return
    text = asked["messages"][-1]["content"]
    names = {"model": asked["model"]}
    if not asked["stream"]:
        body = orjson.dumps({**completion({"content": text}), **names})
        await exchange.send(answer(200, body, "application/json", "x-request-id: req_fake"))
        return
    await exchange.send(STREAM_HEAD)
    words = [chunk({"content": word}, **names) for word in re.findall(r"\S+\s*", text)]
    for piece in (*words, chunk(finish="stop"), usage_chunk()):
        await exchange.send_chunk(piece)
    await exchange.send(b"%x\r\n%b\r\n%b" % (len(DONE), DONE, LAST_CHUNK))
