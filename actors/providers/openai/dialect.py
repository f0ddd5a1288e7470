"""How the providers that speak Chat Completions differ, by the host of the base URL and the model's name.

Sources: the API references of OpenAI (platform.openai.com/docs/api-reference/chat), Azure OpenAI
(learn.microsoft.com/azure/ai-services/openai/reference), OpenRouter
(openrouter.ai/docs/use-cases/reasoning-tokens), Mistral (docs.mistral.ai/api), DeepSeek
(api-docs.deepseek.com), Groq (console.groq.com/docs/reasoning) and Gemini
(ai.google.dev/gemini-api/docs/openai).
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from actors.providers.options import OpenaiOptions

ReasoningField = Literal["none", "reasoning_effort", "reasoning"]

_OPENAI_THINKS = re.compile(r"(?:.*/)?(?:o[1-9](?:-|$)|gpt-5)")
"""OpenAI's own models that think, wherever they are served: they refuse ``max_tokens``."""
_TAKES_EFFORT = re.compile(rf"{_OPENAI_THINKS.pattern}|(?:.*/)?gpt-oss")


@dataclass(frozen=True, slots=True)
class Dialect:
    """What one upstream understands."""

    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    reasoning: ReasoningField = "none"
    """``reasoning_effort`` takes a word; ``reasoning`` is OpenRouter's object."""
    reasoning_history: str = ""
    """The field of an assistant message in which its reasoning is sent back; empty: it is not."""
    stream_usage: bool = True
    """Whether ``stream_options`` may be sent. Who refuses it sends usage unasked."""
    takes_user: bool = True
    short_call_ids: bool = False
    """Ids of tool calls have exactly nine letters or digits."""
    auth: Literal["bearer", "api-key"] = "bearer"
    counts: bool = True
    """Whether it may have a token counter of those that are known."""


_ANY = Dialect()
_OPENAI = Dialect(max_tokens_field="max_completion_tokens", counts=False)
_AZURE = replace(_OPENAI, auth="api-key")
# By the end of the host's name.
_BY_HOST: tuple[tuple[str, Dialect], ...] = (
    (".api.openai.com", _OPENAI),
    (".openai.azure.com", _AZURE),
    (".cognitiveservices.azure.com", _AZURE),
    (".services.ai.azure.com", _AZURE),
    (".openrouter.ai", Dialect(reasoning="reasoning", reasoning_history="reasoning", counts=False)),
    (".api.mistral.ai", Dialect(stream_usage=False, takes_user=False, short_call_ids=True, counts=False)),
    (".api.groq.com", Dialect(counts=False)),
    (".api.deepseek.com", Dialect(reasoning_history="reasoning_content", counts=False)),
    (
        ".generativelanguage.googleapis.com",
        Dialect(reasoning="reasoning_effort", takes_user=False, counts=False),
    ),
)


def dialect_of(options: OpenaiOptions) -> Callable[[str], Dialect]:
    """The dialect of an upstream for each of its models: by host and name; what is configured wins."""
    host = options.base_url.host or ""
    known = (dialect for suffix, dialect in _BY_HOST if f".{host}".endswith(suffix))
    base = _configured(next(known, _ANY), options)

    def of(model: str) -> Dialect:
        dialect = base
        if options.max_tokens_field == "auto" and _OPENAI_THINKS.match(model):
            dialect = replace(dialect, max_tokens_field="max_completion_tokens")
        if options.reasoning == "auto" and base.reasoning == "none" and _TAKES_EFFORT.match(model):
            dialect = replace(dialect, reasoning="reasoning_effort")
        return dialect

    return of


def _configured(dialect: Dialect, options: OpenaiOptions) -> Dialect:
    if options.auth != "auto":
        dialect = replace(dialect, auth=options.auth)
    if options.max_tokens_field != "auto":
        dialect = replace(dialect, max_tokens_field=options.max_tokens_field)
    if options.reasoning != "auto":
        dialect = replace(dialect, reasoning=options.reasoning)
    if options.reasoning_history != "auto":
        dialect = replace(dialect, reasoning_history=options.reasoning_history.replace("none", ""))
    if options.stream_usage is not None:
        dialect = replace(dialect, stream_usage=options.stream_usage)
    return dialect
