"""What is submitted, what comes of it, and what bounds it."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from uuid_utils import uuid7

from actors.broadcast import Subscription
from actors.errors import JobConflictError
from actors.job import JobActor
from actors.providers.base import ProviderCall
from actors.targets import Course
from actors.work import Watch, attempt_started
from events.log.base import FrameCursor
from events.projections import JobSnapshot
from events.state import JobState
from events.types import Event, Headers, JobAccepted, Mode


def new_job_id() -> str:
    """An id that no job has: a UUID that begins with the time (RFC 9562, version 7).

    In the order of their making, ids fill an index at its end. Random ones touch a page of it each: with
    600,000 rows a fresh one cost SQLite three times the CPU and four times the time.
    """
    return str(uuid7())


@dataclass(frozen=True, slots=True, kw_only=True)
class SubmitJob:
    """What a client asks for, validated."""

    owner: str
    """Name of the key; empty for an anonymous caller."""
    body: bytes
    fields: Mapping[str, Any]
    """The body, parsed once."""
    model: str
    mode: Mode
    detached: bool
    result_ttl_s: float
    fallbacks: tuple[str, ...] = ()
    """Models to try after it."""
    may_detach: bool = False
    """``Prefer: wait``: it may be cut loose later."""
    headers: Headers = ()
    request_id: str = ""
    may_rerun: bool = True
    """False: rather fail than be tried again, after a failure or a restart."""
    idempotency_key: str | None = None
    webhook: str | None = None
    """The name of the endpoint that is told how it ended. Needs a detached job."""

    def accepted(self, at: float) -> JobAccepted:
        """The event that says it was taken on."""
        return JobAccepted(
            at=at,
            owner=self.owner,
            model=self.model,
            mode=self.mode,
            # An attached job is never run from the log.
            body=self.body if self.detached or self.may_detach else b"",
            detached=self.detached,
            result_ttl_s=self.result_ttl_s,
            headers=self.headers,
            request_id=self.request_id,
            may_rerun=self.may_rerun,
            idempotency_key=self.idempotency_key,
            body_sha256=body_digest(self.body) if self.idempotency_key is not None else None,
            webhook=self.webhook,
        )


class Submission(NamedTuple):
    """What :meth:`Supervisor.submit_once` found or made. Without an actor, the job has ended."""

    snapshot: JobSnapshot
    actor: JobActor | None
    watch: Watch | None
    state: JobState
    """As it is told: that of a job made just now is pending, though its first attempt is on record."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisorLimits:
    """Bounds of admission and memory."""

    max_in_flight: int
    attached_history: int
    """Records of ended attached jobs kept (counts, no content); the oldest go first."""
    subscriber_buffer_runs: int
    store_bodies: bool = True
    """False: content goes once the result was read."""
    max_resumed: int = 100
    """Jobs of an earlier process at work at once; the others wait their turn."""


class Watched(NamedTuple):
    """A job under watch. The caller closes the subscription, and leaves the watch if there is one."""

    subscription: Subscription
    actor: JobActor | None
    """None: the job has ended."""
    snapshot: JobSnapshot
    watch: Watch | None = None


def provider_call(command: SubmitJob, course: Course) -> ProviderCall:
    """The call as the first target of the course gets it."""
    return ProviderCall(command.body, command.fields, course.target.model, command.headers, course.key_name)


def first_events(command: SubmitJob, course: Course, *, at: float) -> list[Event]:
    """The job was taken on; and, if it has its place already, its first attempt starts: committed as one."""
    accepted = command.accepted(at)
    return [accepted, attempt_started(course, attempt=1, at=at)] if course.begun else [accepted]


def body_digest(body: bytes) -> str:
    """How an idempotency key remembers the body it came with."""
    return hashlib.sha256(body).hexdigest()


def check_cursor(after: FrameCursor, snapshot: JobSnapshot) -> None:
    """Raise JobConflictError for a place in a stream that is void, or not there yet."""
    if after.attempt < snapshot.attempt:
        raise JobConflictError(f"attempt {after.attempt} of this job was given up; read its stream anew")
    if after.attempt > snapshot.attempt or after.frame > snapshot.frames:
        raise JobConflictError(f"the job has no frame {after}; read its stream anew")
