"""Messages, and the streams that spell them."""

from itertools import pairwise
from typing import Any

import orjson
from hypothesis import strategies as st

from tests.unit.strategies import json_objects, json_values, texts

Json = dict[str, Any]
Frames = list[Json]


def start(**usage: int | None) -> Json:
    message = {"id": "msg_1", "type": "message", "role": "assistant", "model": "m", "content": []}
    return {"type": "message_start", "message": {**message, "stop_reason": None, "usage": usage}}


def block(index: int, content_block: Json, *deltas: Json) -> Frames:
    return [
        {"type": "content_block_start", "index": index, "content_block": content_block},
        *({"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas),
        {"type": "content_block_stop", "index": index},
    ]


def ending(stop_reason: str = "end_turn", **usage: int | None) -> Frames:
    delta = {"stop_reason": stop_reason, "stop_sequence": None}
    return [{"type": "message_delta", "delta": delta, "usage": usage}, {"type": "message_stop"}]


@st.composite
def chunked(draw: st.DrawFn, text: str) -> list[str]:
    where = sorted(draw(st.lists(st.integers(0, len(text)), max_size=5)))
    at = [0, *where, len(text)]
    return [text[a:b] for a, b in pairwise(at)] if text or draw(st.booleans()) else []


text_blocks = st.fixed_dictionaries(
    {"type": st.just("text"), "text": texts}, optional={"citations": st.lists(json_objects, max_size=3)}
)
thinking_blocks = st.fixed_dictionaries({"type": st.just("thinking"), "thinking": texts, "signature": texts})
tool_blocks = st.fixed_dictionaries(
    {
        "type": st.sampled_from(["tool_use", "server_tool_use", "mcp_tool_use", "future_tool_use"]),
        "id": texts,
        "name": texts,
        "input": json_objects,
    },
    optional={"caller": json_objects},
)
redacted_blocks = st.fixed_dictionaries({"type": st.just("redacted_thinking"), "data": texts})
compaction_blocks = st.fixed_dictionaries(
    {"type": st.just("compaction"), "content": texts, "encrypted_content": texts}
)
unknown_blocks = st.builds(
    lambda fields, kind: {**fields, "type": kind},
    json_objects,
    st.sampled_from(["web_search_tool_result", "mcp_tool_result", "container_upload", "of_next_year"]),
)
blocks = st.one_of(
    text_blocks, thinking_blocks, tool_blocks, redacted_blocks, compaction_blocks, unknown_blocks
)
usages = st.dictionaries(
    st.sampled_from(["input_tokens", "output_tokens", "cache_read_input_tokens", "service_tier", "new"]),
    st.integers(0, 1 << 40) | texts | json_objects,
    max_size=5,
)
messages = st.fixed_dictionaries(
    {
        "id": texts,
        "type": st.just("message"),
        "role": st.just("assistant"),
        "model": texts,
        "content": st.lists(blocks, max_size=4),
        "stop_reason": st.sampled_from(["end_turn", "tool_use", "refusal"]),
        "stop_sequence": st.none() | texts,
        "usage": usages,
    },
    optional={"container": json_objects, "context_management": json_objects, "future": json_values},
)


@st.composite
def block_frames(draw: st.DrawFn, index: int, whole: Json) -> Frames:
    begin, deltas = dict(whole), []
    match whole["type"]:
        case "text":
            pieces = draw(chunked(whole["text"]))
            begin["text"] = ""
            deltas = [{"type": "text_delta", "text": piece} for piece in pieces]
            if whole.get("citations"):
                begin["citations"] = draw(st.sampled_from([[], None]))
                cited = [{"type": "citations_delta", "citation": c} for c in whole["citations"]]
                place = draw(st.integers(0, len(deltas)))
                deltas[place:place] = cited
        case "thinking":
            begin |= {"thinking": "", "signature": ""}
            deltas = [{"type": "thinking_delta", "thinking": t} for t in draw(chunked(whole["thinking"]))]
            deltas += [{"type": "signature_delta", "signature": whole["signature"]}]
        case "tool_use" | "server_tool_use" | "mcp_tool_use" | "future_tool_use":
            begin["input"] = {}
            spelled = orjson.dumps(whole["input"]).decode() if whole["input"] else ""
            deltas = [{"type": "input_json_delta", "partial_json": p} for p in draw(chunked(spelled))]
        case "compaction":
            begin["content"] = None
            deltas = [{**whole, "type": "compaction_delta"}]
    for _ in range(draw(st.integers(0, 1))):
        odd = {"type": "delta_of_next_year", "text": "no part of it"}
        deltas.insert(draw(st.integers(0, len(deltas))), odd)
    return block(index, begin, *deltas)


@st.composite
def interleaved(draw: st.DrawFn, parts: list[Frames]) -> Frames:
    queues, merged = [list(part) for part in parts], []
    while any(queues):
        queue = draw(st.sampled_from([queue for queue in queues if queue]))
        merged.append(queue.pop(0))
    return merged


@st.composite
def streams(draw: st.DrawFn) -> tuple[Json, Frames]:
    """A Message, and a legal stream that spells it."""
    message: Json = draw(messages)
    parts = [draw(block_frames(index, whole)) for index, whole in enumerate(message["content"])]
    content = draw(interleaved(parts)) if draw(st.booleans()) else [f for part in parts for f in part]
    late = draw(st.sets(st.sampled_from(sorted(message["usage"])))) if message["usage"] else set()
    early_usage: Json = {}
    late_usage: Json = {}
    for key, value in message["usage"].items():
        if key in late:
            late_usage[key] = value
            early_usage |= draw(st.sampled_from([{}, {key: 1}, {key: None}]))
        else:
            early_usage[key] = value
            late_usage |= draw(st.sampled_from([{}, {key: None}]))
    begin = {**message, "content": [], "stop_reason": None, "stop_sequence": None, "usage": early_usage}
    last: Json = {"type": "message_delta", "usage": late_usage}
    last["delta"] = {name: message[name] for name in ("stop_reason", "stop_sequence")}
    if "container" in message:
        last["delta"]["container"] = begin.pop("container")
    if "context_management" in message:
        last["context_management"] = begin.pop("context_management")
    frames = [{"type": "message_start", "message": begin}, *content, last, {"type": "message_stop"}]
    for _ in range(draw(st.integers(0, 2))):
        frames.insert(draw(st.integers(0, len(frames))), {"type": "ping"})
    for _ in range(draw(st.integers(0, 1))):
        first = next(i for i, frame in enumerate(frames) if frame["type"] == "message_start")
        last_at = next(i for i, frame in enumerate(frames) if frame["type"] == "message_stop")
        frames.insert(draw(st.integers(first + 1, last_at)), {"type": "event_of_next_year", "x": 1})
    return message, frames
