"""Jobs and events as rows of the SQLite log, and back.

An event is kept as its fact (:mod:`events.codec`, content taken out) and its content. Events without content
share the row of the one before them, a fact a line; the content of a row is its first event's. So do the
FramesReceived of one flush: their content is all their frames joined, their fact a JSON object

    {"v": 1, "attempt": ATTEMPT, "first": FRAME, "runs": [[AT, [BYTES, ...]], ...]}

with one run for each event and the size of each frame, or the number of frames where they came redacted. So
dropping ``content`` redacts any row.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import orjson

from events.codec import decode, encode
from events.errors import CodecError, TooManyEventsError
from events.log.content import content_bytes, content_of, with_content
from events.log.sqlite_schema import MAX_SEQ, SEQ_BITS
from events.projections import JobSnapshot
from events.state import JobState
from events.types import Event, Failure, FramesReceived, JobCompleted, Mode, StoredEvent

ROW_BYTES = 256 << 10
"""A row of frames is closed once it holds this much."""

RUNS_VERSION = 1

_FIXED = (
    "id",
    "job_id",
    "owner",
    "model",
    "mode",
    "created_at",
    "request_id",
    "may_rerun",
    "batch_id",
    "idempotency_key",
    "custom_id",
    "webhook",
)
_CHANGING = (
    "state",
    "detached",
    "result_ttl_s",
    "last_seq",
    "started_at",
    "ended_at",
    "expires_at",
    "attempt",
    "frames",
    "lapsed",
    "usage",
    "failure",
    "message_seq",
)
JOB_COLUMNS = _FIXED + _CHANGING
EVENT_COLUMNS = ("id", "attempt", "last_frame", "fact", "content")

JOB_INSERT = (
    f"INSERT INTO jobs ({', '.join(JOB_COLUMNS)}) VALUES {{rows}}"  # noqa: S608 - constants
    " ON CONFLICT (id) DO UPDATE SET "
    + ", ".join(f"{name} = excluded.{name}" for name in _CHANGING)
    # With the result the key is free again.
    + ", idempotency_key = CASE excluded.state WHEN 'expired' THEN NULL ELSE idempotency_key END"
)
EVENT_INSERT = f"INSERT INTO events ({', '.join(EVENT_COLUMNS)}) VALUES {{rows}}"  # noqa: S608 - constants
EVENT_SELECT = f"SELECT id & {MAX_SEQ}, {', '.join(EVENT_COLUMNS[1:])} FROM events"  # noqa: S608 - constants
"""Of EventRows."""
MESSAGE = f"(SELECT content FROM events WHERE id = (jobs.id << {SEQ_BITS}) + jobs.message_seq)"  # noqa: S608 - same
"""The Message of a job."""

# Cross joins are made in the order they are written in: from a job to the range of its events.
_EVENTS_OF = (
    "SELECT events.id FROM json_each(?) AS wanted CROSS JOIN jobs ON {wanted} CROSS JOIN events ON"  # noqa: S608
    f" events.id BETWEEN jobs.id << {SEQ_BITS} AND (jobs.id << {SEQ_BITS}) + {MAX_SEQ}"  # constants
)
EVENTS_REDACT = (
    "UPDATE events SET content = NULL WHERE content IS NOT NULL AND id IN"  # noqa: S608 - constants
    f" ({_EVENTS_OF.format(wanted='jobs.job_id = wanted.value')})"
)
"""Drops the content of jobs, given a JSON array of their ids."""
EVENTS_DELETE = (
    "DELETE FROM events WHERE id IN"  # noqa: S608 - constants
    f" ({_EVENTS_OF.format(wanted='jobs.id = wanted.value')})"
)
"""Deletes the events of jobs, given a JSON array of their numbers."""

JobRow = tuple[Any, ...]
"""In the order of JOB_COLUMNS."""


class EventRow(NamedTuple):
    """One row of ``events``, but for the number of its job. ``seq`` is that of its last event."""

    seq: int
    attempt: int | None
    last_frame: int | None
    fact: bytes
    content: bytes | None


def event_id(number: int, seq: int) -> int:
    """The id of the row that ends with this event; ``seq`` is at most MAX_SEQ, or it is another job's."""
    return (number << SEQ_BITS) + seq


def job_row(number: int, snapshot: JobSnapshot, *, key: str | None, message_seq: int | None) -> JobRow:
    """The row of a job. ``key`` counts for a new job only; it is not overwritten later."""
    failure = snapshot.failure
    return (
        number,
        snapshot.job_id,
        snapshot.owner,
        snapshot.model,
        snapshot.mode.value,
        snapshot.created_at,
        snapshot.request_id,
        int(snapshot.may_rerun),
        snapshot.batch_id,
        key,
        snapshot.custom_id,
        snapshot.webhook,
        snapshot.state.value,
        int(snapshot.detached),
        snapshot.result_ttl_s,
        snapshot.last_seq,
        snapshot.started_at,
        snapshot.ended_at,
        snapshot.expires_at,
        snapshot.attempt,
        snapshot.frames,
        int(snapshot.lapsed),
        orjson.dumps(snapshot.usage, default=dict).decode() if snapshot.usage else "{}",
        None
        if failure is None
        else orjson.dumps([failure.status, failure.type, failure.message, failure.headers]).decode(),
        message_seq,
    )


def snapshot_of(row: Sequence[Any], message: bytes = b"") -> JobSnapshot:
    """The job of a row. Raises CodecError for a damaged one."""
    values = dict(zip(JOB_COLUMNS, row, strict=True))
    try:
        return JobSnapshot(
            job_id=values["job_id"],
            owner=values["owner"],
            model=values["model"],
            mode=Mode(values["mode"]),
            state=JobState(values["state"]),
            detached=bool(values["detached"]),
            result_ttl_s=values["result_ttl_s"],
            created_at=values["created_at"],
            last_seq=values["last_seq"],
            started_at=values["started_at"],
            ended_at=values["ended_at"],
            expires_at=values["expires_at"],
            attempt=values["attempt"],
            frames=values["frames"],
            usage=orjson.loads(values["usage"]),
            failure=_failure(values["failure"]),
            message=message,
            request_id=values["request_id"],
            may_rerun=bool(values["may_rerun"]),
            batch_id=values["batch_id"],
            custom_id=values["custom_id"],
            webhook=values["webhook"],
            lapsed=bool(values["lapsed"]),
        )
    except (ValueError, TypeError) as exc:
        raise CodecError("a stored job is damaged") from exc


def _failure(stored: str | None) -> Failure | None:
    if stored is None:
        return None
    status, kind, message, headers = orjson.loads(stored)
    return Failure(status, kind, message, tuple((name, value) for name, value in headers))


def message_seq(first_seq: int, events: Sequence[Event]) -> int | None:
    """Where, among ``events``, the Message is."""
    for seq, event in enumerate(events, first_seq):
        if isinstance(event, JobCompleted) and event.message:
            return seq
    return None


def event_rows(first_seq: int, events: Sequence[Event]) -> list[EventRow]:
    """The rows of consecutive events. Raises CodecError for what cannot be stored, TooManyEventsError."""
    check_room(first_seq + len(events) - 1)
    rows: list[EventRow] = []
    group: list[Event] = []
    size = 0
    for seq, event in enumerate(events, first_seq):
        if group and (size >= ROW_BYTES or not _share_a_row(group[-1], event)):
            rows.append(_row(seq - 1, group))
            group, size = [], 0
        group.append(event)
        size += content_bytes(event)
    if group:
        rows.append(_row(first_seq + len(events) - 1, group))
    return rows


def check_room(last_seq: int, *, reserved: int = 0) -> None:
    """Raise TooManyEventsError where a job has no room for an event of that number, and ``reserved`` more."""
    if last_seq > MAX_SEQ - reserved:
        raise TooManyEventsError(MAX_SEQ - reserved)


def _share_a_row(last: Event, event: Event) -> bool:
    if isinstance(event, FramesReceived):
        return isinstance(last, FramesReceived) and _follows(last, event)
    # A Message is found by the number of its row.
    return not isinstance(last, FramesReceived | JobCompleted) and not content_bytes(event)


def _row(seq: int, events: list[Event]) -> EventRow:
    first = events[0]
    if isinstance(first, FramesReceived):
        return _runs_row(seq, cast(list[FramesReceived], events))
    facts = [encode(event, content=False) for event in events]
    return EventRow(seq, None, None, b"\n".join(facts), content_of(first))


def _follows(run: FramesReceived, event: FramesReceived) -> bool:
    return (
        event.attempt == run.attempt
        and event.first == run.last + 1
        and bool(event.frames) == bool(run.frames)
    )


def _runs_row(seq: int, runs: list[FramesReceived]) -> EventRow:
    fact = {
        "v": RUNS_VERSION,
        "attempt": runs[0].attempt,
        "first": runs[0].first,
        "runs": [(run.at, [len(frame) for frame in run.frames] or run.count) for run in runs],
    }
    content = b"".join(frame for run in runs for frame in run.frames) if runs[0].frames else None
    return EventRow(seq, runs[0].attempt, runs[-1].last, orjson.dumps(fact), content)


def stored_events(job_id: str, row: EventRow) -> list[StoredEvent]:
    """The events of a row. Raises CodecError for a damaged one."""
    if row.attempt is None:
        # A damaged page may tell any type.
        if not isinstance(row.fact, bytes):
            raise CodecError("a stored event is not bytes")
        # JSON as it is written here has no line ends.
        facts = row.fact.split(b"\n")
        first = StoredEvent(job_id, row.seq - len(facts) + 1, with_content(decode(facts[0]), row.content))
        return [
            first,
            *(StoredEvent(job_id, seq, decode(fact)) for seq, fact in enumerate(facts[1:], first.seq + 1)),
        ]
    runs = _runs(row)
    return [StoredEvent(job_id, seq, run) for seq, run in enumerate(runs, row.seq - len(runs) + 1)]


def frames_of(row: EventRow) -> tuple[int, list[bytes]]:
    """The number of the row's first frame, and its frames; none once redacted. Raises CodecError."""
    runs = _runs(row)
    return runs[0].first, [frame for run in runs for frame in run.frames]


def _runs(row: EventRow) -> list[FramesReceived]:
    redacted, content = row.content is None, row.content or b""
    try:
        fact = orjson.loads(row.fact)
        if fact["v"] != RUNS_VERSION:
            raise CodecError("stored frames of unknown version")
        first, offset = fact["first"], 0
        runs: list[FramesReceived] = []
        for at, sizes in fact["runs"]:
            frames: list[bytes] = []
            for size in () if redacted else sizes:
                frames.append(content[offset : offset + size])
                offset += size
            count = sizes if isinstance(sizes, int) else len(sizes)
            run = FramesReceived(
                at=at, attempt=fact["attempt"], first=first, frames=tuple(frames), count=count
            )
            runs.append(run)
            first = run.last + 1
    except (ValueError, TypeError, KeyError) as exc:
        raise CodecError("stored frames are damaged") from exc
    if not runs or offset != len(content):
        raise CodecError("the sizes of stored frames do not add up")
    return runs
