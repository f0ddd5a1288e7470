"""The records of the SQLite log: events of batches and deliveries, in the file and the commits of the jobs'.

Memory knows nothing of a record: the writer checks, in the transaction that appends, what its last event is.
"""

import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from events.errors import LogError, SequenceConflict, UnknownRecordError
from events.log.memory_records import check_append
from events.log.records import Record, RecordPage, StoredRecordEvent
from events.log.sqlite_commit import WRITE_OVERHEAD_BYTES, GroupCommit, Write
from events.log.sqlite_reader import Readers
from events.log.sqlite_writer import Step

_FIXED = ("record_id", "kind", "owner", "subject", "created_at")
_CHANGING = ("last_seq", "open", "due_at", "state")
_COLUMNS = ", ".join(_FIXED + _CHANGING)
_RECORD = f"SELECT {_COLUMNS} FROM records"  # noqa: S608 - constants
_UPSERT = (
    f"INSERT INTO records ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"  # noqa: S608 - constants
    f" ON CONFLICT (record_id) DO UPDATE SET {', '.join(f'{name} = excluded.{name}' for name in _CHANGING)}"
)
UNANNOUNCED = (
    "SELECT job_id FROM jobs WHERE webhook IS NOT NULL AND ended_at IS NOT NULL AND NOT EXISTS"
    " (SELECT 1 FROM records WHERE kind = ? AND subject = jobs.job_id AND subject <> '')"
    # With the plus it sorts the few jobs that have a webhook; without, it reads all there are in order.
    " ORDER BY +id LIMIT ?"
)


class SqliteRecords:
    """:class:`~events.log.records.RecordLog` in a SQLite log's file. Cancellation is as for jobs."""

    def __init__(self, commit: GroupCommit, readers: Readers) -> None:
        self._commit = commit
        self._readers = readers

    async def append(self, record: Record, facts: Sequence[bytes], expected_seq: int) -> None:
        """See the port."""
        check_append(record, facts, expected_seq)
        size = WRITE_OVERHEAD_BYTES + len(record.state) + sum(map(len, facts))
        await self._write(record.record_id, _Append(record, facts, expected_seq), size)

    async def forget(self, record_id: str) -> None:
        """See the port."""
        await self._write(record_id, _Forget(record_id), WRITE_OVERHEAD_BYTES)

    async def _write(self, record_id: str, step: Step, size: int) -> None:
        turn = await self._commit.take_turn(record_id)
        write = Write(job_id=record_id, done=turn, on_disk=_nothing, size=size, step=step)
        try:
            self._commit.put(write)
        except LogError:
            self._commit.end_turn(record_id)
            raise
        await self._commit.outcome(write)

    async def read(self, record_id: str, after: int = 0, limit: int = 1000) -> list[StoredRecordEvent]:
        """See the port."""
        return await self._readers.run(partial(_events, record_id, after, limit))

    async def get(self, record_id: str) -> Record:
        """See the port."""
        return await self._readers.run(partial(_get, record_id))

    async def open(self, kind: str) -> list[Record]:
        """See the port."""
        return await self._readers.run(partial(_select, "kind = ? AND open = 1 ORDER BY id", (kind,)))

    async def page(
        self,
        kind: str,
        owner: str | None,
        *,
        limit: int,
        after_id: str | None = None,
        before_id: str | None = None,
    ) -> RecordPage:
        """See the port."""
        return await self._readers.run(
            partial(_page, kind, owner, limit=limit, after_id=after_id, before_id=before_id)
        )

    async def due(self, kind: str, now: float, limit: int) -> list[Record]:
        """See the port."""
        where = "kind = ? AND due_at <= ? ORDER BY due_at LIMIT ?"
        return await self._readers.run(partial(_select, where, (kind, now, limit)))

    async def next_due(self, kind: str) -> float | None:
        """See the port."""
        return await self._readers.run(partial(_next_due, kind))

    async def about(self, kind: str, subject: str) -> list[Record]:
        """See the port."""
        where = "kind = ? AND subject = ? AND subject <> '' ORDER BY id"
        return await self._readers.run(partial(_select, where, (kind, subject)))

    async def unannounced(self, kind: str, limit: int) -> list[str]:
        """See the port."""
        return await self._readers.run(partial(_unannounced, kind, limit))


def _nothing() -> None:
    """What the write of a record changes in memory."""


@dataclass(eq=False, slots=True)
class _Append:
    record: Record
    facts: Sequence[bytes]
    expected_seq: int
    refusal: LogError | None = None

    def write(self, connection: sqlite3.Connection) -> None:
        record = self.record
        found = connection.execute(
            "SELECT last_seq FROM records WHERE record_id = ?", (record.record_id,)
        ).fetchone()
        actual = found[0] if found else 0
        if actual != self.expected_seq:
            self.refusal = SequenceConflict(record.record_id, expected=self.expected_seq, actual=actual)
            return
        connection.execute(_UPSERT, _row(record))
        (number,) = connection.execute(
            "SELECT id FROM records WHERE record_id = ?", (record.record_id,)
        ).fetchone()
        connection.executemany(
            "INSERT INTO record_events (record, seq, fact) VALUES (?, ?, ?)",
            [(number, seq, fact) for seq, fact in enumerate(self.facts, self.expected_seq + 1)],
        )


@dataclass(eq=False, slots=True)
class _Forget:
    record_id: str
    refusal: LogError | None = None

    def write(self, connection: sqlite3.Connection) -> None:
        connection.execute(
            "DELETE FROM record_events WHERE record IN (SELECT id FROM records WHERE record_id = ?)",
            (self.record_id,),
        )
        connection.execute("DELETE FROM records WHERE record_id = ?", (self.record_id,))


def _row(record: Record) -> tuple[Any, ...]:
    return (
        record.record_id,
        record.kind,
        record.owner,
        record.subject,
        record.created_at,
        record.last_seq,
        int(record.open),
        record.due_at,
        record.state,
    )


def _records(rows: Iterable[tuple[Any, ...]]) -> list[Record]:
    return [
        Record(
            record_id=record_id,
            kind=kind,
            owner=owner,
            subject=subject,
            created_at=created_at,
            last_seq=last_seq,
            open=bool(is_open),
            due_at=due_at,
            state=state,
        )
        for record_id, kind, owner, subject, created_at, last_seq, is_open, due_at, state in rows
    ]


def _select(where: str, values: tuple[object, ...], connection: sqlite3.Connection) -> list[Record]:
    return _records(connection.execute(f"{_RECORD} WHERE {where}", values))


def _get(record_id: str, connection: sqlite3.Connection) -> Record:
    found = _select("record_id = ?", (record_id,), connection)
    if not found:
        raise UnknownRecordError(f"no record {record_id}")
    return found[0]


def _number(record_id: str, kind: str | None, connection: sqlite3.Connection) -> int:
    """Its row. ``kind`` None: of any kind. Raises UnknownRecordError."""
    row = connection.execute("SELECT id, kind FROM records WHERE record_id = ?", (record_id,)).fetchone()
    if row is None or kind not in (None, row[1]):
        raise UnknownRecordError(f"no record {record_id}")
    return int(row[0])


def _events(
    record_id: str, after: int, limit: int, connection: sqlite3.Connection
) -> list[StoredRecordEvent]:
    rows = connection.execute(
        "SELECT seq, fact FROM record_events WHERE record = ? AND seq > ? ORDER BY seq LIMIT ?",
        (_number(record_id, None, connection), after, limit),
    )
    return [StoredRecordEvent(record_id, seq, fact) for seq, fact in rows]


def _page(
    kind: str,
    owner: str | None,
    connection: sqlite3.Connection,
    *,
    limit: int,
    after_id: str | None,
    before_id: str | None,
) -> RecordPage:
    newer_first = before_id is None
    cursor = after_id if newer_first else before_id
    terms, values = ["kind = ?"], list[object]([kind])
    if owner is not None:
        terms.append("owner = ?")
        values.append(owner)
    if cursor is not None:
        terms.append(f"id {'<' if newer_first else '>'} ?")
        values.append(_number(cursor, kind, connection))
    order = "DESC" if newer_first else "ASC"
    where = f"{' AND '.join(terms)} ORDER BY id {order} LIMIT ?"
    found = _select(where, (*values, limit + 1), connection)
    page = found[:limit]
    return RecordPage(page if newer_first else page[::-1], has_more=len(found) > limit)


def _next_due(kind: str, connection: sqlite3.Connection) -> float | None:
    (at,) = connection.execute(
        "SELECT min(due_at) FROM records WHERE kind = ? AND due_at IS NOT NULL", (kind,)
    ).fetchone()
    return None if at is None else float(at)


def _unannounced(kind: str, limit: int, connection: sqlite3.Connection) -> list[str]:
    return [job_id for (job_id,) in connection.execute(UNANNOUNCED, (kind, limit))]
