"""The event log in a dict: fast, complete, and gone with the process."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

from events.errors import IllegalTransition, LogUnavailableError, SequenceConflict, UnknownJobError
from events.log.base import FrameCursor, FrameRun, JobFilter, Page
from events.log.follow import Bells, Follower
from events.projections import JobSnapshot, apply
from events.state import JobState
from events.types import Event, FramesReceived, JobAccepted, JobCompleted, StoredEvent


class _Record:
    """One job. ``snapshot`` lags behind in ``last_seq`` and ``frames``; :meth:`current` fills them in."""

    __slots__ = ("events", "frames", "runs", "snapshot")

    def __init__(self) -> None:
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
        self._bells = Bells()
        self._held_bytes = 0
        self._closed = False

    @property
    def held_bytes(self) -> int:
        """Bytes of bodies, frames and messages held."""
        return self._held_bytes

    def _record(self, job_id: str) -> _Record:
        try:
            return self._records[job_id]
        except KeyError:
            raise UnknownJobError(f"no job {job_id}") from None

    def _writable(self, job_id: str, expected_seq: int) -> _Record:
        if self._closed:
            raise LogUnavailableError("the log is closed")
        record = self._records.get(job_id)
        actual = len(record.events) if record else 0
        if actual != expected_seq:
            raise SequenceConflict(job_id, expected=expected_seq, actual=actual)
        return record or _Record()

    async def append(self, job_id: str, events: Sequence[Event], expected_seq: int) -> int:
        """See the port."""
        record = self._writable(job_id, expected_seq)
        snapshot = record.current() if record.events else None
        for event in events:
            snapshot = apply(snapshot, job_id, event)
        record.snapshot = snapshot
        record.frames = snapshot.frames if snapshot else 0
        seq = expected_seq
        for event in events:
            seq += 1
            record.events.append(StoredEvent(job_id, seq, event))
            self._held_bytes += _content_bytes(event)
        self._records[job_id] = record
        self._bells.ring(job_id)
        return seq

    async def append_frames(
        self, job_id: str, attempt: int, frames: Sequence[bytes], expected_seq: int, at: float
    ) -> int:
        """See the port."""
        record = self._writable(job_id, expected_seq)
        snapshot = record.snapshot
        if snapshot is None or snapshot.state is not JobState.PROCESSING or snapshot.attempt != attempt:
            raise IllegalTransition(f"job {job_id} has no attempt {attempt} under way")
        runs = record.runs.setdefault(attempt, [])
        first = runs[-1].last + 1 if runs else 1
        run = FramesReceived(at=at, attempt=attempt, first=first, frames=tuple(frames))
        runs.append(run)
        record.events.append(StoredEvent(job_id, expected_seq + 1, run))
        record.frames = run.last
        self._held_bytes += _content_bytes(run)
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
        return [snapshot for snapshot in snapshots if not snapshot.ended]

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
            snapshot = self._records[job_id].current()
            if _matches(where, snapshot):
                if len(jobs) == limit:
                    return Page(jobs if newer_first else jobs[::-1], has_more=True)
                jobs.append(snapshot)
        return Page(jobs if newer_first else jobs[::-1], has_more=False)

    async def redact(self, job_id: str) -> None:
        """See the port."""
        record = self._records.get(job_id)
        if record is None:
            return
        self._release(record)
        record.runs.clear()
        record.events = [
            StoredEvent(job_id, stored.seq, _without_content(stored.event)) for stored in record.events
        ]
        record.snapshot = replace(record.current(), message=b"")

    async def forget(self, job_id: str) -> None:
        """See the port."""
        record = self._records.pop(job_id, None)
        if record is not None:
            self._release(record)
            self._bells.ring(job_id)

    def _release(self, record: _Record) -> None:
        self._held_bytes -= sum(_content_bytes(stored.event) for stored in record.events)

    async def aclose(self) -> None:
        """See the port."""
        self._closed = True


def _content_bytes(event: Event) -> int:
    match event:
        case JobAccepted():
            return len(event.body)
        case FramesReceived():
            return sum(map(len, event.frames))
        case JobCompleted():
            return len(event.message)
        case _:
            return 0


def _without_content(event: Event) -> Event:
    match event:
        case JobAccepted():
            return replace(event, body=b"")
        case FramesReceived():
            return replace(event, frames=())
        case JobCompleted():
            return replace(event, message=b"")
        case _:
            return event


def _matches(where: JobFilter, snapshot: JobSnapshot) -> bool:
    return (
        snapshot.state is not JobState.EXPIRED
        and (where.owner is None or snapshot.owner == where.owner)
        and (where.states is None or snapshot.state in where.states)
        and (where.model is None or snapshot.model == where.model)
    )
