"""Group commit: the trio side of the thread that writes.

What is written queues here; the queue goes to the writer as one batch, one transaction, while the next one
fills. There is never more than one batch at the writer, and memory learns of it only when it is on disk:
a batch that fails has changed nothing.
"""

import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic

import trio

from events.errors import LogError, LogUnavailableError
from events.log.sqlite_live import LiveJob, LogStatistics
from events.log.sqlite_rows import ROW_BYTES, job_row, message_seq
from events.log.sqlite_writer import Batch, JobWrite, PurgeStep, Step, Writer
from events.projections import JobSnapshot
from events.types import Event, FramesReceived

WRITE_OVERHEAD_BYTES = 2000
"""What a queued write is counted with beside its events."""

SETTLE_S = 0.02
"""How long, in real time, what is about to be told waits for others to share its transaction with."""

RETRY_S = 1.0
"""Pause, in real time, between two tries to flush frames to a disk that refuses them."""


@dataclass(eq=False, slots=True, kw_only=True)
class Write:
    """One caller's part in a batch, for one job (or record) or, with an empty ``job_id``, for none."""

    job_id: str = ""
    done: trio.Event
    """Set when it is on disk, or refused."""
    on_disk: Callable[[], None]
    """Brings memory up to date."""
    size: int = WRITE_OVERHEAD_BYTES
    job: JobWrite | None = None
    redacts: bool = False
    forgets: bool = False
    purge: PurgeStep | None = None
    step: Step | None = None
    live: LiveJob | None = None
    """The job, where frames of it may wait: they go first."""
    error: LogError | None = None


class GroupCommit:
    """Queue, batches and waiting frames. Made, and used, in one trio program."""

    def __init__(
        self,
        connection: sqlite3.Connection,
        *,
        max_queued_bytes: int,
        max_unflushed_bytes: int,
        flush_interval_s: float,
        frames_interval_s: float,
        on_flushed: Callable[[LiveJob], None],
        on_end: Callable[[], None],
    ) -> None:
        """``on_flushed`` hears of each job none of whose events wait any more.

        ``on_end`` is called, in the writer's thread, when nothing will be written any more.
        """
        self._on_flushed = on_flushed
        self._writer = Writer(connection, on_done=self._settle, on_end=on_end)
        self._token = trio.lowlevel.current_trio_token()
        # Not the common one: closing must not wait for the threads of others.
        self._closing = trio.CapacityLimiter(1)
        self._max_queued_bytes = max_queued_bytes
        self._max_unflushed_bytes = max_unflushed_bytes
        self._flush_interval_s = flush_interval_s
        self._frames_interval_s = frames_interval_s
        self._turns: dict[str, trio.Event] = {}
        self._queue: dict[Write, None] = {}
        self._queued_bytes = 0
        self._dirty: dict[LiveJob, None] = {}
        self._unflushed_bytes = 0
        self._flush_wanted = False
        self._alarm_set = False
        self._deferred: dict[LiveJob, None] = {}
        self._deferred_wanted = False
        self._hurried: dict[LiveJob, None] = {}
        self._hurry_wanted = False
        self._send_wanted = False
        self._sent: tuple[Batch, list[Write], list[tuple[LiveJob, int]]] | None = None
        self._settled = trio.Event()
        self._last_error: str | None = None
        self._closed = False
        self._commits = self._failed_commits = self._appends = self._flushed = self._largest = 0
        self._writer.start()

    @property
    def waiting_bytes(self) -> int:
        """Bytes that wait for the disk."""
        return self._queued_bytes + self._unflushed_bytes

    @property
    def statistics(self) -> LogStatistics:
        """What was done so far."""
        return LogStatistics(
            commits=self._commits,
            failed_commits=self._failed_commits,
            appends=self._appends,
            flushed=self._flushed,
            largest_batch=self._largest,
            waiting_bytes=self.waiting_bytes,
        )

    # -- turns -----------------------------------------------------------------------------------

    async def take_turn(self, job_id: str) -> trio.Event:
        """Wait until no other write of the job is under way; return what ends this one."""
        while (other := self._turns.get(job_id)) is not None:
            await other.wait()
        turn = self._turns[job_id] = trio.Event()
        return turn

    def turn_of(self, job_id: str) -> trio.Event | None:
        """Set when the write that is under way for the job is over; None when there is none."""
        return self._turns.get(job_id)

    def end_turn(self, job_id: str) -> None:
        """Give the turn back. :meth:`commit` does so for a write that got as far."""
        turn = self._turns.pop(job_id, None)
        if turn is not None:
            turn.set()

    # -- writes ----------------------------------------------------------------------------------

    def put(self, write: Write) -> None:
        """Queue a write. Raises LogUnavailableError when too much waits already, or after :meth:`aclose`."""
        if self._closed:
            raise LogUnavailableError("the event log is closed")
        if self._queue and self._queued_bytes + write.size > self._max_queued_bytes:
            raise LogUnavailableError("the event log's disk does not keep up")
        self._queue[write] = None
        self._queued_bytes += write.size
        self._send_soon()

    async def outcome(self, write: Write) -> None:
        """Wait until a queued write is on disk. Raises LogError when it was refused.

        Cancelled, it takes the write back if that has not gone to the writer yet.
        """
        try:
            await write.done.wait()
        except trio.Cancelled:
            if write in self._queue:
                del self._queue[write]
                self._queued_bytes -= write.size
                self.end_turn(write.job_id)
            raise
        if write.error is not None:
            raise write.error

    # -- events that wait ----------------------------------------------------------------------------------

    @property
    def failing(self) -> bool:
        """Whether the last batch could not be written."""
        return self._last_error is not None

    def has_room(self, size: int) -> bool:
        """Whether events of ``size`` more bytes may wait. Any size may when nothing does."""
        return not self._dirty or self._unflushed_bytes + size <= self._max_unflushed_bytes

    async def flush(self) -> None:
        """Flush, and wait for the end of a batch. Raises LogUnavailableError when it failed."""
        self._flush()
        await self._settled.wait()
        if self._last_error is not None:
            raise _unavailable(self._last_error)

    def add_frames(self, live: LiveJob, run: FramesReceived) -> None:
        """Have frames wait for their job's next write, or for the next flush."""
        self._wait(live, live.add(run))
        if not self._alarm_set:
            self._set_alarm(self._frames_interval_s)

    def defer(self, live: LiveJob, events: Sequence[Event], snapshot: JobSnapshot) -> None:
        """Have other events wait in the same way; they lead to ``snapshot``."""
        self._wait(live, live.defer(events, snapshot))
        if not self._deferred and not self._deferred_wanted:
            self._writer.set_alarm(self._flush_interval_s, self._send_deferred)
        self._deferred[live] = None

    def _send_deferred(self) -> None:
        self._deferred_wanted = True
        self._send_soon()

    async def settle(self, live: LiveJob, *, frames: bool) -> None:
        """Wait until deferred events, and ``frames``, of a job are on disk. Raises LogUnavailableError."""
        # Frames may come faster than the disk takes them.
        last = live.seq if frames else 0
        while live.deferred or (live.pending and live.pending[0].seq <= last):
            self._hurry(live)
            await self._settled.wait()
            if self._last_error is not None:
                raise _unavailable(self._last_error)

    def _hurry(self, live: LiveJob) -> None:
        if not self._hurried and not self._hurry_wanted:
            self._writer.set_alarm(SETTLE_S, self._send_hurried)
        self._hurried[live] = None

    def _send_hurried(self) -> None:
        self._hurry_wanted = True
        self._send_soon()

    def redact_waiting(self, live: LiveJob) -> None:
        """Drop the content of a job none of whose content is on disk, or on its way there."""
        self._unflushed_bytes -= live.redacted()

    def _wait(self, live: LiveJob, size: int) -> None:
        self._unflushed_bytes += size
        self._dirty[live] = None
        if live.pending_bytes >= ROW_BYTES:
            self._flush()

    def drop_waiting(self, live: LiveJob) -> None:
        """The job is forgotten, and with it what waits."""
        self._unflushed_bytes -= live.flushed(len(live.pending))
        self._dirty.pop(live, None)
        self._deferred.pop(live, None)

    def _set_alarm(self, after_s: float) -> None:
        self._alarm_set = True
        self._writer.set_alarm(after_s, self._flush)

    def _flush(self) -> None:
        self._alarm_set = False
        self._flush_wanted = True
        self._send_soon()

    # -- batches ---------------------------------------------------------------------------------

    def _send_soon(self) -> None:
        """Send a batch once the tasks that are about to run have had their turn, to take theirs along."""
        if not self._send_wanted and self._sent is None:
            self._send_wanted = True
            self._token.run_sync_soon(self._token.run_sync_soon, self._send)

    def _send(self) -> None:
        self._send_wanted = False
        if self._sent is not None:
            return
        waiting = self._take_waiting()
        if not self._queue and not waiting:
            return
        writes = list(self._queue)
        self._queue.clear()
        batch = Batch()
        flushed: dict[LiveJob, int] = {}
        for write in writes:
            self._enlist(write, batch, flushed)
        for live in waiting:
            if live not in flushed:
                batch.jobs.append(_flush_of(live))
                flushed[live] = len(live.pending)
        self._sent = batch, writes, list(flushed.items())
        self._writer.commit(batch)

    def _take_waiting(self) -> list[LiveJob]:
        """Jobs whose waiting events are to go with the next batch."""
        wanted = dict(self._dirty) if self._flush_wanted else {}
        if self._deferred_wanted or self._flush_wanted:
            wanted |= self._deferred
            self._deferred.clear()
        if self._hurry_wanted or self._flush_wanted:
            wanted |= self._hurried
            self._hurried.clear()
        self._flush_wanted = self._deferred_wanted = self._hurry_wanted = False
        return [live for live in wanted if live.pending]

    def _enlist(self, write: Write, batch: Batch, flushed: dict[LiveJob, int]) -> None:
        live = write.live
        if live is not None and write.job is not None:
            # Only now is it certain: a flush may have taken the job along.
            write.job.new = not live.stored
        if live is not None and live.pending and not write.forgets:
            flushed[live] = len(live.pending)
            if write.job is not None:
                write.job.flushed_first_seq = live.pending[0].seq
                write.job.flushed = live.sending()
            else:
                batch.jobs.append(_flush_of(live))
        if write.job is not None:
            batch.jobs.append(write.job)
        if write.redacts:
            batch.redacted.append(write.job_id)
        if write.forgets:
            batch.forgotten.append(write.job_id)
        if write.purge is not None:
            batch.purges.append(write.purge)
        if write.step is not None:
            batch.steps.append(write.step)

    def _settle(self, batch: Batch) -> None:
        """A batch is over: memory follows, callers are told, the next one goes."""
        if self._sent is None:
            raise AssertionError("a batch came back that was not sent")
        _, writes, flushed = self._sent
        self._sent = None
        self._last_error = batch.error
        if batch.error is None:
            self._count(writes, flushed)
            for live, count in flushed:
                self._unflushed_bytes -= live.flushed(count)
                if not live.pending:
                    self._dirty.pop(live, None)
                    self._on_flushed(live)
        else:
            self._failed_commits += 1
        for write in writes:
            self._queued_bytes -= write.size
            if batch.error is not None:
                write.error = _unavailable(batch.error)
            elif write.job is not None and write.job.refusal is not None:
                write.error = write.job.refusal
            elif write.step is not None and write.step.refusal is not None:
                write.error = write.step.refusal
            else:
                write.on_disk()
            self.end_turn(write.job_id)
            write.done.set()
        self._settled.set()
        self._settled = trio.Event()
        if batch.error is not None and self._dirty:
            self._set_alarm(RETRY_S)
        if self._queue or self._flush_wanted or self._deferred_wanted or self._hurry_wanted:
            self._send_soon()

    def _count(self, writes: list[Write], flushed: list[tuple[LiveJob, int]]) -> None:
        appends = sum(write.job is not None and write.job.refusal is None for write in writes)
        self._commits += 1
        self._appends += appends
        self._largest = max(self._largest, appends)
        self._flushed += sum(count for _, count in flushed)

    # -- the end ---------------------------------------------------------------------------------

    async def aclose(self, within_s: float) -> None:
        """Write what waits, then end the thread, in at most that many seconds of real time.

        Puts no deadline of trio's to it: the disk does not follow the trio clock. Raises LogUnavailableError
        when something was not written. To be called once, shielded.
        """
        self._closed = True
        until = monotonic() + within_s
        problem = None
        while problem is None and (self._queue or self._dirty or self._sent is not None):
            self._flush_wanted = True
            self._send()
            if self._sent is None:
                break
            done = self._sent[0].done
            if not await self._in_thread(done.wait, until):
                problem = "the disk does not answer"
            else:
                problem = self._last_error
        self._writer.stop()
        ended = await self._in_thread(self._writer.join, until)
        if not ended or problem is not None:
            raise _unavailable(problem or "the disk does not answer")

    async def _in_thread(self, blocking: Callable[[float], bool], until: float) -> bool:
        within_s = max(0.0, until - monotonic())
        return await trio.to_thread.run_sync(blocking, within_s, limiter=self._closing)


def _flush_of(live: LiveJob) -> JobWrite:
    snapshot, events = live.current(), live.sending()
    return JobWrite(
        job_id=snapshot.job_id,
        number=live.number,
        row=job_row(live.number, snapshot, key=None, message_seq=message_seq(live.pending[0].seq, events)),
        new=not live.stored,
        flushed_first_seq=live.pending[0].seq,
        flushed=events,
    )


def _unavailable(reason: str) -> LogUnavailableError:
    return LogUnavailableError(f"the event log cannot be written: {reason}")
