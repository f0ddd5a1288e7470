"""Turns of a conversation: content blocks of the Messages API to messages of Chat Completions.

Several text blocks become one string with line breaks between them (system blocks: without), which is what
llama.cpp's own Messages endpoint makes of them, and what servers that know only strings understand.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import orjson

from actors.providers.openai.dialect import Dialect
from actors.providers.openai.mapping import check_block, check_source, refuse

Json = dict[str, Any]

_SHORT_ID = re.compile(r"[A-Za-z0-9]{9}")
_ERROR_PREFIX = "Error: "


def translate_system(system: object) -> list[Json]:
    """The first message, of role system; none for an absent or empty prompt."""
    text = _system_text(system, "system")
    return [{"role": "system", "content": text}] if text else []


def translate_messages(messages: object, dialect: Dialect) -> list[Json]:
    """All turns, in order. Raises the 400 that names the place of what cannot be translated."""
    if not isinstance(messages, list):
        raise refuse("messages", "a list is expected")
    translated: list[Json] = []
    for index, message in enumerate(messages):
        place = f"messages.{index}"
        if not isinstance(message, dict):
            raise refuse(place, "a message is an object")
        content = message.get("content")
        match message.get("role"):
            case "user":
                translated += _user_turn(content, place, dialect)
            case "assistant":
                translated.append(_assistant_turn(content, place, dialect))
            case "system":
                text = _system_text(content, f"{place}.content")
                translated.append({"role": "system", "content": text})
            case _:
                raise refuse(f"{place}.role", "user, assistant or system is expected")
    return translated


def _system_text(content: object, place: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    return "".join(_text_of(block, at) for block, at, _ in _blocks(content, "system", place))


# --- the user ----------------------------------------------------------------------------------


def _user_turn(content: object, place: str, dialect: Dialect) -> list[Json]:
    """Tool results first, as they must follow the calls at once, then the images in them, then the rest."""
    if isinstance(content, str):
        return [{"role": "user", "content": content}]
    results: list[Json] = []
    images: list[Json] = []
    rest: list[Json] = []
    for block, at, kind in _blocks(content, "user", f"{place}.content"):
        if kind == "tool_result":
            result = _tool_result(block, at, dialect)
            results.append(result.message)
            images += result.images
        else:
            rest += _parts(block, kind, at)
    parts = images + rest
    if parts or not results:
        results.append({"role": "user", "content": _joined(parts)})
    return results


class _Result(NamedTuple):
    message: Json
    images: list[Json]
    """Parts that a message of role tool cannot hold, under a line that says whose they are."""


def _tool_result(block: Mapping[str, Any], place: str, dialect: Dialect) -> _Result:
    call_id = block.get("tool_use_id")
    if not isinstance(call_id, str):
        raise refuse(f"{place}.tool_use_id", "a string is expected")
    call_id = _call_id(call_id, dialect)
    content = block.get("content")
    parts: list[Json] = []
    if isinstance(content, str):
        parts = [_text_part(content)]
    elif content is not None:
        for inner, at, kind in _blocks(content, "tool_result", f"{place}.content"):
            parts += _parts(inner, kind, at)
    images = [part for part in parts if part["type"] != "text"]
    text = "\n".join(part["text"] for part in parts if part["type"] == "text")
    if images:
        note = f"The result of tool call {call_id}, as images:"
        text = text or "The result is in the images of the next user message."
        images = [_text_part(note), *images]
    if block.get("is_error") is True:
        # There is no flag for it.
        text = _ERROR_PREFIX + text if text else "Error"
    return _Result({"role": "tool", "tool_call_id": call_id, "content": text}, images)


def _parts(block: Mapping[str, Any], kind: str, place: str) -> list[Json]:
    """Content parts of a text, image, document or search result."""
    match kind:
        case "image":
            return [{"type": "image_url", "image_url": {"url": _image_url(block, place)}}]
        case "document":
            return _document(block, place)
        case "search_result":
            inner = _blocks(block.get("content"), "system", f"{place}.content")
            heading = [str(block[key]) for key in ("title", "source") if block.get(key)]
            return [_text_part("\n".join([*heading, *(_text_of(each, at) for each, at, _ in inner)]))]
        case _:
            return [_text_part(_text_of(block, place))]


def _image_url(block: Mapping[str, Any], place: str) -> str:
    source = check_source(block, "image", place)
    if source["type"] == "url":
        return _string(source, "url", f"{place}.source")
    media_type = _string(source, "media_type", f"{place}.source")
    return f"data:{media_type};base64,{_string(source, 'data', f'{place}.source')}"


def _document(block: Mapping[str, Any], place: str) -> list[Json]:
    source = check_source(block, "document", place)
    heading = [str(block[key]) for key in ("title", "context") if block.get(key)]
    parts = [_text_part("\n".join(heading))] if heading else []
    if source["type"] == "text":
        return [*parts, _text_part(_string(source, "data", f"{place}.source"))]
    content = source.get("content")
    if isinstance(content, str):
        return [*parts, _text_part(content)]
    for inner, at, kind in _blocks(content, "document", f"{place}.source.content"):
        parts += _parts(inner, kind, at)
    return parts


# --- the assistant -----------------------------------------------------------------------------


def _assistant_turn(content: object, place: str, dialect: Dialect) -> Json:
    if isinstance(content, str):
        return {"role": "assistant", "content": content}
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[Json] = []
    for block, at, kind in _blocks(content, "assistant", f"{place}.content"):
        if kind == "text":
            texts.append(_text_of(block, at))
        elif kind == "tool_use":
            calls.append(_tool_call(block, at, dialect))
        elif kind == "thinking" and isinstance(block.get("thinking"), str):
            thoughts.append(block["thinking"])
    message: Json = {"role": "assistant", "content": "\n".join(texts) if texts or not calls else None}
    if thoughts and dialect.reasoning_history:
        message[dialect.reasoning_history] = "\n".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return message


def _tool_call(block: Mapping[str, Any], place: str, dialect: Dialect) -> Json:
    try:
        arguments = orjson.dumps(block.get("input") or {}).decode()
    except orjson.JSONEncodeError:
        raise refuse(f"{place}.input", "it is nested too deeply") from None
    return {
        "id": _call_id(_string(block, "id", place), dialect),
        "type": "function",
        "function": {"name": _string(block, "name", place), "arguments": arguments},
    }


def _call_id(call_id: str, dialect: Dialect) -> str:
    """The id of a tool call, the same for a call and its result; hashed where it must be short and is not."""
    if not dialect.short_call_ids or _SHORT_ID.fullmatch(call_id):
        return call_id
    return hashlib.sha256(call_id.encode()).hexdigest()[:9]


# --- blocks ------------------------------------------------------------------------------------


def _blocks(content: object, where: str, place: str) -> Iterator[tuple[Mapping[str, Any], str, str]]:
    """Each block with its place and type, checked by the table."""
    if not isinstance(content, list):
        raise refuse(place, "a string or a list of content blocks is expected")
    for index, block in enumerate(content):
        at = f"{place}.{index}"
        yield block, at, check_block(block, where, at)


def _text_of(block: Mapping[str, Any], place: str) -> str:
    return _string(block, "text", place)


def _string(holder: Mapping[str, Any], key: str, place: str) -> str:
    value = holder.get(key)
    if not isinstance(value, str):
        raise refuse(f"{place}.{key}", "a string is expected")
    return value


def _text_part(text: str) -> Json:
    return {"type": "text", "text": text}


def _joined(parts: Sequence[Json]) -> str | list[Json]:
    """One string where there is only text: some servers understand nothing else."""
    if all(part["type"] == "text" for part in parts):
        return "\n".join(part["text"] for part in parts)
    return list(parts)
