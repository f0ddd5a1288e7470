"""The items of batches in the SQLite log: what is done to many jobs at once, in few statements.

An item that waits is a row, and nothing in memory; the log takes it up with the first append to it.
"""

import sqlite3
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from time import monotonic

import orjson
import trio

from events.batches import ItemCounts, item_result
from events.codec import encode
from events.errors import LogError
from events.log.content import content_bytes
from events.log.items import Item, NewItem
from events.log.sqlite_commit import WRITE_OVERHEAD_BYTES, GroupCommit, Write
from events.log.sqlite_reader import Readers
from events.log.sqlite_rows import JOB_COLUMNS, MESSAGE, event_rows, job_row, snapshot_of
from events.log.sqlite_schema import SEQ_BITS
from events.log.sqlite_writer import PURGED_AT_ONCE, STEP_S, JobWrite, Step, delete_jobs, insert_new
from events.projections import JobSnapshot, apply, cancelled_failure
from events.state import JobState
from events.types import JobCancelled, JobFailed

_ITEM = f"SELECT {', '.join(JOB_COLUMNS)} FROM jobs"  # noqa: S608 - constants
_WAITING = "batch_id = ? AND state = 'pending' AND lapsed = 0"


class SqliteItems:
    """:class:`~events.log.items.ItemLog` in a SQLite log's file. Cancellation is as for jobs."""

    def __init__(
        self,
        commit: GroupCommit,
        readers: Readers,
        *,
        take_number: Callable[[], int],
        ring_all: Callable[[], None],
    ) -> None:
        """``ring_all`` wakes whoever follows any job."""
        self._commit = commit
        self._readers = readers
        self._take_number = take_number
        self._ring_all = ring_all

    async def accept(self, items: Sequence[NewItem]) -> None:
        """See the port."""
        await self._write(
            _Accept([self._new(item) for item in items]),
            sum(WRITE_OVERHEAD_BYTES + sum(map(content_bytes, item.events)) for item in items),
        )

    def _new(self, item: NewItem) -> JobWrite:
        job: JobSnapshot | None = None
        for event in item.events:
            job = apply(job, item.job_id, event)
        if job is None:
            raise ValueError("an item has at least one event")
        number = self._take_number()
        return JobWrite(
            job_id=item.job_id,
            number=number,
            row=job_row(number, job, key=None, message_seq=None),
            new=True,
            events=event_rows(1, item.events),
        )

    async def end_waiting(
        self, batch_id: str, event: JobCancelled | JobFailed, *, but: Collection[str], limit: int
    ) -> int:
        """See the port."""
        step = _EndWaiting(batch_id, event, but, limit)
        await self._write(step, WRITE_OVERHEAD_BYTES)
        self._ring_all()
        return step.ended

    async def forget(self, batch_id: str, limit: int) -> int:
        """See the port."""
        forgotten, more = 0, True
        while more and forgotten < limit:
            step = _Forget(batch_id, limit - forgotten)
            await self._write(step, WRITE_OVERHEAD_BYTES)
            forgotten += step.forgotten
            more = step.more
        self._ring_all()
        return forgotten

    async def _write(self, step: Step, size: int) -> None:
        write = Write(done=trio.Event(), on_disk=_nothing, size=size, step=step)
        self._commit.put(write)
        await self._commit.outcome(write)

    async def counts(self, batch_id: str) -> ItemCounts:
        """See the port."""
        return await self._readers.run(partial(_counts, batch_id))

    async def waiting(self, batch_id: str, after: int, limit: int) -> list[Item]:
        """See the port."""
        where = f"{_WAITING} AND id > ? ORDER BY id LIMIT ?"
        return await self._readers.run(partial(_select, where, (batch_id, after, limit)))

    async def begun(self, batch_id: str) -> list[JobSnapshot]:
        """See the port."""
        where = "batch_id = ? AND state = 'processing' AND lapsed = 0 ORDER BY id"
        return [item.job for item in await self._readers.run(partial(_select, where, (batch_id,)))]

    async def results(self, batch_id: str, after: int, *, limit: int, max_bytes: int) -> list[Item]:
        """See the port."""
        return await self._readers.run(partial(_results, batch_id, after, limit, max_bytes))

    async def orphans(self) -> list[str]:
        """See the port."""
        return await self._readers.run(_orphans)


def _nothing() -> None:
    """What a write of items changes in memory."""


@dataclass(eq=False, slots=True)
class _Accept:
    jobs: list[JobWrite]
    refusal: LogError | None = None

    def write(self, connection: sqlite3.Connection) -> None:
        self.refusal = insert_new(connection, self.jobs)


@dataclass(eq=False, slots=True)
class _EndWaiting:
    batch_id: str
    event: JobCancelled | JobFailed
    but: Collection[str]
    limit: int
    ended: int = 0
    refusal: LogError | None = None

    def write(self, connection: sqlite3.Connection) -> None:
        numbers, self.ended = connection.execute(
            f"SELECT json_group_array(id), count(*) FROM (SELECT id FROM jobs WHERE {_WAITING}"  # noqa: S608
            " AND job_id NOT IN (SELECT value FROM json_each(?)) ORDER BY id LIMIT ?)",
            (self.batch_id, orjson.dumps(list(self.but)).decode(), self.limit),
        ).fetchone()
        event = self.event
        cancelled = isinstance(event, JobCancelled)
        failure = cancelled_failure(event) if isinstance(event, JobCancelled) else event.failure
        connection.execute(
            f"INSERT INTO events (id, fact) SELECT (id << {SEQ_BITS}) + last_seq + 1, ? FROM jobs"  # noqa: S608
            " WHERE id IN (SELECT value FROM json_each(?))",
            (encode(event), numbers),
        )
        connection.execute(
            "UPDATE jobs SET state = ?, lapsed = ?, last_seq = last_seq + 1, ended_at = ?,"
            " expires_at = ? + result_ttl_s, failure = ? WHERE id IN (SELECT value FROM json_each(?))",
            (
                (JobState.CANCELLED if cancelled else JobState.FAILED).value,
                int(isinstance(event, JobCancelled) and event.lapsed),
                event.at,
                event.at,
                orjson.dumps([failure.status, failure.type, failure.message, failure.headers]).decode(),
                numbers,
            ),
        )


@dataclass(eq=False, slots=True)
class _Forget:
    batch_id: str
    limit: int
    forgotten: int = 0
    more: bool = False
    """It ran out of time, not of work."""
    refusal: LogError | None = None

    def write(self, connection: sqlite3.Connection) -> None:
        until = monotonic() + STEP_S
        while self.forgotten < self.limit:
            if monotonic() >= until:
                self.more = True
                return
            found = connection.execute(
                "SELECT json_group_array(id), count(*)"
                " FROM (SELECT id FROM jobs WHERE batch_id = ? ORDER BY id LIMIT ?)",
                (self.batch_id, min(PURGED_AT_ONCE, self.limit - self.forgotten)),
            ).fetchone()
            if found[1] == 0:
                return
            delete_jobs(connection, found[:1])
            self.forgotten += found[1]


def _select(where: str, values: tuple[object, ...], connection: sqlite3.Connection) -> list[Item]:
    return [Item(row[0], snapshot_of(row)) for row in connection.execute(f"{_ITEM} WHERE {where}", values)]


def _counts(batch_id: str, connection: sqlite3.Connection) -> ItemCounts:
    counts: Counter[str] = Counter()
    for state, lapsed, count in connection.execute(
        "SELECT state, lapsed, count(*) FROM jobs WHERE batch_id = ? GROUP BY state, lapsed", (batch_id,)
    ):
        counts[item_result(JobState(state), lapsed=bool(lapsed)).value] += count
    return ItemCounts(**counts)


def _results(
    batch_id: str, after: int, limit: int, max_bytes: int, connection: sqlite3.Connection
) -> list[Item]:
    found: list[Item] = []
    size = 0
    rows = connection.execute(
        f"SELECT {', '.join(JOB_COLUMNS)}, {MESSAGE}"  # noqa: S608 - constants
        " FROM jobs WHERE batch_id = ? AND id > ? AND ended_at IS NOT NULL ORDER BY id LIMIT ?",
        (batch_id, after, limit),
    )
    with closing(rows):
        for row in rows:
            found.append(Item(row[0], snapshot_of(row[:-1], row[-1] or b"")))
            size += len(row[-1] or b"")
            if size >= max_bytes:
                break
    return found


def _orphans(connection: sqlite3.Connection) -> list[str]:
    # From one batch to the next by the index: there are far more items than batches.
    rows = connection.execute(
        """
        WITH RECURSIVE batches (id) AS (
            SELECT min(batch_id) FROM jobs WHERE batch_id IS NOT NULL
            UNION ALL
            SELECT (SELECT min(batch_id) FROM jobs WHERE batch_id > batches.id) FROM batches
            WHERE batches.id IS NOT NULL
        )
        SELECT id FROM batches
        WHERE id IS NOT NULL AND NOT EXISTS (SELECT 1 FROM records WHERE record_id = batches.id)
        """
    )
    return [batch_id for (batch_id,) in rows]
