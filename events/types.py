"""The events of a job, in the past tense: what happened, never what should.

Every event is frozen and checked at construction. A stored event adds what only the log can give:
the job it belongs to and its ``seq`` (1, 2, 3... per job).

Moments (``at``) are Unix seconds as float; durations end in ``_s``; sizes in ``_bytes``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

Headers = tuple[tuple[str, str], ...]
"""Header fields in the order they came, names in lower case."""

Usage = Mapping[str, Any]
"""The ``usage`` object of a Message, unknown fields kept."""


class Mode(StrEnum):
    """How the job was asked for (see the table in README)."""

    PLAIN = "plain"
    STREAM = "stream"
    ASYNC = "async"
    BATCH = "batch"


class NextStep(StrEnum):
    """What follows a failed attempt."""

    RETRY = "retry"
    FALL_BACK = "fall_back"
    GIVE_UP = "give_up"


@dataclass(frozen=True, slots=True)
class Failure:
    """An error exactly as the client will see it (status, type and text of the envelope)."""

    status: int
    type: str
    message: str
    headers: Headers = ()
    """Headers that travel with the error: ``retry-after``, ``anthropic-ratelimit-*`` and the like."""

    def __post_init__(self) -> None:
        if not 400 <= self.status <= 599:
            raise ValueError(f"a failure has an error status, not {self.status}")


@dataclass(frozen=True, slots=True, kw_only=True)
class JobAccepted:
    """The daemon has taken the job on. First event of every job, committed before the client hears of it."""

    at: float
    owner: str
    """Name of the key that submitted it; empty for an anonymous caller."""
    model: str
    """As the client asked for it."""
    mode: Mode
    body: bytes
    """The client's bytes. Empty once redacted."""
    detached: bool = False
    """True: belongs to nobody's connection (async, batch, ``x-bf-detach``) and runs to its end."""
    result_ttl_s: float = 0.0
    """How long a kept result stays readable, from its terminal event."""
    headers: Headers = ()
    """``anthropic-*`` headers, forwarded upstream. Never a credential."""
    request_id: str = ""
    may_rerun: bool = True
    """False (``x-bf-async-retry: never``): rather fail than be run again after a restart."""
    idempotency_key: str | None = None
    body_sha256: str | None = None
    """Hex digest of the body, where there is an idempotency key: it outlives the body."""
    batch_id: str | None = None
    custom_id: str | None = None
    """What the client calls it within its batch."""
    webhook: str | None = None
    """Name of the webhook endpoint that is told how it ends."""

    def __post_init__(self) -> None:
        if self.result_ttl_s < 0:
            raise ValueError("result_ttl_s is not negative")


@dataclass(frozen=True, slots=True, kw_only=True)
class JobDetached:
    """A watched job was cut loose from its connection (``Prefer: wait`` ran out): it now runs to its end."""

    at: float
    result_ttl_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptStarted:
    """The upstream is about to be called."""

    at: float
    attempt: int
    provider: str
    upstream_model: str
    key_name: str = ""
    """Name of the provider key in use. Never the key."""

    def __post_init__(self) -> None:
        if self.attempt < 1:
            raise ValueError("attempts count from 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class FramesReceived:
    """A run of upstream frames, in order, as they came in one read."""

    at: float
    attempt: int
    first: int
    """Number of the first frame of this run within its attempt, from 1."""
    frames: tuple[bytes, ...]
    """Whole SSE frames as sent to watchers, blank line included. Empty once redacted."""
    count: int = 0
    """How many frames the run had; outlives redaction."""

    def __post_init__(self) -> None:
        if self.first < 1:
            raise ValueError("frames count from 1")
        if self.count == 0:
            object.__setattr__(self, "count", len(self.frames))
        if self.count < 1:
            raise ValueError("a run has at least one frame")
        if self.frames and self.count != len(self.frames):
            raise ValueError("count is the number of frames")

    @property
    def last(self) -> int:
        """Number of the last frame of this run."""
        return self.first + self.count - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptFailed:
    """An attempt ended without a Message."""

    at: float
    attempt: int
    failure: Failure
    next: NextStep
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class JobCompleted:
    """The job has its Message. Terminal."""

    at: float
    attempt: int
    message: bytes
    """The Message as JSON. Empty once redacted, and for an attached stream (its watchers had the frames)."""
    usage: Usage = field(default_factory=dict)
    upstream_request_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFailed:
    """The job ended with an error. Terminal."""

    at: float
    failure: Failure
    usage: Usage = field(default_factory=dict)
    """What is known to have been used before it failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobCancelled:
    """The job was stopped before its end. Terminal."""

    at: float
    by: str
    """``client`` (the last watcher left) or the name of the principal who asked (empty: anonymous)."""
    reason: str
    usage: Usage = field(default_factory=dict)
    lapsed: bool = False
    """Nobody asked for it: the time of its batch was up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobExpired:
    """The result is gone: its time to live has passed, or it was deleted."""

    at: float


Event = (
    JobAccepted
    | JobDetached
    | AttemptStarted
    | FramesReceived
    | AttemptFailed
    | JobCompleted
    | JobFailed
    | JobCancelled
    | JobExpired
)
Terminal = JobCompleted | JobFailed | JobCancelled


@dataclass(frozen=True, slots=True)
class StoredEvent:
    """An event as the log holds it."""

    job_id: str
    seq: int
    """1, 2, 3... per job, without holes."""
    event: Event

    @property
    def at(self) -> float:
        """When it happened, Unix seconds."""
        return self.event.at
