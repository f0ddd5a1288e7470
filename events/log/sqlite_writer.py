"""The thread that writes the SQLite log: one transaction a batch.

Python's sqlite3 gives up the interpreter lock for every step of every statement and then has to wait for
it, for milliseconds while the trio thread is busy. So a batch is a handful of statements with many rows,
not many statements.
"""

import queue
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from time import monotonic
from typing import Any, Protocol

import orjson
import trio

from events.errors import DuplicateKeyError, LogError, SequenceConflict
from events.log.sqlite_rows import (
    EVENT_COLUMNS,
    EVENT_INSERT,
    EVENTS_DELETE,
    EVENTS_REDACT,
    JOB_COLUMNS,
    JOB_INSERT,
    EventRow,
    JobRow,
    event_id,
    event_rows,
)
from events.types import Event

ROWS_PER_STATEMENT = 512
"""The most rows one INSERT takes. Fewer are split into powers of two, so that few statements are compiled."""

STEP_S = 0.01
"""How long a batch works at a purge before it lets the next batch have its turn."""

PURGED_AT_ONCE = 8
"""Jobs that one step of a purge deletes between two looks at the clock."""

FREE_PAGES_KEPT = 512
"""Unused pages (8 KiB each) left in the file for what comes next; the rest is given back to the disk."""

PAGES_FREED_AT_ONCE = 32
"""Pages given back between two looks at the clock."""


@dataclass(eq=False, slots=True, kw_only=True)
class JobWrite:
    """One job's part in a batch: its row, and the events that lead to it."""

    job_id: str
    number: int
    row: JobRow
    new: bool = False
    """It is being accepted: there must be no such job yet."""
    owner_key: tuple[str, str] | None = None
    """Owner and idempotency key of a new job."""
    expired: bool = False
    """Its content goes."""
    flushed: Sequence[Event] = ()
    """Frames that were waiting; they come before ``events``."""
    flushed_first_seq: int = 0
    events: Sequence[EventRow] = ()
    refusal: LogError | None = None
    """Set by the writer: why nothing of this was written, while the rest of the batch was."""


@dataclass(eq=False, slots=True, kw_only=True)
class PurgeStep:
    """As much of a purge as fits into a batch."""

    before: float
    limit: int
    purged: int = 0
    """Set by the writer."""
    more: bool = False
    """Set by the writer: it ran out of time, not of work."""


class Step(Protocol):
    """Whatever else takes part in a batch, as its own statements."""

    refusal: LogError | None
    """Set by :meth:`write`: why nothing of this was written, while the rest of the batch was."""

    def write(self, connection: sqlite3.Connection) -> None:
        """Run the statements, in the writer's thread and in the batch's transaction.

        What it raises fails the whole batch.
        """
        ...


@dataclass(eq=False, slots=True, kw_only=True)
class Batch:
    """What goes to disk together. Handed to the writer and, once :attr:`done`, handed back."""

    jobs: list[JobWrite] = field(default_factory=list)
    redacted: list[str] = field(default_factory=list)
    forgotten: list[str] = field(default_factory=list)
    purges: list[PurgeStep] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    error: str | None = None
    """Set by the writer: why nothing at all was written."""
    done: threading.Event = field(default_factory=threading.Event)


class Writer:
    """Owns the writing connection and its thread.

    Every method returns at once, but for :meth:`join`. ``on_done`` and alarms are called in the trio
    thread; nobody calls them once the trio program is over.
    """

    def __init__(
        self,
        connection: sqlite3.Connection,
        *,
        on_done: Callable[[Batch], None],
        on_end: Callable[[], None],
    ) -> None:
        """Must be made in the trio program that it serves. ``on_end`` is the thread's own last act."""
        self._connection = connection
        self._on_done = on_done
        self._on_end = on_end
        self._token = trio.lowlevel.current_trio_token()
        self._orders: queue.SimpleQueue[Batch | tuple[float, Callable[[], None]] | None] = queue.SimpleQueue()
        # A daemon thread: a disk that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name="event log writer", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def commit(self, batch: Batch) -> None:
        """Write a batch; ``on_done`` tells when that is over, one way or the other."""
        self._orders.put(batch)

    def set_alarm(self, after_s: float, ring: Callable[[], None]) -> None:
        """Call ``ring`` once, that many seconds of real time from now. Replaces an earlier one for it."""
        self._orders.put((monotonic() + after_s, ring))

    def stop(self) -> None:
        """End the thread when it has done all it was told before."""
        self._orders.put(None)

    def join(self, within_s: float) -> bool:
        """Wait, blocking, for the thread's end; whether it came within that many seconds."""
        self._thread.join(within_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        alarms: dict[Callable[[], None], float] = {}
        while True:
            try:
                next_at = min(alarms.values(), default=None)
                order = self._orders.get(timeout=None if next_at is None else max(0, next_at - monotonic()))
            except queue.Empty:
                for ring in [ring for ring, at in alarms.items() if at <= monotonic()]:
                    del alarms[ring]
                    self._tell(ring)
                continue
            if order is None:
                break
            if isinstance(order, tuple):
                at, ring = order
                alarms[ring] = at
                continue
            write_batch(self._connection, order)
            self._tell(self._on_done, order)
            order.done.set()
        self._connection.close()
        self._on_end()

    def _tell(self, call: Callable[..., object], *args: object) -> None:
        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(call, *args)


def write_batch(connection: sqlite3.Connection, batch: Batch) -> None:
    """Write the batch in one transaction. Raises nothing: ``batch.error`` says what went wrong."""
    try:
        connection.execute("BEGIN IMMEDIATE")
        _write(connection, batch)
        connection.execute("COMMIT")
    except Exception as exc:  # noqa: BLE001 - a thread has nobody to raise to; every caller is told
        batch.error = f"{type(exc).__name__}: {exc}"
        with suppress(sqlite3.Error):
            connection.execute("ROLLBACK")


def _write(connection: sqlite3.Connection, batch: Batch) -> None:
    _refuse_taken(connection, [job for job in batch.jobs if job.new])
    jobs = [job for job in batch.jobs if job.refusal is None]
    _insert(connection, JOB_INSERT, len(JOB_COLUMNS), (job.row for job in jobs))
    _insert(connection, EVENT_INSERT, len(EVENT_COLUMNS), _event_values(jobs))
    redacted = [*batch.redacted, *(job.job_id for job in jobs if job.expired)]
    if redacted:
        connection.execute(EVENTS_REDACT, (_json(redacted),))
        connection.execute(
            "UPDATE jobs SET message_seq = NULL WHERE job_id IN (SELECT value FROM json_each(?))",
            (_json(redacted),),
        )
    if batch.forgotten:
        numbers = connection.execute(
            "SELECT json_group_array(id) FROM jobs WHERE job_id IN (SELECT value FROM json_each(?))",
            (_json(batch.forgotten),),
        ).fetchone()
        delete_jobs(connection, numbers)
    for purge in batch.purges:
        _purge(connection, purge)
    for step in batch.steps:
        step.write(connection)


def _event_values(jobs: Iterable[JobWrite]) -> Iterator[Sequence[Any]]:
    for job in jobs:
        for row in event_rows(job.flushed_first_seq, job.flushed):
            yield (event_id(job.number, row.seq), *row[1:])
        for row in job.events:
            yield (event_id(job.number, row.seq), *row[1:])


def _insert(
    connection: sqlite3.Connection, statement: str, columns: int, rows: Iterable[Sequence[Any]]
) -> None:
    waiting = list(rows)
    start = 0
    size = ROWS_PER_STATEMENT
    while start < len(waiting):
        while size > len(waiting) - start:
            size //= 2
        values = list(chain.from_iterable(waiting[start : start + size]))
        connection.execute(_statement(statement, columns, size), values)
        start += size


@lru_cache(maxsize=64)
def _statement(statement: str, columns: int, rows: int) -> str:
    return statement.format(rows=", ".join([f"({', '.join('?' * columns)})"] * rows))


def _refuse_taken(connection: sqlite3.Connection, new: list[JobWrite]) -> None:
    """Refuse the new jobs whose id, or whose owner's key, belongs to a job already."""
    if not new:
        return
    taken = connection.execute(
        "SELECT job_id, last_seq FROM jobs WHERE job_id IN (SELECT value FROM json_each(?))",
        (_json([job.job_id for job in new]),),
    ).fetchall()
    last_seq_of = dict(taken)
    keyed = [job for job in new if job.owner_key is not None]
    holder_of = _holders(connection, [job.owner_key for job in keyed if job.owner_key]) if keyed else {}
    for job in new:
        if job.job_id in last_seq_of:
            job.refusal = SequenceConflict(job.job_id, expected=0, actual=last_seq_of[job.job_id])
        elif job.owner_key is not None:
            holder = holder_of.setdefault(job.owner_key, job.job_id)
            if holder != job.job_id:
                job.refusal = DuplicateKeyError(holder)


def _holders(connection: sqlite3.Connection, keys: list[tuple[str, str]]) -> dict[tuple[str, str], str]:
    found = connection.execute(
        "SELECT jobs.owner, jobs.idempotency_key, jobs.job_id FROM json_each(?) AS wanted JOIN jobs"
        " ON jobs.owner = json_extract(wanted.value, '$[0]')"
        " AND jobs.idempotency_key = json_extract(wanted.value, '$[1]')",
        (_json(keys),),
    )
    return {(owner, key): job_id for owner, key, job_id in found}


def _purge(connection: sqlite3.Connection, step: PurgeStep) -> None:
    until = monotonic() + STEP_S
    while step.purged < step.limit:
        if monotonic() >= until:
            step.more = True
            return
        found = connection.execute(
            "SELECT json_group_array(id), count(*) FROM (SELECT id FROM jobs WHERE ended_at IS NOT NULL"
            " AND (detached = 0 OR state = 'expired') AND expires_at < ? ORDER BY expires_at LIMIT ?)",
            (step.before, min(PURGED_AT_ONCE, step.limit - step.purged)),
        ).fetchone()
        if found[1] == 0:
            break
        delete_jobs(connection, found[:1])
        step.purged += found[1]
    while connection.execute("PRAGMA freelist_count").fetchone()[0] > FREE_PAGES_KEPT:
        if monotonic() >= until:
            step.more = True
            return
        connection.execute(f"PRAGMA incremental_vacuum({PAGES_FREED_AT_ONCE})").fetchall()


def insert_new(connection: sqlite3.Connection, jobs: list[JobWrite]) -> LogError | None:
    """Insert new jobs and their events, all of them or, as the answer then says why, none."""
    _refuse_taken(connection, jobs)
    for job in jobs:
        if job.refusal is not None:
            return job.refusal
    _insert(connection, JOB_INSERT, len(JOB_COLUMNS), (job.row for job in jobs))
    _insert(connection, EVENT_INSERT, len(EVENT_COLUMNS), _event_values(jobs))
    return None


def delete_jobs(connection: sqlite3.Connection, numbers: tuple[str]) -> None:
    """Delete jobs and their events; ``numbers`` is a JSON array of the jobs' rows."""
    connection.execute(EVENTS_DELETE, numbers)
    connection.execute("DELETE FROM jobs WHERE id IN (SELECT value FROM json_each(?))", numbers)


def _json(value: object) -> str:
    return orjson.dumps(value).decode()
