"""The actor of one job: a trio task with an inbox, and the only writer of its job's log.

Life: :meth:`JobActor.run` calls the upstream, logs and broadcasts what comes, commits one terminal event
and tells whoever waits. Commands arrive in the inbox through :meth:`JobActor.tell`, which decides at once
(:func:`actors.commands.ends_work`) and, where the command ends the work, cancels the scope the work runs
in; the actor then finds in its inbox why.

Nothing that happens in here reaches another job: an exception is this job's ``JobFailed``.
"""

from collections.abc import Awaitable, Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import orjson
import structlog
import trio

from actors.broadcast import Broadcast, Subscription
from actors.clock import Clock
from actors.commands import Command, DetachJob, Ending, LastWatcherLeft, ends_work, terminal_event
from actors.errors import ProviderError, UpstreamProtocolError, UpstreamStatusError, status_of
from actors.providers.base import Frame, Provider, ProviderCall
from actors.telemetry import Telemetry
from events.errors import BadFrameError, EventsError
from events.log.base import EventLog, FrameCursor, FrameRun
from events.message import MessageFold
from events.projections import JobSnapshot, apply
from events.types import (
    AttemptFailed,
    AttemptStarted,
    Event,
    Failure,
    JobCompleted,
    JobDetached,
    JobFailed,
    Mode,
    NextStep,
    Terminal,
    Usage,
)

INBOX_COMMANDS = 8
"""Commands an inbox holds. A command that finds it full is dropped: eight others already end the job."""

COMMIT_TIMEOUT_S = 5.0
"""How long a terminal event may take to be committed once the work is over or cancelled."""

CRASH_FAILURE = Failure(500, "api_error", "the gateway failed while it ran this job")
UNRECORDED_FAILURE = Failure(500, "api_error", "the gateway could not record how this job ended")


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What an actor is to do."""

    provider: Provider
    call: ProviderCall
    as_stream: bool
    """Run the upstream as a stream (watched, detached and batched jobs), or plain."""
    keeps_result: bool
    """Fold the frames into a Message that outlives the watchers."""
    may_detach: bool = False
    """A DetachJob may come: the actor also listens to its inbox while it works."""


class Watch:
    """A watcher's stake in a job. Leaving is synchronous and idempotent."""

    __slots__ = ("_actor", "_left")

    def __init__(self, actor: "JobActor") -> None:
        self._actor = actor
        self._left = False

    def leave(self) -> None:
        """Give the stake back. The last one to leave an attached job stops it."""
        if not self._left:
            self._left = True
            self._actor.unwatch()


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
        self.frame_bytes = 0
        """Bytes of all frames received."""
        self._fold = MessageFold(keep_content=work.keeps_result)
        self._ending: Ending | None = None
        self._scope = trio.CancelScope()
        self._inbox_send, self._inbox = trio.open_memory_channel[Command](INBOX_COMMANDS)
        self._writing = trio.Lock() if work.may_detach else nullcontext()
        self._broadcast = Broadcast(self.job_id, log, buffer_runs=buffer_runs, telemetry=telemetry)
        self._broadcast.attempt = snapshot.attempt
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
    def as_stream(self) -> bool:
        """Whether there are frames to watch."""
        return self._work.as_stream

    def watch(self) -> Watch:
        """Take a stake in the job: an attached job lives as long as somebody holds one."""
        self._watchers += 1
        return Watch(self)

    def unwatch(self) -> None:
        """A stake is given back (see :meth:`Watch.leave`)."""
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
            self._scope.cancel()
        return True

    # -- the life of the job ---------------------------------------------------------------------

    async def run(self) -> None:
        """Do the work, commit how it ended, tell everyone. Raises nothing of the job's own making.

        Cancelled from outside (the daemon is torn down at once) it commits nothing more; who waits is told
        all the same.
        """
        try:
            terminal = await self._work_to_the_end()
            await self._commit_end(terminal)
        finally:
            self._announce()
        if not self._snapshot.detached:
            if self._watchers:
                await self._unwatched.wait()
            await self._on_gone(self)

    async def _work_to_the_end(self) -> Terminal | None:
        """The terminal event, not yet committed; None when the job is left for the next start."""
        try:
            with self._scope:
                if self._work.may_detach:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(self._listen)
                        terminal = await self._attempt()
                        nursery.cancel_scope.cancel()
                else:
                    terminal = await self._attempt()
                return terminal
            ending = self._drain_inbox()
            if ending is None:
                raise RuntimeError("the work was cancelled without a command")  # noqa: TRY301 - a crash
            return terminal_event(ending, at=self._clock.now(), usage=self._fold.usage)
        except Exception:
            self.logger.exception("job crashed", action="job.crashed")
            return JobFailed(at=self._clock.now(), failure=CRASH_FAILURE, usage=self._fold.usage)

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

    async def _attempt(self) -> Terminal:
        """One attempt at the upstream: its terminal event. Raises nothing of the provider's."""
        work = self._work
        attempt = self._snapshot.attempt + 1
        self._frames = 0
        await self._append(
            AttemptStarted(
                at=self._clock.now(),
                attempt=attempt,
                provider=work.provider.name,
                upstream_model=work.call.model,
                key_name=getattr(work.provider, "key_name", ""),
            )
        )
        self._broadcast.attempt = attempt
        self.logger.debug(
            "attempt started", action="attempt.started", attempt=attempt, provider=work.provider.name
        )
        try:
            return await (self._run_stream(attempt) if work.as_stream else self._run_plain(attempt))
        except ProviderError as error:
            failure = error.failure
        at = self._clock.now()
        await self._append(AttemptFailed(at=at, attempt=attempt, failure=failure, next=NextStep.GIVE_UP))
        return JobFailed(at=at, failure=failure, usage=self._fold.usage)

    async def _run_plain(self, attempt: int) -> Terminal:
        completion = await self._work.provider.complete(self._work.call)
        self.answer = completion.body
        return self._completed(attempt, completion.usage, completion.upstream_request_id)

    async def _run_stream(self, attempt: int) -> Terminal:
        async with self._work.provider.open_stream(self._work.call) as source:
            while not self._fold.finished:
                frames = await source.receive()
                if not frames:
                    raise UpstreamProtocolError("the upstream ended its stream before message_stop")
                await self._take(attempt, frames)
            request_id = source.upstream_request_id
        if self._work.keeps_result:
            self.answer = self._fold.message_json()
        return self._completed(attempt, self._fold.usage, request_id)

    def _completed(self, attempt: int, usage: Usage, upstream_request_id: str | None) -> JobCompleted:
        return JobCompleted(
            at=self._clock.now(),
            attempt=attempt,
            # Whether it is detached may still be decided while this is on its way to the log.
            message=self.answer if self._work.keeps_result else b"",
            usage=usage,
            upstream_request_id=upstream_request_id,
        )

    async def _take(self, attempt: int, frames: Sequence[Frame]) -> None:
        """Check, log and broadcast what one read brought; raise for what follows the last good frame."""
        good: list[bytes] = []
        error: ProviderError | None = None
        for frame in frames:
            if frame.event == "error":
                error = _error_of(frame.data)
                break
            try:
                self._fold.apply(frame.event, frame.data)
            except BadFrameError as bad:
                self.logger.warning("bad frame", action="attempt.bad_frame", reason=str(bad))
                error = UpstreamProtocolError("the upstream sent a frame that breaks the stream protocol")
                break
            good.append(frame.wire)
            if self._fold.finished:
                break
        if good:
            await self._show(attempt, tuple(good))
        if error is not None:
            raise error

    async def _show(self, attempt: int, frames: tuple[bytes, ...]) -> None:
        now = self._clock.now()
        if self._frames == 0:
            delay_s = now - (self._snapshot.started_at or now)
            self._telemetry.first_frame(self._snapshot.mode, self._work.provider.name, delay_s)
        async with self._writing:
            self._seq = await self._log.append_frames(self.job_id, attempt, frames, self._seq, now)
        run = FrameRun(attempt, self._frames + 1, frames)
        self._frames += len(frames)
        self.frame_bytes += sum(map(len, frames))
        self._telemetry.frames(self._work.provider.name, len(frames))
        self._broadcast.publish(run)

    async def _append(self, event: Event) -> None:
        async with self._writing:
            snapshot = apply(self._snapshot, self.job_id, event)
            self._seq = await self._log.append(self.job_id, [event], self._seq)
            # Frames are logged without being folded one by one: what they changed is filled in here.
            self._snapshot = replace(snapshot, last_seq=self._seq, frames=self._frames)

    # -- the end ---------------------------------------------------------------------------------

    async def _commit_end(self, terminal: Terminal | None) -> None:
        """Commit the terminal event, even while the daemon is being cancelled, within a bound."""
        if terminal is None:
            return
        with trio.move_on_after(COMMIT_TIMEOUT_S, shield=True):
            try:
                await self._append(terminal)
            except EventsError:
                self.logger.exception("terminal event refused by the log", action="job.commit_failed")
            else:
                self.terminal = terminal
                return
        self.logger.error("how the job ended was not recorded", action="job.end_unrecorded")
        self.answer = b""
        self.terminal = JobFailed(at=self._clock.now(), failure=UNRECORDED_FAILURE, usage=self._fold.usage)
        self._snapshot = apply(self._snapshot, self.job_id, self.terminal)

    def _announce(self) -> None:
        """Tell everyone: supervisor, waiters, watchers, in this order. Synchronous."""
        self._drain_inbox()
        self._inbox_send.close()
        self._inbox.close()
        self._on_end(self)
        self.ended.set()
        self._broadcast.close()


def _error_of(data: bytes) -> ProviderError:
    """The error an ``error`` frame stands for, its status looked up by type."""
    try:
        envelope = orjson.loads(data)
    except orjson.JSONDecodeError:
        envelope = None
    match envelope:
        case {"error": {"type": str(error_type), "message": str(message)}}:
            return UpstreamStatusError(message, status=status_of(error_type), error_type=error_type)
        case _:
            return UpstreamProtocolError("the upstream broke its stream off with an error it did not explain")


def is_stream(mode: Mode, *, detached: bool, may_detach: bool) -> bool:
    """Whether a job's upstream is run as a stream: all but plain attached ones are."""
    return mode is not Mode.PLAIN or detached or may_detach
