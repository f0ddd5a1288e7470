"""Folds of a job's events into what people ask about: where it stands, what it used, how it ended."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from events.state import ENDED, JobState, next_state
from events.types import (
    AttemptFailed,
    AttemptStarted,
    Event,
    Failure,
    FramesReceived,
    JobAccepted,
    JobCancelled,
    JobCompleted,
    JobDetached,
    JobExpired,
    JobFailed,
    Mode,
    Terminal,
    Usage,
)

_Later = JobDetached | AttemptStarted | FramesReceived | AttemptFailed | Terminal | JobExpired


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSnapshot:
    """A job as its events tell it, up to one of them. Moments are Unix seconds."""

    job_id: str
    owner: str
    model: str
    mode: Mode
    state: JobState
    detached: bool
    result_ttl_s: float
    created_at: float
    last_seq: int = 1
    started_at: float | None = None
    """When the first attempt began."""
    ended_at: float | None = None
    expires_at: float | None = None
    """When the result goes; for an attached job, which keeps none, the moment it ended."""
    attempt: int = 0
    """The newest attempt; 0 before the first."""
    frames: int = 0
    """How many frames the newest attempt has received."""
    usage: Usage = field(default_factory=dict)
    failure: Failure | None = None
    """Why it failed, or was cancelled; while it runs, why the last attempt failed."""
    message: bytes = b""
    """The Message of a completed job that keeps its result."""
    request_id: str = ""
    may_rerun: bool = True
    batch_id: str | None = None
    custom_id: str | None = None
    webhook: str | None = None
    lapsed: bool = False
    """Cancelled because the time of its batch was up."""

    @property
    def ended(self) -> bool:
        """Whether a terminal event was seen."""
        return self.state in ENDED


def cancelled_failure(event: JobCancelled) -> Failure:
    """What a cancelled job answers to whoever asks for its result."""
    return Failure(409, "conflict_error", f"the job was cancelled: {event.reason}")


def apply(snapshot: JobSnapshot | None, job_id: str, event: Event) -> JobSnapshot:
    """One step of the fold. Raises IllegalTransition and returns nothing for an event out of turn."""
    state = next_state(snapshot.state if snapshot else None, event)
    if isinstance(event, JobAccepted):
        return JobSnapshot(
            job_id=job_id,
            owner=event.owner,
            model=event.model,
            mode=event.mode,
            state=state,
            detached=event.detached,
            result_ttl_s=event.result_ttl_s,
            created_at=event.at,
            request_id=event.request_id,
            may_rerun=event.may_rerun,
            batch_id=event.batch_id,
            custom_id=event.custom_id,
            webhook=event.webhook,
        )
    if snapshot is None:
        raise AssertionError("next_state lets nothing but JobAccepted come first")
    return replace(snapshot, state=state, last_seq=snapshot.last_seq + 1, **_changes(snapshot, event))


def _changes(now: JobSnapshot, event: _Later) -> dict[str, Any]:
    """The fields that the event changes, ``state`` and ``last_seq`` aside."""
    match event:
        case FramesReceived():
            return {"frames": event.last}
        case AttemptStarted():
            started_at = event.at if now.started_at is None else now.started_at
            return {"attempt": event.attempt, "frames": 0, "started_at": started_at}
        case AttemptFailed():
            return {"failure": event.failure}
        case JobDetached():
            return {"detached": True, "result_ttl_s": event.result_ttl_s}
        case JobExpired():
            return {"message": b"", "expires_at": event.at}
        case _:
            kept_s = now.result_ttl_s if now.detached else 0.0
            return _result(event) | {
                "ended_at": event.at,
                "expires_at": event.at + kept_s,
                "usage": event.usage,
            }


def _result(event: Terminal) -> dict[str, Any]:
    match event:
        case JobCompleted():
            return {"message": event.message, "failure": None}
        case JobFailed():
            return {"failure": event.failure}
        case JobCancelled():
            return {"failure": cancelled_failure(event), "lapsed": event.lapsed}


def project(job_id: str, events: Iterable[Event]) -> JobSnapshot:
    """Fold a job's whole history. Raises ValueError for an empty one, IllegalTransition for a bad one."""
    snapshot: JobSnapshot | None = None
    for event in events:
        snapshot = apply(snapshot, job_id, event)
    if snapshot is None:
        raise ValueError("a job has at least one event")
    return snapshot
