"""The actor of one job: a trio task with an inbox, and the only writer of its job's log.

Life: :meth:`JobActor.run` calls the upstream, logs and broadcasts what comes, commits one terminal event
and tells whoever waits. Commands arrive in the inbox through :meth:`JobActor.tell`, which decides at once
(:func:`actors.commands.ends_work`) and, where the command ends the work, cancels the scope the work runs
in; the actor then finds in its inbox why.

Nothing that happens in here reaches another job: an exception is this job's ``JobFailed``.
"""

from collections.abc import Awaitable, Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace

import structlog
import trio

from actors.attempt import Answer, run_plain, run_stream
from actors.broadcast import Broadcast, Subscription
from actors.clock import Clock
from actors.commands import (
    Command,
    DetachJob,
    Ending,
    LastWatcherLeft,
    StopForShutdown,
    ends_work,
    interruption,
    terminal_event,
)
from actors.errors import ProviderError
from actors.providers.base import ProviderCall
from actors.telemetry import Telemetry
from actors.work import Watch, Work, attempt_started, recall
from events.errors import EventsError, LogUnavailableError, SequenceConflict
from events.log.base import EventLog, FrameCursor, FrameRun
from events.message import MessageFold
from events.projections import JobSnapshot, apply, fold
from events.types import (
    AttemptFailed,
    Event,
    Failure,
    FramesReceived,
    JobCancelled,
    JobCompleted,
    JobDetached,
    JobFailed,
    NextStep,
    Terminal,
)

INBOX_COMMANDS = 8
"""Commands an inbox holds. A command that finds it full is dropped: eight others already end the job."""

COMMIT_TIMEOUT_S = 5.0
"""How long a terminal event may take to be committed once the work is over or cancelled."""

COMMIT_RETRY_S = 1.0
"""Pause before a detached job's end is offered to the log again."""

CRASH_FAILURE = Failure(500, "api_error", "the gateway failed while it ran this job")
LOG_FAILURE = Failure(500, "api_error", "the gateway could not record this job's progress")
UNRECORDED_FAILURE = Failure(500, "api_error", "the gateway could not record how this job ended")


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
        self._watchers = 0
        self._unwatched = trio.Event()
        self._frames = 0
        self._last_frames: list[FramesReceived] = []
        self.frame_bytes = 0
        """Bytes of all frames received."""
        self._fold = MessageFold(keep_content=work.keeps_result)
        self._ending: Ending | None = None
        self._stopping = False
        self.waiting = False
        """Whether the job still waits for its turn."""
        self._scope = trio.CancelScope()
        self._inbox_send, self._inbox = trio.open_memory_channel[Command](INBOX_COMMANDS)
        self._writing = trio.Lock() if work.may_detach else nullcontext()
        self._broadcast = Broadcast(self.job_id, log, buffer_runs=buffer_runs, telemetry=telemetry)
        # Frames of an attempt that a restart cut off are void: the stream to watch is the next attempt's.
        self._begun = work.begun
        self._interrupted = 0 if work.begun else snapshot.attempt
        self._broadcast.attempt = snapshot.attempt + 1 if self._interrupted else snapshot.attempt
        self.ended = trio.Event()
        self.terminal: Terminal | None = None
        """The terminal event, once :attr:`ended` is set; None then means: left for the next start."""
        self.answer = b""
        """The Message of a completed job that has one to give (plain, or kept)."""

    # -- what others see -------------------------------------------------------------------------

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
        self._watchers += 1
        return Watch(self._unwatch)

    def _unwatch(self) -> None:
        self._watchers -= 1
        if self._watchers == 0:
            if self.ended.is_set():
                self._unwatched.set()
            else:
                self.tell(LastWatcherLeft())

    def subscribe(self, after: FrameCursor | None = None) -> Subscription:
        """Watch the frames; see :meth:`actors.broadcast.Broadcast.subscribe`. Does not take a stake."""
        return self._broadcast.subscribe(after)

    def tell(self, command: Command) -> bool:
        """Put a command into the inbox; False when it means nothing to this job (any more). Never blocks."""
        if self.ended.is_set():
            return False
        ends = ends_work(command, detached=self._snapshot.detached, watchers=self._watchers)
        if not ends and not isinstance(command, DetachJob):
            return False
        try:
            self._inbox_send.send_nowait(command)
        except (trio.WouldBlock, trio.ClosedResourceError, trio.BrokenResourceError):
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
                if self._watchers:
                    await self._unwatched.wait()
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
                        nursery.start_soon(self._listen)
                        last = await self._in_turn()
                        nursery.cancel_scope.cancel()
                else:
                    last = await self._in_turn()
                return last
            ending = self._drain_inbox()
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

    async def _listen(self) -> None:
        async for command in self._inbox:
            if not isinstance(command, DetachJob):
                self._ending = self._ending or command
                continue
            try:
                if not self._snapshot.detached:
                    await self._append(JobDetached(at=self._clock.now(), result_ttl_s=command.result_ttl_s))
            finally:
                command.done.set()

    def _drain_inbox(self) -> Ending | None:
        """Empty the inbox; the first command that ended the work, if any did."""
        while True:
            try:
                command = self._inbox.receive_nowait()
            except (trio.WouldBlock, trio.EndOfChannel, trio.ClosedResourceError):
                return self._ending
            if isinstance(command, DetachJob):
                command.done.set()
            else:
                self._ending = self._ending or command

    async def _in_turn(self) -> list[Event]:
        if self._work.turn is None:
            return await self._attempt()
        self.waiting = True
        async with self._work.turn:
            self.waiting = False
            return await self._attempt()

    async def _attempt(self) -> list[Event]:
        """One attempt at the upstream: the events that end it. Raises nothing of the provider's."""
        work = self._work
        call = work.call or await recall(self._log, self.job_id, work.model)
        if self._begun:
            self._begun = False
        else:
            await self._begin()
        attempt = self._snapshot.attempt
        self._broadcast.attempt = attempt
        self.logger.debug(
            "attempt started", action="attempt.started", attempt=attempt, provider=work.provider.name
        )
        try:
            answer = await self._answer(call)
        except ProviderError as error:
            at, failure = self._clock.now(), error.failure
            return [
                AttemptFailed(at=at, attempt=attempt, failure=failure, next=NextStep.GIVE_UP),
                JobFailed(at=at, failure=failure, usage=self._fold.usage),
            ]
        self.answer = answer.message
        return [
            *self._last_frames,
            JobCompleted(
                at=self._clock.now(),
                attempt=attempt,
                # Whether it is detached may still be decided while this is on its way to the log.
                message=answer.message if work.keeps_result else b"",
                usage=answer.usage,
                upstream_request_id=answer.upstream_request_id,
            ),
        ]

    async def _begin(self) -> None:
        """Record that the next attempt starts, and that the one before was cut off if a restart did that."""
        self._frames = 0
        at = self._clock.now()
        started = attempt_started(self._work, attempt=self._snapshot.attempt + 1, at=at)
        if self._interrupted:
            await self._append(interruption(self._interrupted, at=at), started)
            self._interrupted = 0
        else:
            await self._append(started)

    async def _answer(self, call: ProviderCall) -> Answer:
        work = self._work
        if not work.as_stream:
            return await run_plain(work.provider, call)
        return await run_stream(
            work.provider,
            call,
            fold=self._fold,
            keeps_content=work.keeps_result,
            show=self._show,
            logger=self.logger,
        )

    async def _show(self, frames: tuple[bytes, ...]) -> None:
        """Log a run of frames, then broadcast it: in this order, see :mod:`actors.broadcast`."""
        attempt = self._snapshot.attempt
        now = self._clock.now()
        if self._frames == 0:
            delay_s = now - (self._snapshot.started_at or now)
            self._telemetry.first_frame(self._snapshot.mode, self._work.provider.name, delay_s)
        first = self._frames + 1
        if self._fold.finished and self._work.keeps_result:
            # message_stop tells an end: it is committed with it, or a rerun could tell another one.
            self._last_frames = [FramesReceived(at=now, attempt=attempt, first=first, frames=frames)]
            return
        if self._work.may_detach:
            async with self._writing:
                self._seq = await self._log.append_frames(self.job_id, attempt, frames, self._seq, now)
        else:
            self._seq = await self._log.append_frames(self.job_id, attempt, frames, self._seq, now)
        self._publish(FrameRun(attempt, first, frames))

    def _publish(self, run: FrameRun) -> None:
        self._frames = run.last
        self.frame_bytes += sum(map(len, run.frames))
        self._telemetry.frames(self._work.provider.name, len(run.frames))
        self._broadcast.publish(run)

    async def _append(self, *events: Event) -> None:
        async with self._writing:
            snapshot = fold(self._snapshot, self.job_id, events)
            # An attached job ends with its connection, and so with the process: nobody waits for the disk.
            deferred = not (snapshot.detached or self._work.keeps_result)
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
                    return False
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
        self._drain_inbox()
        self._inbox_send.close()
        self._inbox.close()
        self._on_end(self)
        self.ended.set()
        self._broadcast.close()
