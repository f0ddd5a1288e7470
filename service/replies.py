"""Replies that several routes give."""

from collections.abc import Mapping
from typing import Any

import orjson

from events.codec import rfc3339
from events.projections import JobSnapshot
from events.state import JobState
from events.types import Failure
from service import schemas
from service.errors import INTERNAL_FAILURE, envelope
from service.http import HeaderList, Reply

POLL_AFTER_S = 1


def json_reply(body: Mapping[str, Any], *, status: int = 200) -> Reply:
    """A JSON object."""
    return Reply(status, orjson.dumps(body))


def error_reply(failure: Failure, request_id: str) -> Reply:
    """The error envelope, with the headers that travel with the error."""
    return Reply(failure.status, envelope(failure, request_id), list(failure.headers))


def job_headers(snapshot: JobSnapshot) -> HeaderList:
    """What every answer about a job carries."""
    return [("x-bf-async-id", snapshot.job_id), ("x-bf-async-status", snapshot.state.value)]


def pending_reply(snapshot: JobSnapshot, state: JobState) -> Reply:
    """The job has no result yet; it is told to be in ``state``."""
    return Reply(
        200,
        schemas.pending_body(snapshot.job_id, snapshot.model),
        [
            ("x-bf-async-id", snapshot.job_id),
            ("x-bf-async-status", state.value),
            ("retry-after", str(POLL_AFTER_S)),
        ],
    )


def failed_job_reply(snapshot: JobSnapshot, request_id: str) -> Reply:
    """The error a job ended with."""
    reply = error_reply(snapshot.failure or INTERNAL_FAILURE, request_id)
    reply.headers.extend(job_headers(snapshot))
    return reply


def job_object(snapshot: JobSnapshot) -> dict[str, Any]:
    """``GET /v1/jobs/{id}``."""

    def moment(at: float | None) -> str | None:
        return None if at is None else rfc3339(at)

    failed = snapshot.state in (JobState.FAILED, JobState.CANCELLED) and snapshot.failure is not None
    return {
        "id": snapshot.job_id,
        "type": "job",
        "status": snapshot.state.value,
        "mode": snapshot.mode.value,
        "model": snapshot.model,
        "created_at": rfc3339(snapshot.created_at),
        "started_at": moment(snapshot.started_at),
        "ended_at": moment(snapshot.ended_at),
        "expires_at": moment(snapshot.expires_at) if snapshot.detached else None,
        "attempts": snapshot.attempt,
        "usage": dict(snapshot.usage),
        "error": {"type": snapshot.failure.type, "message": snapshot.failure.message}
        if failed and snapshot.failure
        else None,
    }
