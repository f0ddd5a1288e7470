"""The records of the memory log."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from events.errors import LogUnavailableError, SequenceConflict, UnknownRecordError
from events.log.content import trimmed
from events.log.deadlines import Deadlines
from events.log.records import Record, RecordPage, StoredRecordEvent
from events.projections import JobSnapshot


class MemoryRecords:
    """:class:`~events.log.records.RecordLog` in memory. Nothing waits, nothing checkpoints."""

    def __init__(self, *, closed: Callable[[], bool], jobs: Callable[[], Iterable[JobSnapshot]]) -> None:
        """``jobs``: those of the log, in the order of acceptance."""
        self._closed = closed
        self._jobs = jobs
        self._records: dict[str, tuple[Record, list[StoredRecordEvent]]] = {}
        """In the order of creation."""
        self._about: dict[tuple[str, str], dict[str, None]] = {}
        self._due: dict[str, Deadlines] = {}
        """By kind."""

    def _found(self, record_id: str) -> tuple[Record, list[StoredRecordEvent]]:
        try:
            return self._records[record_id]
        except KeyError:
            raise UnknownRecordError(f"no record {record_id}") from None

    async def append(self, record: Record, facts: Sequence[bytes], expected_seq: int) -> None:
        """See the port."""
        check_append(record, facts, expected_seq)
        if self._closed():
            raise LogUnavailableError("the log is closed")
        before, events = self._records.get(record.record_id, (None, []))
        actual = before.last_seq if before else 0
        if actual != expected_seq:
            raise SequenceConflict(record.record_id, expected=expected_seq, actual=actual)
        record = replace(record, state=trimmed(record.state))
        if before is not None:
            record = replace(
                record,
                kind=before.kind,
                owner=before.owner,
                subject=before.subject,
                created_at=before.created_at,
            )
        elif record.subject:
            self._about.setdefault((record.kind, record.subject), {})[record.record_id] = None
        events.extend(
            StoredRecordEvent(record.record_id, seq, trimmed(fact))
            for seq, fact in enumerate(facts, expected_seq + 1)
        )
        self._records[record.record_id] = record, events
        due = self._due.setdefault(record.kind, Deadlines())
        if record.due_at is None:
            due.remove(record.record_id)
        else:
            due.set(record.record_id, record.due_at)

    async def read(self, record_id: str, after: int = 0, limit: int = 1000) -> list[StoredRecordEvent]:
        """See the port."""
        return self._found(record_id)[1][after : after + limit]

    async def get(self, record_id: str) -> Record:
        """See the port."""
        return self._found(record_id)[0]

    async def open(self, kind: str) -> list[Record]:
        """See the port."""
        return [record for record, _ in self._records.values() if record.kind == kind and record.open]

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
        newer_first = before_id is None
        cursor = after_id if newer_first else before_id
        if cursor is not None and self._found(cursor)[0].kind != kind:
            raise UnknownRecordError(f"no record {cursor}")
        ids: Iterable[str] = reversed(self._records) if newer_first else self._records
        passed = cursor is None
        found: list[Record] = []
        for record_id in ids:
            record, _ = self._records[record_id]
            if passed and record.kind == kind and owner in (None, record.owner):
                found.append(record)
                if len(found) > limit:
                    break
            passed = passed or record_id == cursor
        page = found[:limit]
        return RecordPage(page if newer_first else page[::-1], has_more=len(found) > limit)

    async def due(self, kind: str, now: float, limit: int) -> list[Record]:
        """See the port."""
        due = self._due.get(kind)
        return [self._records[record_id][0] for _, record_id in due.until(now, limit)] if due else []

    async def next_due(self, kind: str) -> float | None:
        """See the port."""
        due = self._due.get(kind)
        first = due.first() if due else None
        return first[0] if first else None

    async def about(self, kind: str, subject: str) -> list[Record]:
        """See the port."""
        return [self._records[record_id][0] for record_id in self._about.get((kind, subject), ())]

    async def forget(self, record_id: str) -> None:
        """See the port."""
        record, _ = self._records.pop(record_id, (None, None))
        if record is None:
            return
        self._due[record.kind].remove(record_id)
        about = self._about.get((record.kind, record.subject), {})
        about.pop(record_id, None)
        if not about:
            self._about.pop((record.kind, record.subject), None)

    async def unannounced(self, kind: str, limit: int) -> list[str]:
        """See the port."""
        return [
            job.job_id
            for job in self._jobs()
            if job.webhook is not None and job.ended and (kind, job.job_id) not in self._about
        ][:limit]


def check_append(record: Record, facts: Sequence[bytes], expected_seq: int) -> None:
    """Raise ValueError for an append that contradicts itself."""
    if not facts or record.last_seq != expected_seq + len(facts):
        raise ValueError("a record's last seq counts all of its events, and an append has at least one")
