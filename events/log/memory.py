"""The event log in a dict: fast, complete, and gone with the process."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

from events.errors import (
    DuplicateKeyError,
    IllegalTransition,
    LogUnavailableError,
    SequenceConflict,
    UnknownJobError,
)
from events.log.base import FrameCursor, FrameRun, JobFilter, Page
from events.log.content import content_bytes, without_content
from events.log.deadlines import Deadlines
from events.log.follow import Bells, Follower
from events.log.memory_items import MemoryItems
from events.log.memory_records import MemoryRecords
from events.log.records import RecordLog
from events.projections import JobSnapshot, fold
from events.state import JobState
from events.types import Event, FramesReceived, JobAccepted, StoredEvent


class _Record:
    """One job. ``snapshot`` lags behind in ``last_seq`` and ``frames``; :meth:`current` fills them in."""

    __slots__ = ("events", "frames", "key", "runs", "snapshot")

    def __init__(self) -> None:
        self.key: tuple[str, str] | None = None
        self.events: list[StoredEvent] = []
        self.snapshot: JobSnapshot | None = None
        self.runs: dict[int, list[FramesReceived]] = {}
        self.frames = 0

    def current(self) -> JobSnapshot:
        snapshot = self.snapshot
        if snapshot is None:
            raise ValueError("a record has at least one event")
        if snapshot.last_seq == len(self.events) and snapshot.frames == self.frames:
            return snapshot
        self.snapshot = replace(snapshot, last_seq=len(self.events), frames=self.frames)
        return self.snapshot


class MemoryLog:
    """:class:`~events.log.base.EventLog` in memory. Nothing waits, nothing checkpoints, nothing survives."""

    durable = False

    def __init__(self) -> None:
        self._records: dict[str, _Record] = {}
        self._holders: dict[tuple[str, str], str] = {}
        self._due = Deadlines()
        self._spent = Deadlines()
        self._bells = Bells()
        self._held_bytes = 0
        self._closed = False
        self.records: RecordLog = MemoryRecords(
            closed=lambda: self._closed,
            jobs=lambda: [record.current() for record in self._records.values()],
        )
        self.items = MemoryItems(self, known=self._known)

    @property
    def held_bytes(self) -> int:
        """Bytes of bodies, frames and messages held."""
        return self._held_bytes

    def _record(self, job_id: str) -> _Record:
        try:
            return self._records[job_id]
        except KeyError:
            raise UnknownJobError(f"no job {job_id}") from None

    def _known(self, job_id: str) -> JobSnapshot | None:
        record = self._records.get(job_id)
        return record.current() if record else None

    def _writable(self, job_id: str, expected_seq: int) -> _Record:
        if self._closed:
            raise LogUnavailableError("the log is closed")
        record = self._records.get(job_id)
        actual = len(record.events) if record else 0
        if actual != expected_seq:
            raise SequenceConflict(job_id, expected=expected_seq, actual=actual)
        return record or _Record()

    async def append(
        self, job_id: str, events: Sequence[Event], expected_seq: int, *, deferred: bool = False
    ) -> int:
        """See the port."""
        record = self._writable(job_id, expected_seq)
        snapshot = fold(record.current() if record.events else None, job_id, events)
        self._claim_key(record, events[0])
        record.snapshot = snapshot
        record.frames = snapshot.frames
        seq = expected_seq
        for event in events:
            seq += 1
            record.events.append(StoredEvent(job_id, seq, event))
            self._held_bytes += content_bytes(event)
            if isinstance(event, FramesReceived):
                record.runs.setdefault(event.attempt, []).append(event)
        self._records[job_id] = record
        if record.key is not None:
            self._holders[record.key] = job_id
        if snapshot.ended:
            self._settle(record, snapshot)
        self._bells.ring(job_id)
        return seq

    async def settle(self, job_id: str) -> None:
        """See the port."""

    def _claim_key(self, record: _Record, event: Event) -> None:
        if isinstance(event, JobAccepted) and event.idempotency_key is not None:
            record.key = (event.owner, event.idempotency_key)
            if record.key in self._holders:
                raise DuplicateKeyError(self._holders[record.key])

    def _release_key(self, record: _Record) -> None:
        if record.key is not None:
            self._holders.pop(record.key, None)
            record.key = None

    def _settle(self, record: _Record, snapshot: JobSnapshot) -> None:
        """Note until when an ended job keeps its result; drop what an expired one had."""
        job_id, expired = snapshot.job_id, snapshot.state is JobState.EXPIRED
        at = snapshot.expires_at or 0.0
        if snapshot.detached and not expired:
            if snapshot.batch_id is not None:
                # Its result goes with its batch.
                return
            self._due.set(job_id, at)
            return
        self._due.remove(job_id)
        self._spent.set(job_id, at)
        if expired:
            self._release_key(record)
            self._redact(job_id, record)

    async def append_frames(
        self, job_id: str, attempt: int, frames: Sequence[bytes], expected_seq: int, at: float
    ) -> int:
        """See the port."""
        record = self._writable(job_id, expected_seq)
        snapshot = record.snapshot
        if snapshot is None or snapshot.state is not JobState.PROCESSING or snapshot.attempt != attempt:
            raise IllegalTransition(f"job {job_id} has no attempt {attempt} under way")
        runs = record.runs.setdefault(attempt, [])
        run = FramesReceived(at=at, attempt=attempt, first=record.frames + 1, frames=tuple(frames))
        runs.append(run)
        record.events.append(StoredEvent(job_id, expected_seq + 1, run))
        record.frames = run.last
        self._held_bytes += content_bytes(run)
        self._bells.ring(job_id)
        return expected_seq + 1

    async def read(self, job_id: str, after: int = 0, limit: int = 1000) -> list[StoredEvent]:
        """See the port."""
        return self._record(job_id).events[after : after + limit]

    async def read_frames(self, job_id: str, after: FrameCursor, max_bytes: int = 1 << 18) -> FrameRun | None:
        """See the port."""
        runs = self._record(job_id).runs.get(after.attempt)
        if not runs or runs[-1].last <= after.frame:
            return None
        index = max(0, bisect_right(runs, after.frame + 1, key=lambda run: run.first) - 1)
        first = after.frame + 1
        if runs[index].first > first:
            # What lies between was redacted.
            return None
        found: list[bytes] = []
        size = 0
        while index < len(runs) and size < max_bytes:
            run = runs[index]
            fresh = run.frames[max(0, first - run.first) :]
            found.extend(fresh)
            size += sum(map(len, fresh))
            index += 1
        return FrameRun(after.attempt, first, tuple(found)) if found else None

    @contextmanager
    def follow(self, job_id: str, after: int = 0) -> Iterator[Follower]:
        """See the port."""
        with self._bells.hang(job_id) as bell:
            yield Follower(partial(self.read, job_id), partial(self._has_ended, job_id), bell, after)

    async def _has_ended(self, job_id: str) -> bool:
        return self._record(job_id).current().ended

    async def snapshot(self, job_id: str) -> JobSnapshot:
        """See the port."""
        return self._record(job_id).current()

    async def unfinished(self) -> list[JobSnapshot]:
        """See the port."""
        snapshots = (record.current() for record in self._records.values())
        return [snapshot for snapshot in snapshots if not snapshot.ended and snapshot.batch_id is None]

    async def page(
        self,
        where: JobFilter,
        *,
        limit: int,
        after_id: str | None = None,
        before_id: str | None = None,
    ) -> Page:
        """See the port."""
        newer_first = before_id is None
        cursor = after_id if newer_first else before_id
        if cursor is not None:
            self._record(cursor)
        ids: Iterator[str] = reversed(self._records) if newer_first else iter(self._records)
        if cursor is not None:
            for job_id in ids:
                if job_id == cursor:
                    break
        jobs: list[JobSnapshot] = []
        for job_id in ids:
            snapshot = _listed(self._records[job_id])
            if _matches(where, snapshot):
                if len(jobs) == limit:
                    return Page(jobs if newer_first else jobs[::-1], has_more=True)
                jobs.append(snapshot)
        return Page(jobs if newer_first else jobs[::-1], has_more=False)

    async def due(self, now: float, limit: int) -> list[JobSnapshot]:
        """See the port."""
        return [_listed(self._records[job_id]) for _, job_id in self._due.until(now, limit)]

    async def next_deadline(self) -> float | None:
        """See the port."""
        first = self._due.first()
        return first[0] if first else None

    async def purge(self, before: float, limit: int) -> int:
        """See the port."""
        spent = [job_id for at, job_id in self._spent.until(before, limit) if at < before]
        for job_id in spent:
            await self.forget(job_id)
        return len(spent)

    async def redact(self, job_id: str) -> None:
        """See the port."""
        record = self._records.get(job_id)
        if record is not None:
            self._redact(job_id, record)

    def _redact(self, job_id: str, record: _Record) -> None:
        if not self._release(record):
            return
        record.runs.clear()
        record.events = [
            StoredEvent(job_id, stored.seq, without_content(stored.event)) for stored in record.events
        ]
        record.snapshot = replace(record.current(), message=b"")

    async def forget(self, job_id: str) -> None:
        """See the port."""
        record = self._records.pop(job_id, None)
        if record is not None:
            self._release(record)
            self._release_key(record)
            self._due.remove(job_id)
            self._spent.remove(job_id)
            self._bells.ring(job_id)

    def _release(self, record: _Record) -> int:
        """Count the content of a job as gone; how much that is."""
        size = sum(content_bytes(stored.event) for stored in record.events)
        self._held_bytes -= size
        return size

    async def aclose(self) -> None:
        """See the port."""
        self._closed = True


def _listed(record: _Record) -> JobSnapshot:
    snapshot = record.current()
    return replace(snapshot, message=b"") if snapshot.message else snapshot


def _matches(where: JobFilter, snapshot: JobSnapshot) -> bool:
    return (
        snapshot.state is not JobState.EXPIRED
        and (where.owner is None or snapshot.owner == where.owner)
        and (where.states is None or snapshot.state in where.states)
        and (where.model is None or snapshot.model == where.model)
    )
