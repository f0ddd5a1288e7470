"""The tables of ``messagesd.toml``, one class each. Sizes are in bytes, durations in seconds."""

import hashlib
import ipaddress
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    HttpUrl,
    SecretStr,
    ValidationInfo,
    field_validator,
    model_validator,
)

from actors.providers.options import Delay, Name, Seconds
from service.settings_sources import Location

Count = Annotated[int, Field(ge=1)]
Text = Annotated[str, Field(min_length=1)]

MAX_TARGETS = 32
"""Of one route, and as many fallbacks."""

_REFUSED_LOGS = {
    "redis": "redis:// is not in this version: use memory:// or sqlite:///PATH",
    "rediss": "rediss:// is not in this version: use memory:// or sqlite:///PATH",
}


class FieldError(ValueError):
    """What is wrong with one field, possibly several things, each with its location below that field."""

    def __init__(self, problems: Sequence[tuple[Location, str]]) -> None:
        super().__init__("; ".join(message for _, message in problems))
        self.problems = problems


def is_loopback(host: str) -> bool:
    """Whether ``host`` can be reached from this machine only. A name other than ``localhost`` cannot tell."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def key_hash(key: str) -> str:
    """What the configuration holds of a key: ``sha256:<hex>``."""
    return f"sha256:{hashlib.sha256(key.encode()).hexdigest()}"


def check_log_url(url: str) -> str:
    """Return ``url`` if an adapter serves it. Raises ValueError, saying what is missing."""
    scheme, separator, _ = url.partition("://")
    if refusal := _REFUSED_LOGS.get(scheme):
        raise ValueError(refusal)
    if not separator or scheme not in ("memory", "sqlite"):
        raise ValueError("not a log URL: use memory:// or sqlite:///PATH")
    if scheme == "memory" and url != "memory://":
        raise ValueError("memory:// takes nothing after it")
    if scheme == "sqlite" and sqlite_path(url) is None:
        raise ValueError("sqlite:// is followed by a slash and a path, for example sqlite:///events.db")
    return url


def sqlite_path(url: str) -> Path | None:
    """The file of a ``sqlite:///PATH`` URL (``sqlite:////var/...`` is absolute); None for another URL."""
    rest = url.removeprefix("sqlite:///")
    return Path(rest) if rest and rest != url else None


def _check_host(host: str) -> str:
    host = host.strip().removeprefix("[").removesuffix("]")
    if not re.fullmatch(r"[A-Za-z0-9._:%-]+", host):
        raise ValueError("not a host name or an IP address")
    return host


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class ServerSettings(_Section):
    """``[server]``: the listening socket and the bounds of the wire."""

    host: Annotated[str, AfterValidator(_check_host)] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8080
    """0 takes a free one."""
    public_url: HttpUrl | None = None
    """How clients reach this gateway, for absolute URLs in answers. Default: the request's own host."""
    max_body_bytes: Count = 32 * 1024 * 1024
    max_header_bytes: Annotated[int, Field(ge=1024)] = 64 * 1024
    """Of one request: request line and header fields together."""
    body_timeout_s: Seconds = 300.0
    """For a request body to arrive in full."""
    send_timeout_s: Annotated[float, Field(ge=1, le=86400, allow_inf_nan=False)] = 30.0
    """How long a peer may take nothing of what was sent before its connection is dropped."""
    keep_alive_timeout_s: Seconds = 75.0
    backlog: Count = 2048


class AuthSettings(_Section):
    """``[auth]``."""

    allow_anonymous: bool = False
    """Serve callers without a key even where keys are configured, or beyond loopback."""


class JobsSettings(_Section):
    """``[jobs]``: bounds of the work."""

    result_ttl_s: Seconds = 3600.0
    """How long a kept result can be read, where the client does not say."""
    max_result_ttl_s: Seconds = 604_800.0
    max_in_flight: Count = 10_000
    drain_s: Delay = 30.0
    """How long running work may go on after SIGTERM."""
    max_snapshot_bytes: Count = 1024**3
    """Of kept results. When it is reached, new jobs that would keep one are refused."""
    max_wait_s: Seconds = 600.0
    """Upper bound of ``Prefer: wait``."""
    attached_history: Annotated[int, Field(ge=0)] = 1000
    """Records (without content) kept of ended jobs that belonged to a connection."""
    subscriber_buffer: Count = 64
    """Runs of frames held per watcher before it reads from the log."""
    max_attempts: Count = 3
    """Attempts at one job, those that a restart cut off included."""
    max_resumed: Count = 100
    """Jobs of an earlier process at work at once; the others wait their turn."""
    heartbeat_s: Seconds = 15.0
    """Silence on a stream before a ``ping`` is sent."""

    @field_validator("max_result_ttl_s")
    @classmethod
    def _holds_the_default(cls, value: float, info: ValidationInfo) -> float:
        if value < info.data.get("result_ttl_s", 0.0):
            raise ValueError("is less than jobs.result_ttl_s")
        return value


class BatchesSettings(_Section):
    """``[batches]``: bounds of Message Batches."""

    max_body_bytes: Count = 256 * 1024 * 1024
    """Of a batch's upload; each of its requests is bounded by ``server.max_body_bytes``."""
    upload_timeout_s: Seconds = 1800.0
    """For an upload to arrive in full."""
    max_requests: Count = 100_000
    """In one batch."""
    max_open: Count = 1000
    """Batches that have not ended. Beyond it new ones are refused."""
    max_running: Count = 64
    """Items of all batches at work at once. None is begun while ``jobs.max_in_flight`` other jobs are."""
    max_running_per_batch: Count = 16
    result_ttl_s: Seconds = 29 * 86400.0
    """How long an ended batch and its results can be read."""


class LogSettings(_Section):
    """``[log]``: where events are kept."""

    url: Annotated[str, AfterValidator(check_log_url)] = "memory://"
    history_s: Delay = 604_800.0
    """How long a durable log keeps the events of a job after its result is gone."""
    store_bodies: bool = True
    """False: a durable log drops a job's content (request, frames, Message) once its result was read.

    Read is what answered a plain call or a poll in full; a stream does not count. Until then, and at most for
    its time to live, the content stays: without its request an interrupted job could not run again.
    """


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


class LoggingSettings(_Section):
    """``[logging]``: what is printed on standard error."""

    level: Annotated[Literal["debug", "info", "warning", "error", "critical"], BeforeValidator(_lower)] = (
        "info"
    )
    format: Literal["auto", "console", "json"] = "auto"
    """``auto``: console on a terminal, JSON otherwise."""


class KeySettings(_Section):
    """``[[keys]]``: who may call. Only the hash of a key is held; ``key = "..."`` is hashed when read."""

    name: Name
    hash: SecretStr
    blocked: bool = False
    admin: bool = False
    """Sees every owner's jobs."""
    models: tuple[Text, ...] = ()
    """Globs of the models it may ask for; none: all of them."""

    @model_validator(mode="before")
    @classmethod
    def _hash_the_key(cls, data: object) -> object:
        if not isinstance(data, Mapping):
            return data
        if "key" in data and "hash" in data:
            raise ValueError("give either key or hash, not both")
        if "key" not in data:
            if "hash" not in data:
                raise ValueError("key or hash is required")
            return data
        key = data["key"]
        text = key.get_secret_value() if isinstance(key, SecretStr) else key
        # What cannot stand in a header field could never be sent.
        if not isinstance(text, str) or not re.fullmatch(r"[\x21-\x7e]+", text):
            raise FieldError([(("key",), "a key is printable ASCII without spaces")])
        return {name: value for name, value in data.items() if name != "key"} | {"hash": key_hash(text)}

    @field_validator("hash")
    @classmethod
    def _is_sha256(cls, value: SecretStr) -> SecretStr:
        text = value.get_secret_value().lower()
        if not re.fullmatch(r"sha256:[0-9a-f]{64}", text):
            raise ValueError('not "sha256:" and 64 hexadecimal digits')
        return SecretStr(text)

    @property
    def digest(self) -> bytes:
        """The SHA-256 of the key, 32 bytes."""
        return bytes.fromhex(self.hash.get_secret_value().removeprefix("sha256:"))


class RetriesSettings(_Section):
    """``[retries]``: what is done when an attempt at an upstream fails."""

    max_attempts: Count = 6
    """Failed attempts at one job, over all its targets and over restarts. 1: nothing is tried again."""
    max_retries: Annotated[int, Field(ge=0)] = 2
    """At one target, after its first try; then the next target's turn comes."""
    total_s: Delay = 300.0
    """No attempt begins later than this after the job's first one."""
    backoff_s: Delay = 0.5
    """Upper end of the first wait, which is drawn from 0 up; it doubles with every try at a target."""
    max_backoff_s: Delay = 8.0
    max_retry_after_s: Delay = 30.0
    """A target that asks for a longer wait (``retry-after``) is not waited for."""


class CircuitsSettings(_Section):
    """``[circuits]``: when a target (a provider and a model there) is left alone."""

    failures: Count = 10
    """In a row, that speak of the target's health."""
    open_s: Seconds = 30.0
    """Then nothing is sent there for so long, and after that a single probe."""


class TargetSettings(_Section):
    """One of the targets of a route."""

    provider: Name
    rename: Text | None = None
    """What this upstream calls the model. Default: as the client does."""
    weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Its share of the first tries, in proportion to the others'. 0: tried after them, in order."""


class RouteSettings(_Section):
    """``[[routes]]``: which providers answer which models. The first match wins."""

    model: Text
    """A glob over the model as the client names it."""
    provider: Name | None = None
    rename: Text | None = None
    """What the upstream calls the model. Default: as the client does."""
    targets: Annotated[tuple[TargetSettings, ...], Field(max_length=MAX_TARGETS)] = ()
    """In place of ``provider`` and ``rename``: several, in the order of trying."""
    fallbacks: Annotated[tuple[Text, ...], Field(max_length=MAX_TARGETS)] = ()
    """Tried in order when those before gave up: ``PROVIDER/MODEL``, or ``PROVIDER`` for the same model."""

    @model_validator(mode="after")
    def _leads_somewhere(self) -> "RouteSettings":
        if (self.provider is None) is (not self.targets):
            raise ValueError("give either provider or targets")
        if self.targets and self.rename is not None:
            raise ValueError("rename belongs into each of the targets")
        return self

    @property
    def tried(self) -> tuple[TargetSettings, ...]:
        """Its targets, fallbacks aside, however they are written."""
        if self.provider is None:
            return self.targets
        return (TargetSettings(provider=self.provider, rename=self.rename),)
