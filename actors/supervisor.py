"""Who takes jobs on, starts their actors, finds them, and sees them out.

The supervisor decides synchronously (state first) and then acts. It owns no task itself: actors run in the
nursery it is given, which outlives the server, so that no connection's end is ever an actor's end.
"""

from collections import deque
from dataclasses import replace
from functools import partial

import structlog
import trio

from actors.broadcast import Replay
from actors.clock import Clock
from actors.commands import CancelJob, StopForShutdown
from actors.errors import JobConflictError, NoTargetError, OverloadedError
from actors.expiry import Expiry
from actors.job import COMMIT_TIMEOUT_S, JobActor
from actors.line import Line
from actors.resumption import Resumption
from actors.shelf import Shelf
from actors.submission import (
    Submission,
    SubmitJob,
    SupervisorLimits,
    Watched,
    body_digest,
    check_cursor,
    first_events,
    new_job_id,
    provider_call,
)
from actors.targets import Course, Targets
from actors.telemetry import Telemetry, log_job_end
from actors.webhooks.webhooks import Webhooks
from actors.work import Watch, Work, is_stream, put_on_record
from events.errors import DuplicateKeyError
from events.log.base import EventLog, FrameCursor, JobFilter, Page
from events.projections import JobSnapshot, project
from events.snapshots import SnapshotStore, SnapshotStoreFullError
from events.state import JobState
from events.types import JobAccepted

LEAVE_INTERVAL_S = 0.25
"""Between two looks, while draining, for jobs that wait."""


class Supervisor:
    """All jobs of this process."""

    def __init__(
        self,
        *,
        nursery: trio.Nursery,
        log: EventLog,
        snapshots: SnapshotStore,
        expiry: Expiry,
        targets: Targets,
        clock: Clock,
        telemetry: Telemetry,
        logger: structlog.typing.FilteringBoundLogger,
        limits: SupervisorLimits,
        webhooks: Webhooks | None = None,
    ) -> None:
        """``webhooks`` hears of the jobs that name one."""
        self._nursery = nursery
        self._log = log
        self._snapshots = snapshots
        self._expiry = expiry
        self._shelf = Shelf(log=log, snapshots=snapshots, expiry=expiry, clock=clock)
        self._targets = targets
        self._clock = clock
        self._telemetry = telemetry
        self._logger = logger
        self._limits = limits
        self._webhooks = webhooks
        self._running: dict[str, JobActor] = {}
        self._sizes: dict[str, int] = {}
        self._in_flight = 0
        self._items = 0
        self._idle = trio.Event()
        self._idle.set()
        self._draining = False
        self._attached_history: deque[str] = deque()
        self._resumed = Line(limits.max_resumed)

    # -- what it knows ---------------------------------------------------------------------------

    @property
    def in_flight(self) -> int:
        """Jobs accepted and not ended."""
        return self._in_flight

    @property
    def has_room(self) -> bool:
        """Whether a batch may have another of its items begun: other jobs always go first."""
        return not self._draining and self._in_flight - self._items < self._limits.max_in_flight

    @property
    def draining(self) -> bool:
        """Whether new jobs are refused because the daemon ends."""
        return self._draining

    @property
    def kept_bytes(self) -> int:
        """Bytes kept and reserved for results."""
        return self._snapshots.held_bytes

    def actor(self, job_id: str, owner: str | None) -> JobActor | None:
        """The running actor of a job, if it runs and is ``owner``'s (None: anybody's)."""
        actor = self._running.get(job_id)
        if actor is None or (owner is not None and actor.snapshot.owner != owner):
            return None
        return actor

    async def result(self, job_id: str, owner: str | None) -> JobSnapshot:
        """The job as a poll sees it: running, left by a shutdown, or kept. Raises JobNotFoundError."""
        actor = self.actor(job_id, owner)
        if actor is not None:
            return actor.snapshot
        return await self._shelf.result(job_id, owner)

    def was_read(self, snapshot: JobSnapshot) -> None:
        """The result has left for its owner. Where bodies are not stored, this is the end of its content."""
        kept = snapshot.ended and snapshot.detached and snapshot.batch_id is None
        if kept and not self._limits.store_bodies:
            self._shelf.drop(snapshot.job_id)
            self._nursery.start_soon(self._shelf.redact, snapshot.job_id)

    async def describe(self, job_id: str, owner: str | None) -> JobSnapshot:
        """As :meth:`actors.shelf.Shelf.describe`: the record, also where no result is kept."""
        return await self._shelf.describe(job_id, owner)

    async def page(
        self, where: JobFilter, *, limit: int, after_id: str | None, before_id: str | None
    ) -> Page:
        """A page of jobs, newest first. Raises JobNotFoundError for a cursor that is not the owner's."""
        return await self._shelf.page(where, limit=limit, after_id=after_id, before_id=before_id)

    # -- submitting ------------------------------------------------------------------------------

    async def submit(self, command: SubmitJob) -> tuple[JobActor, Watch]:
        """Take a job on: it is in the log when this returns, and its actor runs.

        The watch is the caller's stake: leaving it stops an attached job that nobody else watches. Raises
        OverloadedError (nothing was accepted), NoSuchModelError, LogUnavailableError, DuplicateKeyError, and
        trio.TooSlowError when the log does not answer in time; what it may still have taken is dropped then.
        Cancelled while the acceptance is being committed, it first finishes, so that no job is in the log
        without an actor.
        """
        course = self._targets.course(
            command.model,
            command.fallbacks,
            mode=command.mode,
            patient=command.detached,
            may_retry=command.may_rerun,
        )
        job_id = new_job_id()
        kept = command.detached or command.may_detach
        self._admit(job_id, command, course, kept=kept)
        work = Work(
            course=course,
            call=provider_call(command, course),
            as_stream=is_stream(command.mode, detached=command.detached, may_detach=command.may_detach),
            keeps_result=kept,
            may_detach=command.may_detach,
            begun=course.begun,
        )
        first = first_events(command, course, at=self._clock.now())
        try:
            if self._log.durable:
                deadline = trio.current_time() + COMMIT_TIMEOUT_S
                with trio.CancelScope(deadline=deadline, shield=True) as committing:
                    await self._log.append(job_id, first, 0, deferred=not kept)
                if committing.cancelled_caught:
                    raise trio.TooSlowError  # noqa: TRY301 - what follows is the same as for a refusal
            else:
                await self._log.append(job_id, first, 0)
        except BaseException as error:
            course.leave()
            self._snapshots.release(job_id)
            self._dismiss()
            if isinstance(error, trio.TooSlowError):
                self._nursery.start_soon(self._expiry.disown, job_id)
            raise
        actor = self._start(project(job_id, first), work, body_bytes=len(command.body))
        self._telemetry.job_accepted(command.mode)
        actor.logger.info("job accepted", action="job.accepted", mode=command.mode.value, model=command.model)
        return actor, actor.watch()

    async def submit_once(self, command: SubmitJob) -> Submission:
        """Take a job on, unless its owner already has one with this idempotency key: then that one.

        Raises as :meth:`submit`, and JobConflictError when that job was made with another body.
        """
        try:
            actor, watch = await self.submit(command)
            # Recorded as begun; to whoever submitted it just now it is pending.
            return Submission(actor.snapshot, actor, watch, JobState.PENDING)
        except DuplicateKeyError as error:
            job_id = error.existing_job_id
        if await self._expiry.expire_overdue(job_id):
            return await self.submit_once(command)
        accepted = (await self._log.read(job_id, 0, 1))[0].event
        if not isinstance(accepted, JobAccepted) or accepted.body_sha256 != body_digest(command.body):
            raise JobConflictError("idempotency-key: it was used with another request body")
        existing = self.actor(job_id, command.owner)
        if existing is not None:
            return Submission(existing.snapshot, existing, existing.watch(), existing.snapshot.state)
        snapshot = await self.result(job_id, command.owner)
        return Submission(snapshot, None, None, snapshot.state)

    def resume(self, snapshot: JobSnapshot, *, failed: int = 0, after_s: float = 0.0) -> JobActor:
        """Start the next attempt of a job that an earlier process left; its turn comes in this order.

        ``failed``: its attempts that failed by themselves. ``after_s``: what is left of its wait; its
        turn comes after that.

        An item of a batch has its turn already. Synchronous; not subject to admission, since the job was
        accepted long ago. Raises NoSuchModelError when no route leads anywhere (any more).
        """
        course = self._targets.course(
            snapshot.model, mode=snapshot.mode, patient=True, may_retry=snapshot.may_rerun, failed=failed
        )
        self._in_flight += 1
        if self._in_flight == 1:
            self._idle = trio.Event()
        item = snapshot.batch_id is not None
        join = None if item else partial(self._resumed.join, then=course.join)
        work = Work(
            course=course,
            call=None,
            as_stream=True,
            keeps_result=True,
            turn=Resumption(join, after_s=after_s) if join or after_s > 0 else None,
        )
        self._items += item
        return self._start(snapshot, work, body_bytes=0)

    def _start(self, snapshot: JobSnapshot, work: Work, *, body_bytes: int) -> JobActor:
        actor = JobActor(
            snapshot=snapshot,
            work=work,
            log=self._log,
            clock=self._clock,
            telemetry=self._telemetry,
            logger=self._logger.bind(job_id=snapshot.job_id, request_id=snapshot.request_id),
            buffer_runs=self._limits.subscriber_buffer_runs,
            on_end=self._ended,
            on_gone=self._gone,
        )
        self._running[snapshot.job_id] = actor
        self._sizes[snapshot.job_id] = body_bytes
        self._nursery.start_soon(actor.run)
        if snapshot.webhook is not None and self._webhooks is not None:
            self._webhooks.job_started(actor, snapshot.webhook)
        return actor

    def _admit(self, job_id: str, command: SubmitJob, course: Course, *, kept: bool) -> None:
        if self._draining:
            raise OverloadedError("the gateway is shutting down; try again", retry_after_s=5)
        if self._in_flight - self._items >= self._limits.max_in_flight:
            raise OverloadedError("too many jobs are in flight; try again")
        if kept and not self._log.durable:
            try:
                self._snapshots.reserve(job_id, len(command.body))
            except SnapshotStoreFullError:
                raise OverloadedError(
                    "too many results are kept; try again later", retry_after_s=30
                ) from None
        try:
            course.begin_now()
        except NoTargetError:
            self._snapshots.release(job_id)
            raise
        self._in_flight += 1
        if self._in_flight == 1:
            self._idle = trio.Event()

    def _dismiss(self) -> None:
        self._in_flight -= 1
        if self._in_flight == 0:
            self._idle.set()

    # -- watching --------------------------------------------------------------------------------

    async def subscribe(self, job_id: str, owner: str | None, after: FrameCursor | None) -> Watched:
        """Watch a job's frames from ``after`` (None: the start), running or ended, as one more watcher.

        The caller closes the subscription and leaves the watch. Raises JobNotFoundError; JobConflictError
        for a cursor of an attempt that was given up, for one that names no frame yet received, and for a
        job that is run plain and so has no frames.
        """
        actor = self.actor(job_id, owner)
        snapshot = actor.snapshot if actor else await self.result(job_id, owner)
        if actor is not None:
            if not actor.as_stream:
                raise JobConflictError("this job is run without a stream; there are no frames to watch")
            snapshot = replace(snapshot, attempt=actor.stream_attempt, frames=actor.frames)
        if after is not None:
            check_cursor(after, snapshot)
        if actor is not None:
            watch = actor.watch()
            return Watched(actor.subscribe(after), actor, snapshot, watch)
        last = FrameCursor(snapshot.attempt, snapshot.frames)
        replay = Replay(job_id, self._log, last=last, telemetry=self._telemetry)
        return Watched(replay.subscribe(after), None, snapshot)

    # -- ending ----------------------------------------------------------------------------------

    async def cancel(self, job_id: str, owner: str | None, *, by: str) -> JobSnapshot:
        """Stop a job and wait until that is recorded. A job that has ended is returned as it is.

        Cancelled itself, it leaves the job's cancellation under way. Raises JobNotFoundError; OverloadedError
        and LogUnavailableError when the log does not record it in time; the work is stopped all the same.
        """
        actor = self.actor(job_id, owner)
        if actor is not None:
            actor.tell(CancelJob(by=by, reason="cancelled on request"))
            with trio.move_on_after(2 * COMMIT_TIMEOUT_S):
                await actor.ended.wait()
                await put_on_record(self._log, job_id, within_s=COMMIT_TIMEOUT_S)
                return actor.snapshot
            raise OverloadedError("the job is stopped, but the log has not recorded it yet; try again")
        return await self.describe(job_id, owner)

    async def delete(self, job_id: str, owner: str | None) -> JobSnapshot:
        """Drop an ended job and its result; what it was. Raises JobNotFoundError, JobConflictError."""
        if self.actor(job_id, owner) is not None:
            raise JobConflictError("the job is still running; cancel it first")
        snapshot = await self.describe(job_id, owner)
        if snapshot.batch_id is not None:
            raise JobConflictError("the job is part of a batch; delete the batch")
        await self._shelf.delete(snapshot)
        return snapshot

    def _ended(self, actor: JobActor) -> None:
        """An actor is done: keep the result of its job, if it has one to keep, and free its place."""
        snapshot = actor.snapshot
        self._running.pop(actor.job_id, None)
        size = self._sizes.pop(actor.job_id, 0)
        if snapshot.batch_id is not None:
            # Its batch looks after its result.
            self._items -= 1
        elif snapshot.ended and snapshot.detached:
            self._expiry.put(snapshot, size + actor.frame_bytes + len(snapshot.message))
        else:
            self._snapshots.release(actor.job_id)
        self._dismiss()
        if not snapshot.ended:
            actor.logger.info("job left for the next start", action="job.left")
            return
        if snapshot.webhook is not None and self._webhooks is not None:
            self._webhooks.job_ended(actor.job_id)
        duration_s = (snapshot.ended_at or self._clock.now()) - snapshot.created_at
        self._telemetry.job_ended(snapshot.mode, snapshot.state, duration_s, snapshot.usage)
        log_job_end(actor.logger, snapshot, frames=actor.frames, duration_s=duration_s)

    async def _gone(self, actor: JobActor) -> None:
        """An attached job has ended and nobody reads it any more: its content goes, its counts stay."""
        await self._expiry.redact(actor.job_id)
        if self._log.durable:
            # Records on disk go by age, with those of other jobs.
            return
        self._attached_history.append(actor.job_id)
        while len(self._attached_history) > self._limits.attached_history:
            await self._log.forget(self._attached_history.popleft())

    def _leave_who_waits(self) -> None:
        """Leave the detached jobs that wait for their turn to the next start, where the log is durable."""
        if self._log.durable:
            for actor in list(self._running.values()):
                if actor.waiting and actor.snapshot.detached:
                    actor.tell(StopForShutdown(leave_unfinished=True))

    async def drain(self, within_s: float) -> None:
        """Refuse new jobs, wait up to ``within_s`` for the running ones, then record what is left.

        With a durable log detached jobs are left for the next start; all others end as failed. Bounded by
        ``within_s`` and a commit's time. Idempotent.
        """
        self._draining = True
        with trio.move_on_after(within_s):
            while not self._idle.is_set():
                # Again and again: others begin to wait meanwhile, for their next attempt.
                self._leave_who_waits()
                with trio.move_on_after(LEAVE_INTERVAL_S):
                    await self._idle.wait()
        left = list(self._running.values())
        for actor in left:
            leave = self._log.durable and actor.snapshot.detached
            actor.tell(StopForShutdown(leave_unfinished=leave))
        with trio.move_on_after(COMMIT_TIMEOUT_S):
            for actor in left:
                await actor.ended.wait()
        if left:
            self._logger.warning("jobs stopped by shutdown", action="drain.stopped", jobs=len(left))
