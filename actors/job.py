"""The actor of one job: a trio task with an inbox, and the only writer of its job's log.

Life: :meth:`JobActor.run` calls the upstream, logs and broadcasts what comes, commits one terminal event
and tells whoever waits. Commands arrive in the inbox through :meth:`JobActor.tell`, which decides and,
where the command ends the work, cancels the scope that runs in; the actor then finds in its inbox why.

Nothing that happens in here reaches another job: an exception is this job's ``JobFailed``.
"""

from collections.abc import Awaitable, Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace

import structlog
import trio

from actors.attempt import MAX_HELD_FRAMES, attempt_failed, completed, run_attempt, to_an_answer
from actors.broadcast import Broadcast, Subscription
from actors.clock import Clock
from actors.commands import (
    CRASH_FAILURE,
    LOG_FAILURE,
    UNRECORDED_FAILURE,
    Command,
    DetachJob,
    LastWatcherLeft,
    StopForShutdown,
    ends_work,
    interruption,
    terminal_event,
)
from actors.errors import NoTargetError, ProviderError
from actors.inbox import Inbox
from actors.providers.base import ProviderCall
from actors.telemetry import Telemetry, log_attempt_failed
from actors.work import Watch, Watchers, Work, attempt_started, put_on_record, recall
from events.errors import EventsError, LogUnavailableError, SequenceConflict
from events.log.base import EventLog, FrameCursor, FrameRun
from events.message import MessageFold
from events.projections import JobSnapshot, apply, fold
from events.types import (
    Event,
    FramesReceived,
    JobCancelled,
    JobCompleted,
    JobDetached,
    JobFailed,
    NextStep,
    Terminal,
)

COMMIT_TIMEOUT_S = 5.0
"""How long a terminal event may take to be committed once the work is over or cancelled."""
COMMIT_RETRY_S = 1.0
"""Pause before a detached job's end is offered to the log again."""


class JobActor:
    """One job at work. Made and started by the supervisor."""

    def __init__(
        self,
        *,
        snapshot: JobSnapshot,
        work: Work,
        log: EventLog,
        clock: Clock,
        telemetry: Telemetry,
        logger: structlog.typing.FilteringBoundLogger,
        buffer_runs: int,
        on_end: Callable[["JobActor"], None],
        on_gone: Callable[["JobActor"], Awaitable[None]],
    ) -> None:
        self.job_id = snapshot.job_id
        self._snapshot = snapshot
        self._seq = snapshot.last_seq
        self._work = work
        self._log = log
        self._clock = clock
        self._telemetry = telemetry
        self.logger = logger
        """Bound to the job and the request that made it."""
        self._on_end = on_end
        self._on_gone = on_gone
        self._watchers = Watchers(self._unwatched)
        self._frames = 0
        self._last_frames: list[FramesReceived] = []
        self._held: tuple[bytes, ...] = ()
        self.frame_bytes = 0
        """Bytes of all frames received."""
        self._fold = MessageFold(keep_content=work.keeps_result)
        self._stopping = False
        self.waiting = False
        """Whether the job still waits for its turn."""
        self._scope = trio.CancelScope()
        self._inbox = Inbox()
        self._writing = trio.Lock() if work.may_detach else nullcontext()
        self._broadcast = Broadcast(self.job_id, log, buffer_runs=buffer_runs, telemetry=telemetry)
        self._begun = work.begun
        earlier = 0 if work.begun else snapshot.attempt
        # An attempt that had not failed was cut off by a restart.
        self._interrupted = 0 if snapshot.failure else earlier
        # Frames of an earlier process are void: the stream to watch is the next attempt's.
        self._broadcast.begin(snapshot.attempt + bool(earlier))
        self.ended = trio.Event()
        self.terminal: Terminal | None = None
        """The terminal event, once :attr:`ended` is set; None then means: left for the next start."""
        self.answer = b""
        """The Message of a completed job that has one to give (plain, or kept)."""

    @property
    def snapshot(self) -> JobSnapshot:
        """The job as of now."""
        return self._snapshot

    @property
    def frames(self) -> int:
        """Frames received of the newest attempt."""
        return self._frames

    @property
    def stream_attempt(self) -> int:
        """The attempt whose frames can be watched; 0 while there was none."""
        return self._broadcast.attempt

    @property
    def as_stream(self) -> bool:
        """Whether there are frames to watch."""
        return self._work.as_stream

    def watch(self) -> Watch:
        """Take a stake in the job: an attached job lives as long as somebody holds one."""
        return self._watchers.watch()

    def _unwatched(self) -> None:
        self.tell(LastWatcherLeft())

    def subscribe(self, after: FrameCursor | None = None) -> Subscription:
        """Watch the frames; see :meth:`actors.broadcast.Broadcast.subscribe`. Does not take a stake."""
        return self._broadcast.subscribe(after)

    def tell(self, command: Command) -> bool:
        """Put a command into the inbox; False when it means nothing to this job (any more). Never blocks."""
        if self.ended.is_set():
            return False
        ends = ends_work(command, detached=self._snapshot.detached, watchers=self._watchers.count)
        if not (ends or isinstance(command, DetachJob)) or not self._inbox.put(command):
            return False
        if ends:
            self._stopping = isinstance(command, StopForShutdown)
            self._scope.cancel()
        return True

    # -- the life of the job ---------------------------------------------------------------------

    async def run(self) -> None:
        """Do the work, commit how it ended, tell everyone. Raises nothing but what cancels it.

        Cancelled from outside (the daemon is torn down at once) it commits nothing more; who waits is told
        all the same.
        """
        try:
            try:
                await self._commit_end(await self._work_to_the_end())
            finally:
                self._announce()
            if not self._snapshot.detached:
                await self._watchers.gone()
                await self._on_gone(self)
        except Exception:
            # The nursery is every job's: what left it here would end them all.
            self.logger.exception("actor crashed", action="job.actor_crashed")

    async def _work_to_the_end(self) -> list[Event]:
        """The last events, not yet committed, the terminal one last; none: left for the next start."""
        try:
            with self._scope:
                if self._work.may_detach:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(self._inbox.listen, self._detach)
                        last = await self._to_an_answer()
                        nursery.cancel_scope.cancel()
                else:
                    last = await self._to_an_answer()
                return last
            ending = self._inbox.drain()
            if ending is None:
                raise RuntimeError("the work was cancelled without a command")  # noqa: TRY301 - a crash
            terminal = terminal_event(ending, at=self._clock.now(), usage=self._fold.usage)
            return [terminal] if terminal else []
        except LogUnavailableError:
            self.logger.exception("the log takes no events", action="job.log_unavailable")
            return [JobFailed(at=self._clock.now(), failure=LOG_FAILURE, usage=self._fold.usage)]
        except Exception:
            self.logger.exception("job crashed", action="job.crashed")
            return [JobFailed(at=self._clock.now(), failure=CRASH_FAILURE, usage=self._fold.usage)]

    async def _detach(self, command: DetachJob) -> None:
        if not self._snapshot.detached:
            await self._append(JobDetached(at=self._clock.now(), result_ttl_s=command.result_ttl_s))

    async def _to_an_answer(self) -> list[Event]:
        """The events that end the job, once its turn has come."""
        work = self._work
        self.waiting = work.turn is not None
        try:
            call = work.call or await recall(work, self._log, self._snapshot)
            return await to_an_answer(
                work.course, call, begin=self._begin, attempt=self._attempt, failed=self._failed
            )
        except NoTargetError as error:
            # What the last attempt failed of says more, if there was one.
            return [JobFailed(at=self._clock.now(), failure=self._snapshot.failure or error.failure)]
        finally:
            work.leave()

    async def _failed(self, error: ProviderError) -> list[Event]:
        """Record a failed attempt and wait for the next; or the events that end the job."""
        course, attempt, failure = self._work.course, self._snapshot.attempt, error.failure
        usage = self._fold.usage if error.usage is None else error.usage
        decision = course.failed(error, shown=self._frames > 0 and self._broadcast.watched)
        failed = attempt_failed(failure, decision, attempt=attempt, at=self._clock.now())
        log_attempt_failed(self.logger, failed, course.target.provider.name)
        # What came of this attempt is void; the stream to watch is the next one's.
        self._held = ()
        if decision.next is NextStep.GIVE_UP:
            return [failed, JobFailed(at=failed.at, failure=failure, usage=usage)]
        self._snapshot, self._frames = replace(self._snapshot, frames=self._frames), 0
        self._fold = MessageFold(keep_content=self._work.keeps_result)
        self._broadcast.begin(attempt + 1)
        course.leave()
        await self._append(failed)
        self.waiting = True
        await trio.sleep(decision.after_s)
        return []

    async def _attempt(self, call: ProviderCall) -> list[Event]:
        """One attempt at the upstream: the events that end the job. Raises ProviderError."""
        attempt = self._snapshot.attempt
        self._broadcast.begin(attempt)
        provider = self._work.course.target.provider
        self.logger.debug("attempt started", action="attempt.started", attempt=attempt)
        answer = await run_attempt(
            provider,
            call,
            as_stream=self._work.as_stream,
            fold=self._fold,
            keeps_content=self._work.keeps_result,
            show=self._show,
            logger=self.logger,
        )
        self.answer = answer.message
        # Whether it is detached may still be decided while this is on its way to the log.
        message = answer.message if self._work.keeps_result else b""
        return [*self._last_frames, completed(answer, message, attempt=attempt, at=self._clock.now())]

    async def _begin(self) -> None:
        """Wait for a place, and record that the next attempt starts, unless both came with the acceptance.

        If a restart cut the one before off, that is recorded, too.
        """
        if self._begun:
            self._begun = False
            return
        self.waiting = True
        await self._work.course.begin()
        self.waiting = False
        at = self._clock.now()
        started = attempt_started(self._work.course, attempt=self._snapshot.attempt + 1, at=at)
        cut_off = [interruption(self._interrupted, at=at)] if self._interrupted else ()
        self._interrupted = 0
        await self._append(*cut_off, started)

    async def _show(self, frames: tuple[bytes, ...]) -> None:
        """Log a run of frames, then broadcast it: in this order, see :mod:`actors.broadcast`."""
        attempt = self._snapshot.attempt
        now = self._clock.now()
        if self._frames == 0:
            if not self._fold.content_started and len(self._held) < MAX_HELD_FRAMES:
                self._held += frames
                return
            frames, self._held = self._held + frames, ()
            await self._first_frame(now)
        first = self._frames + 1
        if self._fold.finished and self._work.keeps_result:
            # message_stop tells an end: it is committed with it, or a rerun could tell another one.
            self._last_frames = [FramesReceived(at=now, attempt=attempt, first=first, frames=frames)]
            return
        async with self._writing:
            self._seq = await self._log.append_frames(self.job_id, attempt, frames, self._seq, now)
        self._publish(FrameRun(attempt, first, frames))

    async def _first_frame(self, now: float) -> None:
        # With it the job's id is told: on record then, unless the end is told in the same breath.
        if not self._fold.finished:
            await put_on_record(self._log, self.job_id, within_s=COMMIT_TIMEOUT_S)
        self._work.course.answering()
        delay_s = now - (self._snapshot.started_at or now)
        self._telemetry.first_frame(self._snapshot.mode, self._work.course.target.provider.name, delay_s)

    async def reveal(self) -> None:
        """Show what is held back, since somebody has waited for long enough; no other attempt follows then.

        Cancelled, it first finishes. Raises LogUnavailableError.
        """
        if not (frames := self._held):
            return
        self._held = ()
        # What comes from now on is numbered after them, and counts as shown. Two tasks write from here on.
        self._frames = len(frames)
        self._writing = self._writing if self._work.may_detach else trio.Lock()
        now = self._clock.now()
        with trio.fail_after(COMMIT_TIMEOUT_S, shield=True):
            async with self._writing:
                attempt = self._snapshot.attempt
                self._seq = await self._log.append_frames(self.job_id, attempt, frames, self._seq, now)
                await self._first_frame(now)
                self._publish(FrameRun(attempt, 1, frames))

    def _publish(self, run: FrameRun) -> None:
        self._frames = run.last
        self.frame_bytes += sum(map(len, run.frames))
        self._telemetry.frames(self._work.course.target.provider.name, len(run.frames))
        self._broadcast.publish(run)

    async def _append(self, *events: Event) -> None:
        async with self._writing:
            snapshot = fold(self._snapshot, self.job_id, events)
            # An attached job ends with its connection, and so with the process. All that was told of it while
            # it ran is a stream's id, with its first frame or its failure.
            tells = self._work.as_stream and self._frames == 0 and isinstance(events[-1], Terminal)
            deferred = not (snapshot.detached or self._work.keeps_result or tells)
            self._seq = await self._log.append(self.job_id, events, self._seq, deferred=deferred)
            # Frames are logged without being folded one by one: what they changed is filled in here.
            frames = max(snapshot.frames, self._frames)
            if snapshot.last_seq != self._seq or snapshot.frames != frames:
                snapshot = replace(snapshot, last_seq=self._seq, frames=frames)
            self._snapshot = snapshot

    # -- the end ---------------------------------------------------------------------------------

    async def _commit_end(self, last: Sequence[Event]) -> None:
        """Commit how the job ended, even while the daemon is being cancelled.

        An attached job's watchers are not kept waiting for longer than ``COMMIT_TIMEOUT_S``. A detached job
        was promised to end: while the log cannot take its end now, it is tried again until the daemon stops
        (the next start then finds the job unfinished).
        """
        tries = 0
        self._held = ()
        while last:
            # Lifetimes count from the moment that is recorded, which a full disk may put off.
            last = [replace(event, at=self._clock.now()) for event in last] if tries else last
            tries += 1
            with trio.CancelScope(deadline=trio.current_time() + COMMIT_TIMEOUT_S, shield=True):
                if await self._try_commit(last):
                    return
            if not self._snapshot.detached or self._stopping:
                break
            await trio.sleep(COMMIT_RETRY_S)
        else:
            return
        self.logger.error("how the job ended was not recorded", action="job.end_unrecorded")
        self.answer = b""
        self.terminal = JobFailed(at=self._clock.now(), failure=UNRECORDED_FAILURE, usage=self._fold.usage)
        self._snapshot = apply(self._snapshot, self.job_id, self.terminal)

    async def _try_commit(self, last: Sequence[Event]) -> bool:
        """Append the last events; whether trying again makes no sense any more."""
        try:
            try:
                await self._append(*last)
            except SequenceConflict:
                # A write of ours that was cancelled may have been made after all.
                self._snapshot = await self._log.snapshot(self.job_id)
                self._seq = self._snapshot.last_seq
                if not self._snapshot.ended:
                    await self._append(*last)
        except LogUnavailableError:
            self.logger.warning("the end is not recorded yet", action="job.commit_delayed")
            return False
        except EventsError:
            self.logger.exception("terminal event refused by the log", action="job.commit_failed")
            self._stopping = True
            return False
        for event in last:
            if isinstance(event, FramesReceived):
                self._publish(FrameRun(event.attempt, event.first, event.frames))
            elif isinstance(event, JobCompleted | JobFailed | JobCancelled):
                self.terminal = event
        return True

    def _announce(self) -> None:
        """Tell everyone: supervisor, waiters, watchers, in this order. Synchronous."""
        self._inbox.close()
        self._on_end(self)
        self._watchers.end()
        self.ended.set()
        self._broadcast.close()
