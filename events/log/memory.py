"""The event log in a dict: fast, complete, and gone with the process."""

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
from events.log.content import content_bytes
from events.log.deadlines import Deadlines
from events.log.follow import Bells, Follower
from events.log.memory_items import MemoryItems
from events.log.memory_job import MemoryJob
from events.log.memory_records import MemoryRecords
from events.log.records import RecordLog
from events.projections import JobSnapshot, fold
from events.state import JobState
from events.types import Event, FramesReceived, JobAccepted, StoredEvent


class MemoryLog:
    """:class:`~events.log.base.EventLog` in memory. Nothing waits, nothing checkpoints, nothing survives."""

    durable = False

    def __init__(self) -> None:
        self._jobs: dict[str, MemoryJob] = {}
        self._holders: dict[tuple[str, str], str] = {}
        self._due = Deadlines()
        self._spent = Deadlines()
        self._bells = Bells()
        self._held_bytes = 0
        self._closed = False
        self.records: RecordLog = MemoryRecords(
            closed=lambda: self._closed,
            jobs=lambda: [job.current() for job in self._jobs.values()],
        )
        self.items = MemoryItems(self, known=self._known)

    @property
    def held_bytes(self) -> int:
        """Bytes of bodies, frames and messages held."""
        return self._held_bytes

    def _job(self, job_id: str) -> MemoryJob:
        try:
            return self._jobs[job_id]
        except KeyError:
            raise UnknownJobError(f"no job {job_id}") from None

    def _known(self, job_id: str) -> JobSnapshot | None:
        job = self._jobs.get(job_id)
        return job.current() if job else None

    def _writable(self, job_id: str, expected_seq: int) -> MemoryJob:
        if self._closed:
            raise LogUnavailableError("the log is closed")
        job = self._jobs.get(job_id)
        actual = job.seq if job else 0
        if actual != expected_seq:
            raise SequenceConflict(job_id, expected=expected_seq, actual=actual)
        return job or MemoryJob(job_id)

    async def append(
        self, job_id: str, events: Sequence[Event], expected_seq: int, *, deferred: bool = False
    ) -> int:
        """See the port."""
        job = self._writable(job_id, expected_seq)
        snapshot = fold(job.current() if job.seq else None, job_id, events)
        self._claim_key(job, events[0])
        job.stated = snapshot
        job.frames = snapshot.frames
        for event in events:
            job.add(event)
            self._held_bytes += content_bytes(event)
        self._jobs[job_id] = job
        if job.key is not None:
            self._holders[job.key] = job_id
        if snapshot.ended:
            self._settle(job, snapshot)
        self._bells.ring(job_id)
        return job.seq

    async def settle(self, job_id: str, *, frames: bool = False) -> None:
        """See the port."""

    def _claim_key(self, job: MemoryJob, event: Event) -> None:
        if isinstance(event, JobAccepted) and event.idempotency_key is not None:
            job.key = (event.owner, event.idempotency_key)
            if job.key in self._holders:
                raise DuplicateKeyError(self._holders[job.key])

    def _release_key(self, job: MemoryJob) -> None:
        if job.key is not None:
            self._holders.pop(job.key, None)
            job.key = None

    def _settle(self, job: MemoryJob, snapshot: JobSnapshot) -> None:
        """Note until when an ended job keeps its result; drop what an expired one had."""
        job_id, expired = snapshot.job_id, snapshot.state is JobState.EXPIRED
        at = snapshot.expires_at or 0.0
        if snapshot.detached and not expired:
            job.pack()
            if snapshot.batch_id is not None:
                # Its result goes with its batch.
                return
            self._due.set(job_id, at)
            return
        self._due.remove(job_id)
        self._spent.set(job_id, at)
        if expired:
            self._release_key(job)
            self._redact(job)

    async def append_frames(
        self, job_id: str, attempt: int, frames: Sequence[bytes], expected_seq: int, at: float
    ) -> int:
        """See the port."""
        job = self._writable(job_id, expected_seq)
        snapshot = job.stated
        if snapshot is None or snapshot.state is not JobState.PROCESSING or snapshot.attempt != attempt:
            raise IllegalTransition(f"job {job_id} has no attempt {attempt} under way")
        run = FramesReceived(at=at, attempt=attempt, first=job.frames + 1, frames=tuple(frames))
        job.add(run)
        job.frames = run.last
        self._held_bytes += content_bytes(run)
        self._bells.ring(job_id)
        return job.seq

    async def read(self, job_id: str, after: int = 0, limit: int = 1000) -> list[StoredEvent]:
        """See the port."""
        return self._job(job_id).read(after, limit)

    async def read_frames(self, job_id: str, after: FrameCursor, max_bytes: int = 1 << 18) -> FrameRun | None:
        """See the port."""
        return self._job(job_id).read_frames(after, max_bytes)

    @contextmanager
    def follow(self, job_id: str, after: int = 0) -> Iterator[Follower]:
        """See the port."""
        with self._bells.hang(job_id) as bell:
            yield Follower(partial(self.read, job_id), partial(self._has_ended, job_id), bell, after)

    async def _has_ended(self, job_id: str) -> bool:
        return self._job(job_id).current().ended

    async def snapshot(self, job_id: str) -> JobSnapshot:
        """See the port."""
        return self._job(job_id).current()

    async def unfinished(self) -> list[JobSnapshot]:
        """See the port."""
        snapshots = (job.current() for job in self._jobs.values())
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
            self._job(cursor)
        ids: Iterator[str] = reversed(self._jobs) if newer_first else iter(self._jobs)
        if cursor is not None:
            for job_id in ids:
                if job_id == cursor:
                    break
        jobs: list[JobSnapshot] = []
        for job_id in ids:
            snapshot = _listed(self._jobs[job_id])
            if _matches(where, snapshot):
                if len(jobs) == limit:
                    return Page(jobs if newer_first else jobs[::-1], has_more=True)
                jobs.append(snapshot)
        return Page(jobs if newer_first else jobs[::-1], has_more=False)

    async def due(self, now: float, limit: int) -> list[JobSnapshot]:
        """See the port."""
        return [_listed(self._jobs[job_id]) for _, job_id in self._due.until(now, limit)]

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
        job = self._jobs.get(job_id)
        if job is not None:
            self._redact(job)

    def _redact(self, job: MemoryJob) -> None:
        if self._release(job):
            job.redact()

    async def forget(self, job_id: str) -> None:
        """See the port."""
        job = self._jobs.pop(job_id, None)
        if job is not None:
            self._release(job)
            self._release_key(job)
            self._due.remove(job_id)
            self._spent.remove(job_id)
            self._bells.ring(job_id)

    def _release(self, job: MemoryJob) -> int:
        """Count the content of a job as gone; how much that is."""
        size = job.content_bytes()
        self._held_bytes -= size
        return size

    async def aclose(self) -> None:
        """See the port."""
        self._closed = True


def _listed(job: MemoryJob) -> JobSnapshot:
    snapshot = job.current()
    return replace(snapshot, message=b"") if snapshot.message else snapshot


def _matches(where: JobFilter, snapshot: JobSnapshot) -> bool:
    return (
        snapshot.state is not JobState.EXPIRED
        and (where.owner is None or snapshot.owner == where.owner)
        and (where.states is None or snapshot.state in where.states)
        and (where.model is None or snapshot.model == where.model)
    )
