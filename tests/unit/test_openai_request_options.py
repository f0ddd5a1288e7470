"""Messages requests to Chat Completions requests: tools, structured output, thinking, and who takes what."""

from typing import Any

import pytest

from actors.providers.openai.dialect import Dialect, dialect_of
from actors.providers.openai.request import is_strict
from actors.providers.options import OpenaiOptions
from tests.unit.openai_requests import TOOL, problem, translated

# --- tools ---------------------------------------------------------------------------------------


def test_tools() -> None:
    extras = {"cache_control": {"type": "ephemeral"}, "input_examples": [], "strict": True, "type": "custom"}
    sent = translated(tools=[TOOL, {**TOOL, **extras}, {"name": "g"}])["tools"]
    function = {"name": "f", "description": "d", "parameters": TOOL["input_schema"]}
    assert [tool["function"] for tool in sent] == [
        function,
        {**function, "strict": True},
        {"name": "g", "parameters": {"type": "object", "properties": {}}},
    ]
    assert {tool["type"] for tool in sent} == {"function"}


@pytest.mark.parametrize("kind", ["web_search_20250305", "bash_20250124", "computer_20250124", "mcp_toolset"])
def test_tools_of_anthropics_own_are_refused(kind: str) -> None:
    assert problem(tools=[TOOL, {"type": kind, "name": "x"}]).startswith(f"tools.1: '{kind}' is a tool of ")


@pytest.mark.parametrize(
    ("choice", "sent"),
    [
        ({"type": "auto"}, {"tool_choice": "auto"}),
        ({"type": "any"}, {"tool_choice": "required"}),
        ({"type": "none"}, {"tool_choice": "none"}),
        ({"type": "tool", "name": "f"}, {"tool_choice": {"type": "function", "function": {"name": "f"}}}),
        (
            {"type": "auto", "disable_parallel_tool_use": True},
            {"tool_choice": "auto", "parallel_tool_calls": False},
        ),
        (
            {"type": "any", "disable_parallel_tool_use": False},
            {"tool_choice": "required", "parallel_tool_calls": True},
        ),
        (None, {}),
    ],
)
def test_tool_choice(choice: object, sent: dict[str, Any]) -> None:
    body = translated(tools=[TOOL], tool_choice=choice)
    assert {name: body[name] for name in ("tool_choice", "parallel_tool_calls") if name in body} == sent
    # OpenAI: "tool_choice is only allowed when tools are specified".
    assert translated(tool_choice=choice, tools=[]) == translated()


# --- structured output ---------------------------------------------------------------------------

CLOSED = {"type": "object", "properties": {"a": {}}, "required": ["a"], "additionalProperties": False}


def test_structured_output() -> None:
    format_ = {"type": "json_schema", "schema": CLOSED}
    expected = {"type": "json_schema", "json_schema": {"name": "answer", "schema": CLOSED, "strict": True}}
    assert translated(output_config={"format": format_})["response_format"] == expected
    assert translated(output_format=format_)["response_format"] == expected
    other = {"type": "json_schema", "schema": {"type": "string"}}
    both = translated(output_config={"format": format_}, output_format=other)
    assert both["response_format"] == expected
    assert "response_format" not in translated(output_config={"effort": "low"})


@pytest.mark.parametrize(
    ("schema", "strict"),
    [
        (CLOSED, True),
        ({"type": "array", "items": CLOSED}, True),
        ({"$defs": {"x": CLOSED}, "anyOf": [{"$ref": "#/$defs/x"}]}, True),
        ({**CLOSED, "required": []}, False),
        ({**CLOSED, "additionalProperties": True}, False),
        ({"type": "object"}, False),
        ({"type": ["object", "null"]}, False),
        ({"anyOf": [CLOSED, {"properties": {}}]}, False),
        ({"type": "string", "enum": ["a"], "const": {"type": "object"}}, True),
    ],
)
def test_only_what_openai_takes_is_strict(schema: dict[str, Any], strict: bool) -> None:
    assert is_strict(schema) is strict


# --- thinking ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "effort", "openrouter"),
    [
        ({}, None, None),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "low", {"max_tokens": 1024}),
        ({"thinking": {"type": "enabled", "budget_tokens": 8000}}, "medium", {"max_tokens": 8000}),
        ({"thinking": {"type": "enabled", "budget_tokens": 32000}}, "high", {"max_tokens": 32000}),
        ({"thinking": {"type": "adaptive"}}, None, {"enabled": True}),
        ({"thinking": {"type": "disabled"}}, "low", {"enabled": False}),
        ({"output_config": {"effort": "medium"}}, "medium", {"effort": "medium"}),
        ({"output_config": {"effort": "max"}, "thinking": {"type": "adaptive"}}, "high", {"effort": "high"}),
        ({"output_config": {"effort": "new"}}, None, None),
    ],
)
def test_thinking(fields: dict[str, Any], effort: str | None, openrouter: dict[str, Any] | None) -> None:
    assert translated(**fields) == translated()
    assert (
        translated(**fields, dialect=Dialect(reasoning="reasoning_effort")).get("reasoning_effort") == effort
    )
    assert translated(**fields, dialect=Dialect(reasoning="reasoning")).get("reasoning") == openrouter


# --- dialects ------------------------------------------------------------------------------------


def dialect(url: str, model: str = "m", **options: Any) -> Dialect:
    return dialect_of(OpenaiOptions.model_validate({"name": "p", "base_url": url, **options}))(model)


def test_openai_takes_max_completion_tokens() -> None:
    assert translated(dialect=dialect("https://api.openai.com/v1", "gpt-4.1"))["max_completion_tokens"] == 9
    assert dialect("https://api.openai.com/v1", "gpt-4.1").reasoning == "none"


@pytest.mark.parametrize("model", ["o3", "o1-mini", "gpt-5-nano", "openai/gpt-5"])
def test_models_that_think_wherever_they_are(model: str) -> None:
    found = dialect("http://127.0.0.1:9/v1", model)
    assert (found.max_tokens_field, found.reasoning) == ("max_completion_tokens", "reasoning_effort")


@pytest.mark.parametrize("model", ["llama3", "o", "gpt-4o", "mistral-o1"])
def test_others(model: str) -> None:
    assert dialect("http://127.0.0.1:9/v1", model) == Dialect()


def test_open_weights_take_an_effort() -> None:
    assert dialect("http://127.0.0.1:9/v1", "openai/gpt-oss-20b") == Dialect(reasoning="reasoning_effort")


def test_azure_is_known_by_its_host() -> None:
    found = dialect("https://x.openai.azure.com/openai/deployments/d?api-version=2024-10-21")
    assert (found.auth, found.max_tokens_field) == ("api-key", "max_completion_tokens")
    assert dialect("https://openai.azure.com.example.org").auth == "bearer"


def test_others_by_host() -> None:
    assert dialect("https://openrouter.ai/api/v1", "openai/gpt-5").reasoning == "reasoning"
    assert not dialect("https://api.mistral.ai/v1").stream_usage
    assert not dialect("https://api.groq.com/openai/v1").counts
    assert dialect("https://api.deepseek.com").reasoning_history == "reasoning_content"


def test_what_is_configured_wins() -> None:
    found = dialect(
        "https://openrouter.ai/api/v1",
        "o3",
        auth="api-key",
        max_tokens_field="max_tokens",
        reasoning="none",
        reasoning_history="none",
        stream_usage=False,
    )
    assert found == Dialect(auth="api-key", stream_usage=False, counts=False)
