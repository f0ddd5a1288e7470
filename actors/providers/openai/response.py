"""A Chat Completions answer to a Message, and the words the two share with streams.

https://platform.openai.com/docs/api-reference/chat/object, https://docs.anthropic.com/en/api/messages
"""

import re
import secrets
from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any

import orjson

from actors.errors import UpstreamProtocolError
from actors.providers.openai.errors import interruption
from events.errors import BadFrameError
from events.message import parse_input

Json = dict[str, Any]

MAX_ID_CHARS = 128
"""Of an id an upstream gave; what is longer is cut."""
CHARS_PER_TOKEN = 4
"""By which the tokens of an answer are told where the upstream does not count them."""

REFUSAL = "refusal"
_STOP_REASONS = {
    "stop": "end_turn",
    "eos": "end_turn",
    "length": "max_tokens",
    "max_tokens": "max_tokens",
    "model_length": "max_tokens",  # Mistral: the context is full
    "content_filter": REFUSAL,
    "tool_calls": "end_turn",  # with a tool block it is tool_use, whatever the upstream says
    "function_call": "end_turn",
}
_ID = re.compile(r"[^A-Za-z0-9_-]")


def translate_response(parsed: Mapping[str, Any], *, model: str, stop_sequences: Container[str] = ()) -> Json:
    """The Message. ``model`` is what it names where the upstream names none.

    Blocks come in the order thinking, text, tool calls: the answer does not tell another. Usage lacks
    ``input_tokens`` and ``output_tokens`` where the upstream did not count. Raises UpstreamProtocolError for
    what is no completion, UpstreamStatusError for one that its upstream has given up.
    """
    choices = parsed.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or not isinstance(message, dict):
        raise UpstreamProtocolError("the upstream's answer is not a chat completion")
    if (error := interruption(choice)) is not None:
        raise error
    content: list[Json] = []
    thinking, text = split_content(message.get("content"))
    thinking = reasoning_of(message) + thinking
    if thinking:
        content.append({"type": "thinking", "thinking": thinking, "signature": ""})
    refusal = message.get("refusal")
    refused = isinstance(refusal, str) and bool(refusal)
    text += refusal if isinstance(refusal, str) else ""
    if text:
        content.append({"type": "text", "text": text})
    content += _tool_blocks(message.get("tool_calls"))
    stop_reason, stop_sequence = stop_of(
        choice,
        has_tools=bool(content) and content[-1]["type"] == "tool_use",
        refused=refused,
        stop_sequences=stop_sequences,
    )
    return {
        "id": message_id(parsed.get("id")),
        "type": "message",
        "role": "assistant",
        "content": content,
        "model": model_of(parsed, model),
        "stop_reason": stop_reason,
        "stop_sequence": stop_sequence,
        "usage": usage_of(parsed) or {},
    }


def _tool_blocks(calls: object) -> Iterator[Json]:
    used: set[str] = set()
    for call in calls if isinstance(calls, list) else []:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict):
            raise UpstreamProtocolError("the upstream's answer has a tool call without a function")
        id_ = tool_id(call.get("id"), used)
        name = function.get("name")
        if not isinstance(name, str) or not name:
            raise UpstreamProtocolError("the upstream's answer has a tool call without a name")
        yield {
            "type": "tool_use",
            "id": id_,
            "name": name,
            "input": input_of(arguments_of(function)),
        }


# --- words shared with streams -----------------------------------------------------------------


def message_id(upstream_id: object) -> str:
    """``msg_`` and the upstream's id; one of our own where it gave none."""
    given = _ID.sub("_", upstream_id)[:MAX_ID_CHARS] if isinstance(upstream_id, str) else ""
    return "msg_" + (given.removeprefix("chatcmpl-").removeprefix("msg_") or secrets.token_hex(12))


def tool_id(upstream_id: object, used: set[str]) -> str:
    """The upstream's id of a tool call, made fit; one of our own where it gave none, or gave it twice.

    ``used`` holds those of the Message so far, and then this one, too.
    """
    given = _ID.sub("_", upstream_id)[:MAX_ID_CHARS] if isinstance(upstream_id, str) else ""
    if not given or given in used:
        given = "toolu_" + secrets.token_hex(12)
    used.add(given)
    return given


def model_of(parsed: Mapping[str, Any], model: str) -> str:
    """The model as the upstream names it, else ``model``."""
    named = parsed.get("model")
    return named if isinstance(named, str) and named else model


def split_content(content: object) -> tuple[str, str]:
    """Thinking and text of ``content``: a string, or parts (Mistral's models think in parts).

    https://docs.mistral.ai/capabilities/reasoning
    """
    if isinstance(content, str):
        return "", content
    thinking: list[str] = []
    text: list[str] = []
    for part in content if isinstance(content, list) else []:
        match part:
            case {"type": "text", "text": str(piece)}:
                text.append(piece)
            case {"type": "thinking", "thinking": str(piece)}:
                thinking.append(piece)
            case {"type": "thinking", "thinking": list(pieces)}:
                thinking.append(split_content(pieces)[1])
            case _:
                pass
    return "".join(thinking), "".join(text)


def reasoning_of(message: Mapping[str, Any]) -> str:
    """What a message or delta thinks: ``reasoning_content`` (DeepSeek, vLLM, llama.cpp) or ``reasoning``."""
    for name in ("reasoning_content", "reasoning"):
        value = message.get(name)
        if isinstance(value, str) and value:
            return value
    return ""


def arguments_of(function: Mapping[str, Any]) -> str:
    """The arguments of a call, or the next piece of them, as text; some send the object itself."""
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        return arguments
    return orjson.dumps(arguments).decode() if isinstance(arguments, dict) else ""


def object_text(arguments: str) -> str:
    """The JSON object that whole arguments spell, as text; empty where there are none.

    Empty, ``null`` and white space are none. Some models write the object as a JSON string, which is taken
    apart. Raises UpstreamProtocolError for what begins like no object.
    """
    text = arguments.strip()
    if text.startswith('"'):
        try:
            text = str(orjson.loads(text)).strip()
        except orjson.JSONDecodeError:
            text = arguments
    if text in ("", "null"):
        return ""
    if not text.startswith("{"):
        raise UpstreamProtocolError("the arguments of a tool call are not a JSON object")
    return text


def input_of(arguments: str) -> Any:
    """The input of a tool call; what ``max_tokens`` cut off is read as far as it goes."""
    try:
        return parse_input(object_text(arguments))
    except BadFrameError:
        raise UpstreamProtocolError("the arguments of a tool call are not JSON") from None


def stop_of(
    choice: Mapping[str, Any], *, has_tools: bool, refused: bool, stop_sequences: Container[str]
) -> tuple[str, str | None]:
    """``stop_reason`` and ``stop_sequence``.

    A tool call makes it ``tool_use``, unless the answer was cut off or filtered. A stop sequence is told
    where the upstream names the one it met (vLLM's ``stop_reason``); elsewhere it reads as ``end_turn``.
    """
    finish = choice.get("finish_reason")
    reason = _STOP_REASONS.get(finish, "end_turn") if isinstance(finish, str) else "end_turn"
    if refused or reason == REFUSAL:
        return REFUSAL, None
    if reason == "max_tokens":
        return reason, None
    if has_tools:
        return "tool_use", None
    met = choice.get("stop_reason")
    if isinstance(met, str) and met in stop_sequences:
        return "stop_sequence", met
    return reason, None


def usage_of(parsed: Mapping[str, Any]) -> Json | None:
    """The usage, with what was read from a cache kept apart; None where there is none to read.

    ``prompt_tokens`` counts cached tokens too, ``input_tokens`` does not.
    https://platform.openai.com/docs/guides/prompt-caching, https://api-docs.deepseek.com/guides/kv_cache
    """
    usage = parsed.get("usage")
    if not isinstance(usage, dict):
        x_groq = parsed.get("x_groq")  # where Groq put it in streams before it knew stream_options
        usage = x_groq.get("usage") if isinstance(x_groq, dict) else None
    if not isinstance(usage, dict):
        return None
    prompt, answer = _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens"))
    if not prompt and not answer:
        return None
    details = usage.get("prompt_tokens_details")
    cached = _count(details.get("cached_tokens")) if isinstance(details, dict) else 0
    cached = min(cached or _count(usage.get("prompt_cache_hit_tokens")), prompt)
    return {"cache_read_input_tokens": cached, "input_tokens": prompt - cached, "output_tokens": answer}


def estimated_usage(input_tokens: int, chars: int) -> Json:
    """The usage where the upstream never tells one; ``chars`` are those of the answer."""
    return {
        "cache_read_input_tokens": 0,
        "input_tokens": input_tokens,
        "output_tokens": max(1, -(-chars // CHARS_PER_TOKEN)),
    }


def answer_chars(content: Iterable[Mapping[str, Any]]) -> int:
    """The characters of an answer's blocks, by which its tokens are told where nobody counted them."""
    return sum(
        len(orjson.dumps(block["input"])) if block["type"] == "tool_use" else len(block[block["type"]])
        for block in content
    )


def _count(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0
