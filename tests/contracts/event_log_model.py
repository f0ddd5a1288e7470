"""An event log as simple as it can be said, and random operations on it and on a real one alike."""

from dataclasses import dataclass, replace

import pytest
from hypothesis import strategies as st

from events.errors import DuplicateKeyError, EventsError, IllegalTransition, SequenceConflict
from events.log.base import EventLog, JobFilter
from events.projections import JobSnapshot, project
from events.state import JobState, project_state
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
    NextStep,
)

FAILURE = Failure(529, "overloaded_error", "try again", (("retry-after", "5"),))
RESULT_TTL_S = 100.0


def accepted(
    at: float,
    *,
    owner: str = "ann",
    model: str = "m",
    detached: bool = True,
    ttl_s: float = RESULT_TTL_S,
    key: str | None = None,
) -> JobAccepted:
    return JobAccepted(
        at=at,
        owner=owner,
        model=model,
        mode=Mode.ASYNC if detached else Mode.STREAM,
        body=b'{"the": "body"}',
        detached=detached,
        result_ttl_s=ttl_s if detached else 0.0,
        headers=(("anthropic-beta", "x"),),
        request_id="req_1",
        idempotency_key=key,
    )


def started(at: float, attempt: int) -> AttemptStarted:
    return AttemptStarted(at=at, attempt=attempt, provider="p", upstream_model="u", key_name="k")


def completed(at: float, attempt: int) -> JobCompleted:
    usage = {"input_tokens": 3, "output_tokens": 5}
    return JobCompleted(at=at, attempt=attempt, message=b'{"id": "msg_1"}', usage=usage)


def failed(at: float) -> JobFailed:
    return JobFailed(at=at, failure=FAILURE, usage={"input_tokens": 3})


@dataclass(frozen=True)
class Operation:
    """Something done to one job."""

    job_id: str
    kind: str
    off_by: int = 0
    """How far the expected seq is from the right one."""
    owner: str = "ann"
    model: str = "m"
    detached: bool = True
    key: str | None = None
    frames: tuple[bytes, ...] = (b"f",)
    deferred: bool = False
    """Where that is allowed: for a job that is attached."""


ADVANCE = {None: "accept", JobState.PENDING: "start", JobState.PROCESSING: "frames"}
KINDS = (
    # Left to chance alone, few jobs would get anywhere.
    ["advance"] * 12
    + ["accept", "start", "frames", "attempt-failed", "complete", "complete", "fail", "cancel", "detach"]
    + ["expire", "redact", "forget"]
)
OPERATIONS = st.builds(
    Operation,
    job_id=st.sampled_from(["job-1", "job-2", "job-3", "job-4"]),
    kind=st.sampled_from(KINDS),
    off_by=st.sampled_from([0] * 18 + [-1, 1]),
    owner=st.sampled_from(["ann", "bob"]),
    model=st.sampled_from(["m", "n"]),
    detached=st.booleans(),
    key=st.sampled_from([None, None, "k"]),
    frames=st.lists(st.binary(min_size=1, max_size=6), min_size=1, max_size=3).map(tuple),
    deferred=st.booleans(),
)


class LogModel:
    """Jobs in the order they were accepted, each a list of events."""

    def __init__(self) -> None:
        self.jobs: dict[str, list[Event]] = {}
        self.redacted: set[str] = set()

    def shown(self, job_id: str) -> list[Event]:
        """The events as they can be read."""
        events = self.jobs.get(job_id, [])
        return [_without_content(event) for event in events] if self._has_no_content(job_id) else events

    def _has_no_content(self, job_id: str) -> bool:
        return job_id in self.redacted or self.state(job_id) is JobState.EXPIRED

    def state(self, job_id: str) -> JobState | None:
        return project_state(self.jobs.get(job_id, []))

    def snapshot(self, job_id: str) -> JobSnapshot:
        return project(job_id, self.shown(job_id))

    def _snapshots(self) -> list[JobSnapshot]:
        return [self.snapshot(job_id) for job_id in self.jobs]

    def unfinished(self) -> list[JobSnapshot]:
        return [job for job in self._snapshots() if not job.ended]

    def kept(self) -> list[JobSnapshot]:
        """Those whose result can be read."""
        return [
            job
            for job in self._snapshots()
            if job.ended and job.detached and job.state is not JobState.EXPIRED
        ]

    def listed(self, where: JobFilter) -> list[JobSnapshot]:
        """A page as long as it takes."""
        return [
            job
            for job in reversed(self._snapshots())
            if job.state is not JobState.EXPIRED
            and where.owner in (None, job.owner)
            and where.model in (None, job.model)
            and (where.states is None or job.state in where.states)
        ]

    def attempts(self, job_id: str) -> int:
        return sum(isinstance(event, AttemptStarted) for event in self.jobs.get(job_id, []))

    def frames(self, job_id: str, attempt: int) -> list[bytes]:
        """All frames of an attempt that can be read."""
        runs = (event for event in self.shown(job_id) if isinstance(event, FramesReceived))
        return [frame for run in runs if run.attempt == attempt for frame in run.frames]

    def holder(self, owner: str, key: str | None) -> str | None:
        """The job that holds the key."""
        for job_id, events in self.jobs.items():
            first = events[0]
            if (
                isinstance(first, JobAccepted)
                and key is not None
                and (first.owner, first.idempotency_key) == (owner, key)
                and self.state(job_id) is not JobState.EXPIRED
            ):
                return job_id
        return None

    def refusal(self, job_id: str, event: Event, expected_seq: int) -> type[EventsError] | None:
        """What an append of ``event`` raises."""
        events = self.jobs.get(job_id, [])
        if expected_seq != len(events):
            return SequenceConflict
        try:
            project_state([*events, event])
        except IllegalTransition:
            return IllegalTransition
        if isinstance(event, JobAccepted) and self.holder(event.owner, event.idempotency_key):
            return DuplicateKeyError
        return None


def _without_content(event: Event) -> Event:
    match event:
        case JobAccepted():
            return replace(event, body=b"")
        case FramesReceived():
            return replace(event, frames=())
        case JobCompleted():
            return replace(event, message=b"")
        case _:
            return event


def _event_of(operation: Operation, attempt: int, at: float) -> Event:
    match operation.kind:
        case "accept":
            return accepted(
                at,
                owner=operation.owner,
                model=operation.model,
                detached=operation.detached,
                key=operation.key,
            )
        case "start":
            return started(at, attempt + 1)
        case "attempt-failed":
            return AttemptFailed(at=at, attempt=max(attempt, 1), failure=FAILURE, next=NextStep.RETRY)
        case "complete":
            return completed(at, max(attempt, 1))
        case "fail":
            return failed(at)
        case "cancel":
            return JobCancelled(at=at, by="ann", reason="had enough")
        case "detach":
            return JobDetached(at=at, result_ttl_s=7.0)
        case "expire":
            return JobExpired(at=at)
        case _:
            raise AssertionError(operation.kind)


async def perform(log: EventLog, model: LogModel, operation: Operation, *, at: float) -> None:
    """Do the same to both; the log refuses what the model refuses, and nothing else."""
    job_id = operation.job_id
    events = model.jobs.get(job_id, [])
    expected_seq = len(events) + operation.off_by
    if operation.kind == "advance":
        operation = replace(operation, kind=ADVANCE.get(model.state(job_id), "expire"))
    match operation.kind:
        case "forget":
            await log.forget(job_id)
            model.jobs.pop(job_id, None)
            model.redacted.discard(job_id)
            return
        case "redact":
            snapshot = model.snapshot(job_id) if events else None
            # A job is redacted once it has ended: what a running one would go on with is not promised.
            if snapshot is None or snapshot.ended:
                await log.redact(job_id)
                model.redacted.add(job_id)
            if snapshot is None:
                model.redacted.discard(job_id)
            return
        case "frames":
            await _perform_frames(log, model, operation, expected_seq, at)
            return
    event = _event_of(operation, model.attempts(job_id), at)
    refusal = model.refusal(job_id, event, expected_seq)
    attached = not (model.snapshot(job_id).detached if events else operation.detached)
    deferred = operation.deferred and attached and operation.kind != "detach"
    if refusal is not None:
        with pytest.raises(refusal):
            # The id of a new job must be one that was never used.
            await log.append(job_id, [event], expected_seq, deferred=deferred and operation.kind != "accept")
        return
    assert await log.append(job_id, [event], expected_seq, deferred=deferred) == expected_seq + 1
    model.jobs.setdefault(job_id, []).append(event)


async def _perform_frames(
    log: EventLog, model: LogModel, operation: Operation, expected_seq: int, at: float
) -> None:
    job_id = operation.job_id
    if job_id not in model.jobs:
        return
    attempt = model.attempts(job_id)
    first = len(model.frames(job_id, attempt)) + 1
    run = FramesReceived(at=at, attempt=max(attempt, 1), first=first, frames=operation.frames)
    refusal = model.refusal(job_id, run, expected_seq)
    write = log.append_frames(job_id, attempt, operation.frames, expected_seq, at)
    if refusal is not None:
        with pytest.raises(refusal):
            await write
        return
    assert await write == expected_seq + 1
    model.jobs[job_id].append(run)
