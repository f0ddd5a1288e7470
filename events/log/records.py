"""Streams of events about things other than jobs: a batch, the delivery of a webhook.

They live in the same log as the jobs' events, and are committed as those are. Guarantees every adapter
gives (``tests/contracts/test_records.py`` holds them to it):

* ``append`` is all or nothing, and durable when it returns, as far as the log is durable at all.
* A record's ``seq`` counts 1, 2, 3... without holes. A writer that has not seen the last event is refused.
* Cancelling a write leaves it either done or not done, never half; the caller finds out with ``get``.

What the events mean is their kind's affair: the log keeps them, and the state they lead to, as bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """Where a stream of events stands: what lists and searches need, kept beside its events."""

    record_id: str
    """Unique over all kinds."""
    kind: str
    owner: str
    created_at: float
    """Unix seconds."""
    last_seq: int
    open: bool
    """Whether work is left: such records are read back at start."""
    due_at: float | None
    """When somebody must act on it next; once closed, when it may be forgotten. Unix seconds."""
    state: bytes
    """The fold of its events as JSON, so that lists need not read events."""
    subject: str = ""
    """What it is about (a delivery: its job); empty: nothing that is searched for."""


class StoredRecordEvent(NamedTuple):
    """An event of a record as the log holds it."""

    record_id: str
    seq: int
    """1, 2, 3... per record, without holes."""
    fact: bytes
    """JSON, encoded by the codec of the record's kind."""


class RecordPage(NamedTuple):
    """A page of records, newest first."""

    records: list[Record]
    has_more: bool


class RecordLog(Protocol):
    """Where records and their events are kept."""

    async def append(self, record: Record, facts: Sequence[bytes], expected_seq: int) -> None:
        """Append ``facts`` (at least one); ``record`` is the state after them.

        ``expected_seq`` is the last ``seq`` the writer knows of (0 for a new record), and ``record.last_seq``
        is that many more. What a record is (kind, owner, subject, created_at) stays as it was first given.
        Raises ValueError where the numbers do not add up; SequenceConflict, and appends nothing then;
        LogUnavailableError when it cannot be written.
        """
        ...

    async def read(self, record_id: str, after: int = 0, limit: int = 1000) -> list[StoredRecordEvent]:
        """Up to ``limit`` events with ``seq > after``, in order. Raises UnknownRecordError."""
        ...

    async def get(self, record_id: str) -> Record:
        """The record as of its last event. Raises UnknownRecordError."""
        ...

    async def open(self, kind: str) -> list[Record]:
        """Those with work left, in the order of creation."""
        ...

    async def page(
        self,
        kind: str,
        owner: str | None,
        *,
        limit: int,
        after_id: str | None = None,
        before_id: str | None = None,
    ) -> RecordPage:
        """Records newest first: ``limit`` older than ``after_id``, or ``limit`` newer than ``before_id``.

        ``owner`` None: everybody's. Raises UnknownRecordError when the cursor names no record of this kind.
        """
        ...

    async def due(self, kind: str, now: float, limit: int) -> list[Record]:
        """Up to ``limit`` records with ``due_at <= now`` (Unix seconds), earliest first, open or closed."""
        ...

    async def next_due(self, kind: str) -> float | None:
        """The earliest ``due_at``, open or closed; None without one."""
        ...

    async def about(self, kind: str, subject: str) -> list[Record]:
        """Those with this subject, in the order of creation."""
        ...

    async def forget(self, record_id: str) -> None:
        """Drop the record and its events. Idempotent; unknown records are ignored."""
        ...
