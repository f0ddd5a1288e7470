"""The event log in one SQLite file: durable, for one process.

A write is checked against what memory knows of its job, queued, and told when it is on disk
(:mod:`events.log.sqlite_commit`). A job has one write under way at a time (its *turn*). Frames wait in
memory, where readers find them, for their job's next append or for the next flush.
"""

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from os import PathLike
from pathlib import Path

import trio

from events.errors import IllegalTransition, LogUnavailableError, SequenceConflict, UnknownJobError
from events.log import sqlite_reader as reader
from events.log.base import FrameCursor, FrameRun, JobFilter, Page
from events.log.content import content_bytes
from events.log.follow import Bells, Follower
from events.log.sqlite_commit import WRITE_OVERHEAD_BYTES, GroupCommit, Write
from events.log.sqlite_file import LogFile, SqliteOptions, open_file
from events.log.sqlite_items import SqliteItems
from events.log.sqlite_live import EVENT_OVERHEAD_BYTES, LiveJob, LogStatistics, event_bytes
from events.log.sqlite_records import SqliteRecords
from events.log.sqlite_rows import event_rows, job_row, message_seq
from events.log.sqlite_schema import MIGRATIONS, Migration
from events.log.sqlite_writer import JobWrite, PurgeStep
from events.projections import JobSnapshot, fold
from events.state import JobState
from events.types import Event, FramesReceived, JobAccepted, StoredEvent


@asynccontextmanager
async def open_sqlite_log(
    path: str | PathLike[str],
    *,
    options: SqliteOptions | None = None,
    migrations: Sequence[Migration] = MIGRATIONS,
    on_migration: Callable[[int], None] | None = None,
) -> "AsyncIterator[SqliteLog]":
    """The log in the file at ``path``, made where there is none, migrated where it is older.

    Raises LogOpenError, and leaves a file it cannot read as it is. Needs no nursery. Leaving closes the log
    as :meth:`SqliteLog.aclose` does, also when cancelled. ``on_migration`` is called, in another thread, with
    the bytes of a file that is about to be migrated.
    """
    options = options or SqliteOptions()
    file = await trio.to_thread.run_sync(open_file, Path(path), migrations, on_migration)
    log = SqliteLog(file, options)
    try:
        yield log
    finally:
        await log.aclose()


class SqliteLog:
    """:class:`~events.log.base.EventLog` in one file. Made by :func:`open_sqlite_log`.

    Cancelling a write that is queued undoes it; one that is at the writer goes on. Reads see every write
    that has returned. Reads and writes of a job that has ended go to the disk; one that has not is known.
    """

    durable = True

    def __init__(self, file: LogFile, options: SqliteOptions) -> None:
        self._options = options
        self._readers = reader.Readers(file.path, options.readers)
        self._live = {
            snapshot.job_id: LiveJob(number, snapshot, stored=True) for number, snapshot in file.unfinished
        }
        """In the order of acceptance."""
        self._last_number = file.last_number
        self._bells = Bells()
        self._closed = False
        self._commit = GroupCommit(
            file.connection,
            max_queued_bytes=options.max_queued_bytes,
            max_unflushed_bytes=options.max_unflushed_bytes,
            flush_interval_s=options.flush_interval_s,
            frames_interval_s=options.frames_interval_s,
            # Not before: a writer that hangs may still write.
            on_flushed=self._flushed,
            on_end=file.lock.release,
        )
        self.records = SqliteRecords(self._commit, self._readers)
        self.items = SqliteItems(
            self._commit, self._readers, take_number=self._take_number, ring_all=self._bells.ring_all
        )

    @property
    def held_bytes(self) -> int:
        """Bytes that wait for the disk."""
        return self._commit.waiting_bytes

    @property
    def statistics(self) -> LogStatistics:
        """Counts since the log was opened."""
        return self._commit.statistics

    # -- writing ---------------------------------------------------------------------------------

    async def append(
        self, job_id: str, events: Sequence[Event], expected_seq: int, *, deferred: bool = False
    ) -> int:
        """See the port. What is deferred is on disk within ``flush_interval_s`` while the disk takes it."""
        if deferred and await self._defer(job_id, events, expected_seq):
            return expected_seq + len(events)
        turn = await self._take_turn(job_id)
        try:
            write = await self._plan(turn, job_id, events, expected_seq)
            self._commit.put(write)
        except BaseException:
            self._commit.end_turn(job_id)
            raise
        await self._commit.outcome(write)
        return expected_seq + len(events)

    async def _take_turn(self, job_id: str) -> trio.Event:
        self._check_open()
        turn = await self._commit.take_turn(job_id)
        try:
            self._check_open()
        except LogUnavailableError:
            self._commit.end_turn(job_id)
            raise
        return turn

    async def _plan(self, turn: trio.Event, job_id: str, events: Sequence[Event], expected_seq: int) -> Write:
        """Check an append against the job's state; what is to be written then. Changes nothing."""
        live = self._live.get(job_id)
        accepted = events[0] if expected_seq == 0 and isinstance(events[0], JobAccepted) else None
        if live is None and accepted is None:
            live = await self._load(job_id)
        snapshot = _folded(live, job_id, events, expected_seq)
        rows = event_rows(expected_seq + 1, events)
        job = live or LiveJob(self._take_number(), snapshot, stored=True)
        key = accepted.idempotency_key if accepted else None
        return Write(
            job_id=job_id,
            done=turn,
            size=WRITE_OVERHEAD_BYTES + sum(map(content_bytes, events)),
            live=live,
            on_disk=partial(self._appended, job, snapshot),
            job=JobWrite(
                job_id=job_id,
                number=job.number,
                row=job_row(job.number, snapshot, key=key, message_seq=message_seq(expected_seq + 1, events)),
                new=live is None,
                owner_key=None if key is None else (snapshot.owner, key),
                expired=snapshot.state is JobState.EXPIRED,
                events=rows,
            ),
        )

    async def _defer(self, job_id: str, events: Sequence[Event], expected_seq: int) -> bool:
        """Have an append wait for the next flush. False: it is to be written as any other."""
        await self._make_room(job_id, sum(map(event_bytes, events)))
        live = self._live.get(job_id)
        first = events[0]
        is_new = isinstance(first, JobAccepted) and expected_seq == 0 and first.idempotency_key is None
        # Where the disk refuses, whoever appends is told at once.
        if (live is None and not is_new) or self._commit.failing:
            return False
        snapshot = _folded(live, job_id, events, expected_seq)
        if snapshot.state is JobState.EXPIRED:
            return False
        if live is None:
            live = self._live[job_id] = LiveJob(self._take_number(), snapshot, stored=False)
        self._commit.defer(live, events, snapshot)
        self._bells.ring(job_id)
        return True

    async def settle(self, job_id: str, *, frames: bool = False) -> None:
        """See the port."""
        live = self._live.get(job_id)
        if live is not None and (live.deferred or (frames and live.pending)):
            await self._commit.settle(live, frames=frames)

    async def _make_room(self, job_id: str, size: int) -> None:
        """Wait until no write of the job is under way, and ``size`` more bytes may wait for the disk."""
        while True:
            self._check_open()
            if (turn := self._commit.turn_of(job_id)) is not None:
                await turn.wait()
            elif not self._commit.has_room(size):
                await self._commit.flush()
            else:
                break

    def _flushed(self, live: LiveJob) -> None:
        if live.stated.ended:
            self._live.pop(live.stated.job_id, None)

    def _take_number(self) -> int:
        self._last_number += 1
        return self._last_number

    def _appended(self, job: LiveJob, snapshot: JobSnapshot) -> None:
        job.settle(snapshot)
        if snapshot.ended:
            self._live.pop(snapshot.job_id, None)
        else:
            self._live[snapshot.job_id] = job
        self._bells.ring(snapshot.job_id)

    async def _load(self, job_id: str) -> LiveJob | None:
        found = await self._readers.run(partial(reader.job, job_id))
        return LiveJob(*found, stored=True) if found else None

    async def append_frames(
        self, job_id: str, attempt: int, frames: Sequence[bytes], expected_seq: int, at: float
    ) -> int:
        """See the port. On disk within ``frames_interval_s`` while the disk takes it."""
        await self._make_room(job_id, EVENT_OVERHEAD_BYTES + sum(map(len, frames)))
        known = self._live.get(job_id) or await self._load(job_id)
        actual = known.seq if known else 0
        if actual != expected_seq:
            raise SequenceConflict(job_id, expected=expected_seq, actual=actual)
        if known is None or known.stated.state is not JobState.PROCESSING or known.stated.attempt != attempt:
            raise IllegalTransition(f"job {job_id} has no attempt {attempt} under way")
        # An item of a batch may have been begun by an earlier process.
        live = self._live.setdefault(job_id, known)
        run = FramesReceived(at=at, attempt=attempt, first=live.frames + 1, frames=tuple(frames))
        self._commit.add_frames(live, run)
        self._bells.ring(job_id)
        return live.seq

    async def redact(self, job_id: str) -> None:
        """See the port."""
        live = self._live.get(job_id)
        if live is not None and not live.content_stored and self._commit.turn_of(job_id) is None:
            self._commit.redact_waiting(live)
        else:
            await self._drop(job_id, redacts=True)

    async def forget(self, job_id: str) -> None:
        """See the port."""
        await self._drop(job_id, forgets=True)

    async def _drop(self, job_id: str, *, redacts: bool = False, forgets: bool = False) -> None:
        """Drop a job, or its content, behind what waits of it."""
        turn = await self._take_turn(job_id)
        write = Write(
            job_id=job_id,
            done=turn,
            live=self._live.get(job_id),
            on_disk=partial(self._forgotten, job_id) if forgets else _nothing,
            redacts=redacts,
            forgets=forgets,
        )
        try:
            self._commit.put(write)
        except LogUnavailableError:
            self._commit.end_turn(job_id)
            raise
        await self._commit.outcome(write)

    def _forgotten(self, job_id: str) -> None:
        live = self._live.pop(job_id, None)
        if live is not None:
            self._commit.drop_waiting(live)
        self._bells.ring(job_id)

    async def purge(self, before: float, limit: int) -> int:
        """See the port. Also gives space that is no longer used back to the disk."""
        await self._list_what_waits()
        purged = 0
        more = True
        while more and purged < limit:
            self._check_open()
            step = PurgeStep(before=before, limit=limit - purged)
            write = Write(done=trio.Event(), on_disk=_nothing, purge=step)
            self._commit.put(write)
            await self._commit.outcome(write)
            purged += step.purged
            more = step.more
        return purged

    # -- reading ---------------------------------------------------------------------------------

    async def read(self, job_id: str, after: int = 0, limit: int = 1000) -> list[StoredEvent]:
        """See the port."""
        live = self._live.get(job_id)
        waiting = live.pending_after(after) if live else None
        if waiting is not None:
            return waiting[:limit]
        # Taken before the disk is read: what is no longer in here by then is found there.
        pending = list(live.pending) if live else []
        found = await self._readers.run(partial(reader.events, job_id, after, limit))
        if found is None:
            raise UnknownJobError(f"no job {job_id}")
        last = found[-1].seq if found else after
        found.extend(stored for stored in pending if stored.seq > last)
        return found[:limit]

    async def read_frames(self, job_id: str, after: FrameCursor, max_bytes: int = 1 << 18) -> FrameRun | None:
        """See the port."""
        live = self._live.get(job_id)
        if live is not None:
            if after.attempt == live.stated.attempt and after.frame >= live.frames:
                return None
            waiting = live.pending_frames(after, max_bytes)
            if waiting is not None or not live.stored:
                return waiting
        known, run = await self._readers.run(partial(reader.frames, job_id, after, max_bytes))
        if not known:
            raise UnknownJobError(f"no job {job_id}")
        return run

    @contextmanager
    def follow(self, job_id: str, after: int = 0) -> Iterator[Follower]:
        """See the port."""
        with self._bells.hang(job_id) as bell:
            yield Follower(partial(self.read, job_id), partial(self._has_ended, job_id), bell, after)

    async def _has_ended(self, job_id: str) -> bool:
        return (await self.snapshot(job_id)).ended

    async def snapshot(self, job_id: str) -> JobSnapshot:
        """See the port."""
        live = self._live.get(job_id) or await self._load(job_id)
        if live is None:
            raise UnknownJobError(f"no job {job_id}")
        return live.current()

    async def unfinished(self) -> list[JobSnapshot]:
        """See the port."""
        live = (
            live for live in self._live.values() if live.stated.batch_id is None and not live.stated.ended
        )
        return [live.current() for live in sorted(live, key=lambda live: live.number)]

    async def page(
        self,
        where: JobFilter,
        *,
        limit: int,
        after_id: str | None = None,
        before_id: str | None = None,
    ) -> Page:
        """See the port."""
        await self._list_what_waits()
        jobs, has_more = await self._readers.run(partial(reader.page, where, limit, after_id, before_id))
        return Page(list(map(self._up_to_date, jobs)), has_more)

    async def _list_what_waits(self) -> None:
        """Have the disk know of every job and its state, while it takes any: lists are read from there."""
        waiting = [live for live in self._live.values() if live.deferred]
        while waiting and not self._commit.failing:
            await self._commit.flush()
            waiting = [live for live in waiting if live.deferred]

    def _up_to_date(self, stored: JobSnapshot) -> JobSnapshot:
        live = self._live.get(stored.job_id)
        # What is not on disk yet is not told.
        return stored if live is None or live.deferred else live.current()

    async def due(self, now: float, limit: int) -> list[JobSnapshot]:
        """See the port."""
        return await self._readers.run(partial(reader.due, now, limit))

    async def next_deadline(self) -> float | None:
        """See the port."""
        return await self._readers.run(reader.next_deadline)

    # -- the end ---------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed:
            raise LogUnavailableError("the event log is closed")

    async def aclose(self) -> None:
        """See the port. Idempotent; done to its end when cancelled, within ``close_timeout_s`` of real time.

        Raises LogUnavailableError when something was not written.
        """
        if self._closed:
            return
        self._closed = True
        with trio.CancelScope(shield=True):
            try:
                await self._commit.aclose(self._options.close_timeout_s)
            finally:
                self._readers.close()


def _folded(live: LiveJob | None, job_id: str, events: Sequence[Event], expected_seq: int) -> JobSnapshot:
    """The job after ``events``. Raises SequenceConflict, IllegalTransition."""
    actual = live.seq if live else 0
    if actual != expected_seq:
        raise SequenceConflict(job_id, expected=expected_seq, actual=actual)
    return fold(live.current() if live else None, job_id, events)


def _nothing() -> None:
    """What a write changes in memory that only changes the disk."""
