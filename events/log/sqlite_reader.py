"""What is asked of the SQLite log: a bounded pool of connections, and the queries that run on them."""

import sqlite3
from collections.abc import Callable, Iterable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, TypeVar

import trio

from events.errors import CodecError, LogUnavailableError, UnknownJobError
from events.log.base import FrameCursor, FrameRun, JobFilter, Page
from events.log.sqlite_rows import (
    EVENT_SELECT,
    JOB_COLUMNS,
    MESSAGE,
    EventRow,
    event_id,
    frames_of,
    snapshot_of,
    stored_events,
)
from events.log.sqlite_schema import MAX_SEQ, SEQ_BITS, connect
from events.projections import JobSnapshot
from events.types import StoredEvent

T = TypeVar("T")

_JOB = f"SELECT {', '.join(JOB_COLUMNS)} FROM jobs"  # noqa: S608 - constants
EVENTS = f"{EVENT_SELECT} WHERE id > ? AND id <= ? ORDER BY id LIMIT ?"
FRAMES = f"{EVENT_SELECT} WHERE id >> {SEQ_BITS} = ? AND attempt = ? AND last_frame > ? ORDER BY last_frame"


class Readers:
    """Runs queries in worker threads, at most ``connections`` at a time; further ones wait their turn."""

    def __init__(self, path: Path, connections: int) -> None:
        self._path = path
        self._limiter = trio.CapacityLimiter(connections)
        self._idle: list[sqlite3.Connection] = []
        self._closed = False

    async def run(self, query: Callable[[sqlite3.Connection], T]) -> T:
        """What ``query`` returns. Cancelled, it waits for the query's end first.

        Raises LogUnavailableError where the file cannot be read, and what the query raises.
        """
        return await trio.to_thread.run_sync(self._run, query, limiter=self._limiter)

    def _run(self, query: Callable[[sqlite3.Connection], T]) -> T:
        if self._closed:
            raise LogUnavailableError("the log is closed")
        try:
            connection = self._connection()
            try:
                return query(connection)
            finally:
                self._give_back(connection)
        except (sqlite3.Error, CodecError) as exc:
            raise LogUnavailableError(f"the event log cannot be read: {exc}") from exc

    def _connection(self) -> sqlite3.Connection:
        try:
            return self._idle.pop()
        except IndexError:
            return connect(self._path, read_only=True)

    def _give_back(self, connection: sqlite3.Connection) -> None:
        self._idle.append(connection)
        if self._closed:
            self.close()

    def close(self) -> None:
        """Close the connections, those in use as soon as they are free. Idempotent."""
        self._closed = True
        with suppress(IndexError):
            while True:
                self._idle.pop().close()


def unfinished_jobs(connection: sqlite3.Connection) -> list[tuple[int, JobSnapshot]]:
    """Number and snapshot of every job without a terminal event but batch items, in order of acceptance."""
    rows = connection.execute(f"{_JOB} WHERE ended_at IS NULL AND batch_id IS NULL ORDER BY id")
    return [(row[0], snapshot_of(row)) for row in rows]


def last_number(connection: sqlite3.Connection) -> int:
    """The number of the newest job; 0 without one."""
    (number,) = connection.execute("SELECT coalesce(max(id), 0) FROM jobs").fetchone()
    return int(number)


def job(job_id: str, connection: sqlite3.Connection) -> tuple[int, JobSnapshot] | None:
    """Number and snapshot of a job, the message included."""
    row = connection.execute(
        f"SELECT {', '.join(JOB_COLUMNS)}, {MESSAGE} FROM jobs WHERE job_id = ?",  # noqa: S608 - constants
        (job_id,),
    ).fetchone()
    return None if row is None else (row[0], snapshot_of(row[:-1], row[-1] or b""))


def events(job_id: str, after: int, limit: int, connection: sqlite3.Connection) -> list[StoredEvent] | None:
    """Up to ``limit`` events with ``seq > after``; None for an unknown job."""
    number = _number(job_id, connection)
    if number is None:
        return None
    found: list[StoredEvent] = []
    begin, end = event_id(number, min(max(after, 0), MAX_SEQ)), event_id(number, MAX_SEQ)
    rows = connection.execute(EVENTS, (begin, end, limit))
    with closing(rows):
        for row in rows:
            found.extend(event for event in stored_events(job_id, EventRow(*row)) if event.seq > after)
            if len(found) >= limit:
                break
    return found[:limit]


def frames(
    job_id: str, after: FrameCursor, max_bytes: int, connection: sqlite3.Connection
) -> tuple[bool, FrameRun | None]:
    """Whether the job is known, and its frames after ``after``."""
    number = _number(job_id, connection)
    if number is None:
        return False, None
    found: list[bytes] = []
    size = 0
    rows = connection.execute(FRAMES, (number, after.attempt, after.frame))
    with closing(rows):
        for row in rows:
            first, run = frames_of(EventRow(*row))
            next_frame = after.frame + len(found) + 1
            if first > next_frame:
                break
            for frame in run[next_frame - first :]:
                if size >= max_bytes:
                    break
                found.append(frame)
                size += len(frame)
            if size >= max_bytes or not run:
                break
    return True, FrameRun(after.attempt, after.frame + 1, tuple(found)) if found else None


def _number(job_id: str, connection: sqlite3.Connection) -> int | None:
    row = connection.execute("SELECT id FROM jobs WHERE job_id = ?", (job_id,)).fetchone()
    return None if row is None else row[0]


def page(
    where: JobFilter, limit: int, after_id: str | None, before_id: str | None, connection: sqlite3.Connection
) -> Page:
    """See the port."""
    newer_first = before_id is None
    cursor = after_id if newer_first else before_id
    terms, values = ["state <> 'expired'"], list[Any]()
    if cursor is not None:
        number = _number(cursor, connection)
        if number is None:
            raise UnknownJobError(f"no job {cursor}")
        terms.append(f"id {'<' if newer_first else '>'} ?")
        values.append(number)
    for column, value in (("owner", where.owner), ("model", where.model)):
        if value is not None:
            terms.append(f"{column} = ?")
            values.append(value)
    if where.states is not None:
        terms.append(f"state IN ({', '.join('?' * len(where.states))})")
        values.extend(state.value for state in where.states)
    rows = connection.execute(
        f"{_JOB} WHERE {' AND '.join(terms)} ORDER BY id {'DESC' if newer_first else 'ASC'} LIMIT ?",
        (*values, limit + 1),
    ).fetchall()
    jobs = _snapshots(rows[:limit])
    return Page(jobs if newer_first else jobs[::-1], has_more=len(rows) > limit)


_DUE = "detached = 1 AND ended_at IS NOT NULL AND state <> 'expired' AND batch_id IS NULL"


def due(now: float, limit: int, connection: sqlite3.Connection) -> list[JobSnapshot]:
    """See the port."""
    query = f"{_JOB} WHERE {_DUE} AND expires_at <= ? ORDER BY expires_at LIMIT ?"
    return _snapshots(connection.execute(query, (now, limit)))


def next_deadline(connection: sqlite3.Connection) -> float | None:
    """See the port."""
    query = f"SELECT min(expires_at) FROM jobs WHERE {_DUE}"  # noqa: S608 - constants
    (at,) = connection.execute(query).fetchone()
    return None if at is None else float(at)


def _snapshots(rows: Iterable[tuple[Any, ...]]) -> list[JobSnapshot]:
    return list(map(snapshot_of, rows))
