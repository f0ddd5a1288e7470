"""The life of a delivery: telling a webhook endpoint how a job ended, until it has heard.

::

    (nothing) --DeliveryAccepted--> pending --DeliverySucceeded--> delivered --+
                                     ^  ^ |                                    |
       DeliveryAttemptFailed (waits)-+  | +---DeliveryGivenUp----> failed -----+
                                        | +---DeliverySkipped----> skipped ----+
                                        |                                      |
                                        +---------RedeliveryRequested----------+

A delivery's id is made of the job and the event, so that it is never made twice, and is the ``webhook-id`` of
every try. Pure, as :mod:`events.state` and :mod:`events.projections` are for jobs: nothing else changes where
a delivery stands.

An event is stored as the JSON object ``{"v": 1, "type": CLASS, FIELD: VALUE}``, a snapshot as its fields.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from types import MappingProxyType
from typing import Any, get_args

import orjson
from pydantic import TypeAdapter, ValidationError

from events.codec import rfc3339
from events.errors import CodecError, IllegalTransition

SCHEMA_VERSION = 1
ID_PREFIX = "whd_"
REQUEST_TYPE = "messages"
"""The kind of request a job was: ``POST /v1/messages``."""
PROGRESS = "async_job.progress"
"""The event of a running job. Never recorded: it is sent as best it can be, and not again."""


class WebhookEvent(StrEnum):
    """What an endpoint is told, at least once."""

    COMPLETED = "async_job.completed"
    FAILED = "async_job.failed"
    CANCELLED = "async_job.cancelled"


class DeliveryState(StrEnum):
    """Where a delivery stands."""

    # To be tried, now or when its time comes.
    PENDING = "pending"
    # The endpoint answered with 2xx.
    DELIVERED = "delivered"
    # Given up: out of tries, or refused for good.
    FAILED = "failed"
    # The configuration says that it is not to be sent.
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeliveryAccepted:
    """An endpoint is owed the news. First event of every delivery."""

    at: float
    endpoint: str
    """The name of the endpoint; its address is the configuration's."""
    event: WebhookEvent
    job_id: str
    owner: str
    """Of the job."""
    status: str
    """The job's: completed, failed, cancelled."""
    status_code: int
    """What a poll of the job answers with."""
    result_url: str
    result_expires_at: float
    """Unix seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeliveryAttemptFailed:
    """A try came to nothing; another one follows."""

    at: float
    next_attempt_at: float
    """Unix seconds."""
    error: str
    status_code: int | None = None
    """What the endpoint answered; None: no answer."""
    duration_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DeliverySucceeded:
    """The endpoint has heard."""

    at: float
    status_code: int
    duration_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DeliveryGivenUp:
    """A try came to nothing, and no other follows."""

    at: float
    error: str
    status_code: int | None = None
    duration_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DeliverySkipped:
    """Nothing was sent, because the configuration says so."""

    at: float
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RedeliveryRequested:
    """Somebody wants it sent again, with a whole round of tries."""

    at: float
    by: str
    """The name of the key."""


DeliveryEvent = (
    DeliveryAccepted
    | DeliveryAttemptFailed
    | DeliverySucceeded
    | DeliveryGivenUp
    | DeliverySkipped
    | RedeliveryRequested
)

_CLOSED_ROW: Mapping[type[DeliveryEvent], DeliveryState] = {RedeliveryRequested: DeliveryState.PENDING}

TRANSITIONS: Mapping[DeliveryState | None, Mapping[type[DeliveryEvent], DeliveryState]] = MappingProxyType(
    {
        None: {DeliveryAccepted: DeliveryState.PENDING},
        DeliveryState.PENDING: {
            DeliveryAttemptFailed: DeliveryState.PENDING,
            DeliverySucceeded: DeliveryState.DELIVERED,
            DeliveryGivenUp: DeliveryState.FAILED,
            DeliverySkipped: DeliveryState.SKIPPED,
        },
        DeliveryState.DELIVERED: _CLOSED_ROW,
        DeliveryState.FAILED: _CLOSED_ROW,
        DeliveryState.SKIPPED: _CLOSED_ROW,
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeliverySnapshot:
    """A delivery as its events tell it, up to one of them. Moments are Unix seconds."""

    delivery_id: str
    state: DeliveryState
    endpoint: str
    event: WebhookEvent
    job_id: str
    owner: str
    status: str
    status_code: int
    result_url: str
    result_expires_at: float
    created_at: float
    last_seq: int = 1
    attempts: int = 0
    """Tries in all."""
    round_attempts: int = 0
    """Tries since it was accepted, or last asked for again."""
    next_attempt_at: float | None = None
    """None: it is closed."""
    ended_at: float | None = None
    last_status_code: int | None = None
    """What the endpoint answered to the last try."""
    last_error: str | None = None

    @property
    def pending(self) -> bool:
        """Whether there is work left."""
        return self.state is DeliveryState.PENDING


def delivery_id(job_id: str, event: WebhookEvent) -> str:
    """The one id of this news: the same job and event give the same."""
    return ID_PREFIX + hashlib.sha256(f"{job_id}\n{event.value}".encode()).hexdigest()[:32]


def progress_id(job_id: str, cursor: str) -> str:
    """The id of a progress event."""
    return ID_PREFIX + hashlib.sha256(f"{job_id}\n{PROGRESS}\n{cursor}".encode()).hexdigest()[:32]


def apply(snapshot: DeliverySnapshot | None, identity: str, event: DeliveryEvent) -> DeliverySnapshot:
    """One step of the fold. Raises IllegalTransition and returns nothing for an event out of turn."""
    try:
        state = TRANSITIONS[snapshot.state if snapshot else None][type(event)]
    except KeyError:
        now = "nothing" if snapshot is None else snapshot.state.value
        raise IllegalTransition(f"{type(event).__name__} does not follow {now}") from None
    if isinstance(event, DeliveryAccepted):
        return DeliverySnapshot(
            delivery_id=identity,
            state=state,
            endpoint=event.endpoint,
            event=event.event,
            job_id=event.job_id,
            owner=event.owner,
            status=event.status,
            status_code=event.status_code,
            result_url=event.result_url,
            result_expires_at=event.result_expires_at,
            created_at=event.at,
            next_attempt_at=event.at,
        )
    if snapshot is None:
        raise AssertionError("TRANSITIONS lets nothing but DeliveryAccepted come first")
    return replace(snapshot, state=state, last_seq=snapshot.last_seq + 1, **_changes(snapshot, event))


def _changes(
    now: DeliverySnapshot,
    event: DeliveryAttemptFailed
    | DeliverySucceeded
    | DeliveryGivenUp
    | DeliverySkipped
    | RedeliveryRequested,
) -> dict[str, Any]:
    """The fields that the event changes, ``state`` and ``last_seq`` aside."""
    match event:
        case DeliverySkipped(at=at, reason=reason):
            return {"next_attempt_at": None, "ended_at": at, "last_error": reason}
        case RedeliveryRequested(at=at):
            return {"next_attempt_at": at, "ended_at": None, "round_attempts": 0}
        case DeliveryAttemptFailed(next_attempt_at=next_at, error=error):
            ending = {"next_attempt_at": next_at, "last_error": error}
        case DeliveryGivenUp(at=at, error=error):
            ending = {"next_attempt_at": None, "ended_at": at, "last_error": error}
        case DeliverySucceeded(at=at):
            ending = {"next_attempt_at": None, "ended_at": at, "last_error": None}
    tries = {"attempts": now.attempts + 1, "round_attempts": now.round_attempts + 1}
    return tries | ending | {"last_status_code": event.status_code}


def project(identity: str, events: Iterable[DeliveryEvent]) -> DeliverySnapshot:
    """Fold a whole history. Raises ValueError for an empty one, IllegalTransition for a bad one."""
    snapshot: DeliverySnapshot | None = None
    for event in events:
        snapshot = apply(snapshot, identity, event)
    if snapshot is None:
        raise ValueError("a delivery has at least one event")
    return snapshot


# -- as bytes ------------------------------------------------------------------------------------

_KINDS: Mapping[str, TypeAdapter[DeliveryEvent]] = MappingProxyType(
    {kind.__name__: TypeAdapter(kind) for kind in get_args(DeliveryEvent)}
)
_SNAPSHOT = TypeAdapter(DeliverySnapshot)


def encode(event: DeliveryEvent) -> bytes:
    """The event as it is stored."""
    return orjson.dumps({"v": SCHEMA_VERSION, "type": type(event).__name__, **asdict(event)})


def decode(fact: bytes) -> DeliveryEvent:
    """The event that :func:`encode` wrote. Raises CodecError for anything else."""
    try:
        stored = orjson.loads(fact)
        if stored["v"] != SCHEMA_VERSION:
            raise CodecError("a stored delivery event of unknown version")
        return _KINDS[stored["type"]].validate_python(stored)
    except (ValidationError, ValueError, KeyError, TypeError):
        raise CodecError("a stored delivery event is damaged") from None


def encode_snapshot(snapshot: DeliverySnapshot) -> bytes:
    """The snapshot as it is stored beside the events."""
    return orjson.dumps(asdict(snapshot))


def decode_snapshot(state: bytes) -> DeliverySnapshot:
    """The snapshot that :func:`encode_snapshot` wrote. Raises CodecError for anything else."""
    try:
        return _SNAPSHOT.validate_json(state)
    except ValidationError:
        raise CodecError("a stored delivery is damaged") from None


# -- what is sent --------------------------------------------------------------------------------


def payload(snapshot: DeliverySnapshot) -> str:
    """The body of every try: the same text each time, and whatever became of the delivery since."""
    return _payload(
        snapshot.event.value,
        created_at=snapshot.created_at,
        job_id=snapshot.job_id,
        status=snapshot.status,
        status_code=snapshot.status_code,
        result_url=snapshot.result_url,
        result_expires_at=rfc3339(snapshot.result_expires_at),
    )


def progress_payload(*, at: float, job_id: str, result_url: str, cursor: str) -> str:
    """The body that says how far a running job's stream has come: resume after ``cursor``."""
    return _payload(
        PROGRESS,
        created_at=at,
        job_id=job_id,
        status="processing",
        status_code=200,
        result_url=result_url,
        result_expires_at=None,
        cursor=cursor,
    )


def _payload(event: str, *, created_at: float, job_id: str, **data: object) -> str:
    body = {
        "event": event,
        "created_at": rfc3339(created_at),
        "data": {"job_id": job_id, "request_type": REQUEST_TYPE, **data},
    }
    return orjson.dumps(body).decode()
