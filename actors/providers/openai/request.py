"""A Messages request to a Chat Completions request.

https://docs.anthropic.com/en/api/messages, https://platform.openai.com/docs/api-reference/chat/create
"""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

from actors.providers.openai.content import translate_messages, translate_system
from actors.providers.openai.dialect import Dialect
from actors.providers.openai.mapping import check_fields, check_tool, refuse

Json = dict[str, Any]

MAX_USER_CHARS = 64
"""Of ``user``; OpenAI refuses more. A longer id is hashed, to the same length each time."""
SCHEMA_NAME = "answer"
"""What the schema of a structured answer is called; Chat Completions asks for a name."""
LOW_EFFORT_BUDGET_TOKENS = 4_096
"""A thinking budget below this is low effort,"""
MEDIUM_EFFORT_BUDGET_TOKENS = 16_384
"""one below this medium, any other high."""

_VALUES = frozenset({"enum", "const", "default", "examples"})
"""Keywords of a schema that hold values, not schemas."""
_EFFORTS = {"low": "low", "medium": "medium", "high": "high", "xhigh": "high", "max": "high"}


def translate_request(
    fields: Mapping[str, Any],
    *,
    model: str,
    dialect: Dialect,
    stream: bool,
    passed_fields: Iterable[str] = (),
) -> Json:
    """The body to send, as :mod:`.mapping` says.

    ``fields`` are the client's, unchecked below their outer shape. Raises UnsupportedError with status 400
    that names the field for what is refused or has the wrong shape.
    """
    check_fields(fields)
    body: Json = {
        "model": model,
        "messages": [
            *translate_system(fields.get("system")),
            *translate_messages(fields.get("messages"), dialect),
        ],
    }
    if fields.get("max_tokens") is not None:
        body[dialect.max_tokens_field] = fields["max_tokens"]
    for name in ("temperature", "top_p"):
        if fields.get(name) is not None:
            body[name] = fields[name]
    if fields.get("stop_sequences"):
        body["stop"] = fields["stop_sequences"]
    body |= _tools(fields)
    body |= _response_format(fields)
    body |= _reasoning(fields, dialect)
    body |= _user(fields, dialect)
    for name in passed_fields:
        if name in fields and name not in body:
            body[name] = fields[name]
    body["stream"] = stream
    if stream and dialect.stream_usage:
        body["stream_options"] = {"include_usage": True}
    return body


# --- tools -------------------------------------------------------------------------------------


def _tools(fields: Mapping[str, Any]) -> Json:
    tools = fields.get("tools")
    if not tools:
        return {}
    if not isinstance(tools, list):
        raise refuse("tools", "a list is expected")
    body: Json = {"tools": [_function(tool, f"tools.{index}") for index, tool in enumerate(tools)]}
    choice = fields.get("tool_choice")
    if choice is None:
        return body
    if not isinstance(choice, dict):
        raise refuse("tool_choice", "an object is expected")
    match choice.get("type"):
        case "auto":
            body["tool_choice"] = "auto"
        case "any":
            body["tool_choice"] = "required"
        case "none":
            body["tool_choice"] = "none"
        case "tool" if isinstance(choice.get("name"), str):
            body["tool_choice"] = {"type": "function", "function": {"name": choice["name"]}}
        case "tool":
            raise refuse("tool_choice.name", "a string is expected")
        case _:
            raise refuse("tool_choice.type", "auto, any, tool or none is expected")
    if isinstance(choice.get("disable_parallel_tool_use"), bool):
        body["parallel_tool_calls"] = not choice["disable_parallel_tool_use"]
    return body


def _function(tool: object, place: str) -> Json:
    fields = check_tool(tool, place)
    name = fields.get("name")
    if not isinstance(name, str):
        raise refuse(f"{place}.name", "a string is expected")
    function: Json = {"name": name}
    if fields.get("description") is not None:
        function["description"] = fields["description"]
    function["parameters"] = fields.get("input_schema") or {"type": "object", "properties": {}}
    if isinstance(fields.get("strict"), bool):
        function["strict"] = fields["strict"]
    return {"type": "function", "function": function}


# --- structured output -------------------------------------------------------------------------


def _response_format(fields: Mapping[str, Any]) -> Json:
    config = fields.get("output_config")
    if config is not None and not isinstance(config, dict):
        raise refuse("output_config", "an object is expected")
    place, format_ = "output_config.format", (config or {}).get("format")
    if format_ is None:
        place, format_ = "output_format", fields.get("output_format")
    if format_ is None:
        return {}
    if not isinstance(format_, dict) or format_.get("type") != "json_schema":
        raise refuse(f"{place}.type", "json_schema is expected")
    schema = format_.get("schema")
    if not isinstance(schema, dict):
        raise refuse(f"{place}.schema", "an object is expected")
    named = {"name": SCHEMA_NAME, "schema": schema, "strict": is_strict(schema)}
    return {"response_format": {"type": "json_schema", "json_schema": named}}


def is_strict(schema: Mapping[str, Any]) -> bool:
    """Whether OpenAI takes a schema as strict: every object is closed and requires all its properties.

    With ``strict`` on another one it answers 400; the Messages API takes optional properties, too.
    https://platform.openai.com/docs/guides/structured-outputs#supported-schemas
    """
    pending: list[object] = [schema]  # a list instead of recursion: the nesting is the client's
    while pending:
        node = pending.pop()
        if isinstance(node, list):
            pending += node
        if not isinstance(node, dict):
            continue
        properties = node.get("properties")
        if isinstance(properties, dict):
            required = node.get("required")
            if not isinstance(required, list) or not all(name in required for name in properties):
                return False
        kind = node.get("type")
        is_object = kind == "object" or (isinstance(kind, list) and "object" in kind)
        if (is_object or isinstance(properties, dict)) and node.get("additionalProperties") is not False:
            return False
        pending += [value for key, value in node.items() if key not in _VALUES]
    return True


# --- thinking ----------------------------------------------------------------------------------


def _reasoning(fields: Mapping[str, Any], dialect: Dialect) -> Json:
    if dialect.reasoning == "none":
        return {}
    thinking = fields.get("thinking")
    thinking = thinking if isinstance(thinking, dict) else {}
    config = fields.get("output_config")
    wanted = config.get("effort") if isinstance(config, dict) else None
    effort = _EFFORTS.get(wanted) if isinstance(wanted, str) else None
    budget = thinking.get("budget_tokens")
    has_budget = isinstance(budget, int) and not isinstance(budget, bool)
    if dialect.reasoning == "reasoning":
        return _openrouter(thinking.get("type"), effort, budget if has_budget else None)
    if thinking.get("type") == "disabled":
        # There is no word for it that all models know; the lowest that they share costs least.
        return {"reasoning_effort": "low"}
    if effort is None and has_budget:
        effort = _effort_of(budget)
    return {"reasoning_effort": effort} if effort else {}


def _openrouter(kind: object, effort: str | None, budget: int | None) -> Json:
    if kind == "disabled":
        return {"reasoning": {"enabled": False}}
    if effort:
        return {"reasoning": {"effort": effort}}
    if budget is not None:
        return {"reasoning": {"max_tokens": budget}}
    return {"reasoning": {"enabled": True}} if kind in ("enabled", "adaptive") else {}


def _effort_of(budget_tokens: Any) -> str:
    if budget_tokens < LOW_EFFORT_BUDGET_TOKENS:
        return "low"
    return "medium" if budget_tokens < MEDIUM_EFFORT_BUDGET_TOKENS else "high"


def _user(fields: Mapping[str, Any], dialect: Dialect) -> Json:
    metadata = fields.get("metadata")
    user = metadata.get("user_id") if isinstance(metadata, dict) else None
    if not isinstance(user, str) or not user or not dialect.takes_user:
        return {}
    return {"user": user if len(user) <= MAX_USER_CHARS else hashlib.sha256(user.encode()).hexdigest()}
