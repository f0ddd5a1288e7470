"""What becomes of each field, block, source and tool of a Messages request: the one table of the translation.

Three fates. *Mapped*: it has a counterpart in Chat Completions, or one can be built. *Dropped*: the answer
is a good one without it. *Refused*: without it the answer would be another than was asked for, so the call
is a 400 that names the place. Fields the table does not know are dropped, as the API grows every week;
blocks, sources and tools it does not know are refused, as they are content.

https://docs.anthropic.com/en/api/messages, https://platform.openai.com/docs/api-reference/chat/create
"""

from collections.abc import Mapping
from enum import Enum
from types import MappingProxyType
from typing import Any, NamedTuple

from actors.errors import UnsupportedError


class Fate(Enum):
    """What is done with a part of a request."""

    MAPPED = "mapped"
    DROPPED = "dropped"
    REFUSED = "refused"


class Rule(NamedTuple):
    """One line of the table."""

    fate: Fate
    note: str
    """What it becomes, why it may be left out, or why it is refused (shown to the client)."""


def _mapped(note: str) -> Rule:
    return Rule(Fate.MAPPED, note)


def _dropped(note: str) -> Rule:
    return Rule(Fate.DROPPED, note)


def _refused(note: str) -> Rule:
    return Rule(Fate.REFUSED, note)


_SERVER_SIDE = _refused("runs on Anthropic's servers and has no counterpart at this provider")

FIELDS: Mapping[str, Rule] = MappingProxyType(
    {
        "model": _mapped("model, as the route renames it"),
        "messages": _mapped("messages"),
        "system": _mapped("a first message of role system; blocks are joined"),
        "max_tokens": _mapped("max_tokens, or max_completion_tokens where the provider needs it"),
        "temperature": _mapped("temperature"),
        "top_p": _mapped("top_p"),
        "stop_sequences": _mapped("stop"),
        "stream": _mapped("stream, with stream_options.include_usage"),
        "tools": _mapped("tools of type function"),
        "tool_choice": _mapped("tool_choice and parallel_tool_calls; dropped without tools"),
        "thinking": _mapped("reasoning effort, where the provider has it"),
        "output_config": _mapped(
            "format: response_format; effort: reasoning effort, where the provider has it"
        ),
        "output_format": _mapped("response_format; output_config.format wins"),
        "metadata": _mapped("user_id: user, hashed when longer than 64 characters"),
        "top_k": _dropped("no counterpart; `passed_fields` sends it as it is"),
        "cache_control": _dropped("prompts are cached, if at all, without being told"),
        "service_tier": _dropped("Anthropic's capacity"),
        "inference_geo": _dropped("Anthropic's regions"),
        "context_management": _dropped("nothing is edited out of the conversation"),
        "fallbacks": _dropped("the business of the gateway"),
        "betas": _dropped("Anthropic's"),
        "container": _SERVER_SIDE,
        "mcp_servers": _SERVER_SIDE,
    }
)
"""Top-level fields of the request."""

BLOCKS: Mapping[str, Rule] = MappingProxyType(
    {
        "text": _mapped("text; in system and assistant turns, and where there is nothing else, one string"),
        "image": _mapped("image_url"),
        "document": _mapped("its text, with title and context"),
        "search_result": _mapped("its text, with title and source"),
        "tool_use": _mapped("tool_calls"),
        "tool_result": _mapped("a message of role tool; its images follow in a user message"),
        "thinking": _dropped("reasoning_content or reasoning, where the provider wants it back"),
        "redacted_thinking": _dropped("only Anthropic can read it"),
        "server_tool_use": _SERVER_SIDE,
        "web_search_tool_result": _SERVER_SIDE,
        "web_fetch_tool_result": _SERVER_SIDE,
        "code_execution_tool_result": _SERVER_SIDE,
        "bash_code_execution_tool_result": _SERVER_SIDE,
        "text_editor_code_execution_tool_result": _SERVER_SIDE,
        "tool_search_tool_result": _SERVER_SIDE,
        "tool_reference": _SERVER_SIDE,
        "mcp_tool_use": _SERVER_SIDE,
        "mcp_tool_result": _SERVER_SIDE,
        "container_upload": _SERVER_SIDE,
    }
)
"""Content blocks, by ``type``."""

PLACES: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "system": frozenset({"text"}),
        "user": frozenset({"text", "image", "document", "search_result", "tool_result"}),
        "assistant": frozenset({"text", "tool_use", "thinking", "redacted_thinking"}),
        "tool_result": frozenset({"text", "image", "document", "search_result"}),
        "document": frozenset({"text", "image"}),
    }
)
"""Which mapped or dropped blocks may stand where."""

SOURCES: Mapping[tuple[str, str], Rule] = MappingProxyType(
    {
        ("image", "base64"): _mapped("a data URL"),
        ("image", "url"): _mapped("the URL"),
        ("image", "file"): _refused("files of Anthropic's Files API are not known to this provider"),
        ("document", "text"): _mapped("its text"),
        ("document", "content"): _mapped("its blocks"),
        ("document", "base64"): _refused("only documents with text can be sent to this provider"),
        ("document", "url"): _refused("only documents with text can be sent to this provider"),
        ("document", "file"): _refused("files of Anthropic's Files API are not known to this provider"),
    }
)
"""Sources of images and documents, by block type and ``type``."""

TOOL_TYPES: Mapping[str, Rule] = MappingProxyType({"custom": _mapped("function")})
"""Tools, by ``type``; one without a type is custom. All others are Anthropic's own."""

_TOOL_REFUSAL = "is a tool of Anthropic's own, and has no counterpart at this provider"
_UNKNOWN = "is not known to this provider"


def refuse(place: str, problem: str) -> UnsupportedError:
    """The 400 for a part of a request, named by its path: ``messages.3.content.1: ...``."""
    return UnsupportedError(f"{place}: {problem}", status=400)


def check_fields(fields: Mapping[str, Any]) -> None:
    """Raise the 400 for the first refused field that says something (null and empty say nothing)."""
    for name, value in fields.items():
        rule = FIELDS.get(name)
        if rule is not None and rule.fate is Fate.REFUSED and value:
            raise refuse(name, rule.note)


def check_block(block: object, where: str, place: str) -> str:
    """The ``type`` of a content block that may stand ``where`` (a key of :data:`PLACES`); else the 400."""
    kind = block.get("type") if isinstance(block, dict) else None
    if not isinstance(kind, str):
        raise refuse(place, "a content block is an object with a type")
    rule = BLOCKS.get(kind)
    if rule is None:
        raise refuse(place, f"the block type {_shown(kind)} {_UNKNOWN}")
    if rule.fate is Fate.REFUSED:
        raise refuse(place, f"the block type {_shown(kind)} {rule.note}")
    if kind not in PLACES[where]:
        raise refuse(
            place, f"a block of type {_shown(kind)} cannot stand in {where.replace('_', ' ')} content"
        )
    return kind


def check_source(block: Mapping[str, Any], kind: str, place: str) -> Mapping[str, Any]:
    """The source of an image or document; else the 400."""
    source = block.get("source")
    type_ = source.get("type") if isinstance(source, dict) else None
    if not isinstance(source, dict) or not isinstance(type_, str):
        raise refuse(f"{place}.source", "a source is an object with a type")
    rule = SOURCES.get((kind, type_))
    if rule is None:
        raise refuse(f"{place}.source", f"the source type {_shown(type_)} {_UNKNOWN}")
    if rule.fate is Fate.REFUSED:
        raise refuse(f"{place}.source", f"the source type {_shown(type_)} cannot be used: {rule.note}")
    return source


def check_tool(tool: object, place: str) -> Mapping[str, Any]:
    """A custom tool; else the 400."""
    if not isinstance(tool, dict):
        raise refuse(place, "a tool is an object")
    kind = tool.get("type") or "custom"
    if not isinstance(kind, str) or kind not in TOOL_TYPES:
        raise refuse(place, f"{_shown(str(kind))} {_TOOL_REFUSAL}")
    return tool


def _shown(name: str) -> str:
    """A name a client gave, at a length fit for an error."""
    return repr(name if len(name) <= 64 else name[:64] + "...")
