"""The actor of one batch: begins its items in their order, a bounded number at a time, and counts their ends.

Items that wait are in the log and nowhere else. An item that runs is a job with an actor of its own, begun by
the supervisor; the batch's actor waits for its end. Only one task is the batch's, and one more for each item
that runs.

A batch ends in one of four ways: its items are done; its owner cancels it; its time is up; or the daemon
stops, and then a durable log keeps what is left for the next start. In the second and third, those that run
are cancelled and those that wait are ended in the log, without ever having been begun.
"""

from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from functools import partial

import structlog
import trio

from actors.clock import Clock
from actors.commands import CRASH_FAILURE, SHUTDOWN_FAILURE, CancelJob
from actors.errors import NoSuchModelError, OverloadedError
from actors.job import COMMIT_TIMEOUT_S, JobActor
from actors.recovery import Verdict, attempts_of, end_interrupted, failure_by, verdict_on
from actors.resumption import wait_left_s
from actors.supervisor import Supervisor
from actors.telemetry import Telemetry
from events.batch_codec import decode_batch, encode_batch, encode_batch_event
from events.batches import (
    BATCH_TRANSITIONS,
    BatchCancelRequested,
    BatchEnded,
    BatchEvent,
    BatchSnapshot,
    BatchState,
    ItemCounts,
    ItemResult,
    apply_batch,
    result_of,
)
from events.errors import EventsError, LogUnavailableError
from events.log.base import EventLog
from events.log.records import Record
from events.projections import JobSnapshot
from events.state import JobState
from events.types import Failure, JobCancelled, JobFailed

KIND = "batch"
"""What its record is called in the log."""
PAGE_ITEMS = 256
"""Waiting items read from the log at once."""
ENDED_AT_ONCE = 1000
"""Waiting items ended by one write."""
LOG_RETRY_S = 1.0
"""Pause before a log that could not be read or written is asked again."""
ROOM_CHECK_S = 0.25
"""Between two looks whether the gateway, full of other jobs, has room for an item again."""
CANCELLED = "its batch was cancelled"
CANCELLED_ITEM = "cancelled on request"
LAPSED = "the time of its batch was up"


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchParts:
    """What every batch's actor works with."""

    log: EventLog
    supervisor: Supervisor
    clock: Clock
    slots: trio.CapacityLimiter
    """A place for each item that runs, of all batches together."""
    max_running: int
    """Items of one batch that run at once."""
    max_attempts: int
    """Attempts at one item, those that a restart cut off included."""
    telemetry: Telemetry
    """Hears of the items that end without having been run; the supervisor tells of the others."""


def record_of(batch: BatchSnapshot) -> Record:
    """What the log keeps of a batch beside its events."""
    return Record(
        record_id=batch.batch_id,
        kind=KIND,
        owner=batch.owner,
        created_at=batch.created_at,
        last_seq=batch.last_seq,
        open=not batch.ended,
        due_at=batch.results_until,
        state=encode_batch(batch),
    )


class BatchActor:
    """One batch at work, and the only writer of its events."""

    def __init__(
        self,
        batch: BatchSnapshot,
        *,
        counts: ItemCounts | None,
        parts: BatchParts,
        logger: structlog.typing.FilteringBoundLogger,
        on_end: Callable[["BatchActor"], None],
        on_item_end: Callable[[str, JobActor], None],
    ) -> None:
        """``counts`` None: they are read from the log first.

        ``on_end`` is told once nothing more will be done; ``on_item_end`` of each item that was run.
        """
        self.batch = batch
        """As of its last event."""
        self.counts = counts or ItemCounts(processing=batch.requests)
        """How its items stand, once :attr:`counted` is set."""
        self.counted = trio.Event()
        if counts is not None:
            self.counted.set()
        self.ended = trio.Event()
        self._parts = parts
        self._log = parts.log
        self.logger = logger
        self._on_end = on_end
        self._on_item_end = on_item_end
        self._stopping = False
        self._feeding = trio.CancelScope()
        self._writing = trio.Lock()
        self._unsure = False
        self._running: dict[str, JobActor] = {}
        self._busy: set[str] = set()
        """Items that are being ended without having been run."""
        self._passed_over: set[str] = set()
        self._changed = trio.Event()

    @property
    def running(self) -> int:
        """Items that run now."""
        return len(self._running)

    # -- what is asked of it ---------------------------------------------------------------------

    async def cancel(self, by: str) -> BatchSnapshot:
        """Record that its owner wants it stopped, and stop it. Idempotent; an ended batch stays as it is.

        Returns once that is recorded; what runs ends soon after. Raises LogUnavailableError, and
        trio.TooSlowError when the log does not answer in time.
        """
        if self.batch.state is BatchState.IN_PROGRESS:
            with trio.fail_after(COMMIT_TIMEOUT_S, shield=True):
                await self._append(BatchCancelRequested(at=self._parts.clock.now(), by=by))
            self._feeding.cancel()
        return self.batch

    async def cancel_item(self, item: JobSnapshot, *, by: str) -> None:
        """End an item that waits; one that was begun meanwhile is told to stop. Returns once it has ended.

        Raises LogError, trio.TooSlowError, and OverloadedError when it is being ended by others and that
        takes too long.
        """
        actor = self._running.get(item.job_id)
        if actor is not None:
            actor.tell(CancelJob(by=by, reason=CANCELLED_ITEM))
        elif not self._feeding.cancel_called and item.job_id not in self._busy:
            await self._end_waiting_item(item, by)
            return
        with trio.move_on_after(2 * COMMIT_TIMEOUT_S):
            await (actor or self).ended.wait()
            return
        raise OverloadedError("the job is being stopped, but the log has not recorded it yet; try again")

    async def _end_waiting_item(self, item: JobSnapshot, by: str) -> None:
        event = JobCancelled(at=self._parts.clock.now(), by=by, reason=CANCELLED_ITEM)
        self._busy.add(item.job_id)
        # Whatever comes of it, this pass over the waiting items is not to begin it.
        self._passed_over.add(item.job_id)
        try:
            with trio.fail_after(COMMIT_TIMEOUT_S, shield=True):
                await self._log.append(item.job_id, [event], item.last_seq)
            self._count(ItemResult.CANCELED)
            self._tell(JobState.CANCELLED)
        finally:
            self._busy.discard(item.job_id)
            self._wake()

    def stop(self) -> None:
        """Begin no more items: the daemon ends. The supervisor sees to those that run. Synchronous."""
        self._stopping = True
        self._feeding.cancel()

    # -- its life --------------------------------------------------------------------------------

    async def run(self) -> None:
        """Run the batch to its end, or until it is stopped. Raises nothing but what cancels it."""
        try:
            if not self.counted.is_set():
                await self._retried(self._count_items)
            async with trio.open_nursery() as nursery:
                await self._work(nursery)
            if self._stopping and self._log.durable:
                self.logger.info("batch left for the next start", action="batch.left")
            else:
                await self._retried(self._end)
        except Exception:
            # The nursery is every batch's. The log has it as it stands: the next start takes it up again.
            self.logger.exception("batch crashed", action="batch.crashed")
        finally:
            self._on_end(self)
            self.ended.set()

    async def _count_items(self) -> None:
        self.counts = await self._log.items.counts(self.batch.batch_id)
        self.counted.set()

    async def _work(self, nursery: trio.Nursery) -> None:
        """Run the items. Returns once none runs: all have ended, or the batch is to end, or to stop."""
        if self.batch.state is BatchState.CANCELING:
            self._feeding.cancel()
        self._feeding.deadline = self._parts.clock.trio_time(self.batch.expires_at)
        with self._feeding:
            await self._retried(partial(self._take_up, nursery))
            while await self._feed(nursery):
                await self._until(self._is_quiet)
        command = self._ending()
        if command is not None:
            for actor in list(self._running.values()):
                actor.tell(command)
        await self._until(self._is_quiet)

    def _ending(self) -> CancelJob | None:
        """Why items are ended from outside, if they are."""
        if self.batch.state is BatchState.CANCELING:
            return CancelJob(by=self.batch.cancelled_by, reason=CANCELLED)
        if self._stopping or not self._feeding.cancel_called:
            return None
        return CancelJob(by="", reason=LAPSED, lapsed=True)

    def _last_event(self) -> JobCancelled | JobFailed:
        """How an item ends that was not run to its end."""
        at, command = self._parts.clock.now(), self._ending()
        if command is not None:
            return JobCancelled(at=at, by=command.by, reason=command.reason, lapsed=command.lapsed)
        return JobFailed(at=at, failure=SHUTDOWN_FAILURE if self._stopping else CRASH_FAILURE)

    async def _end(self) -> None:
        """End what has not ended, and record how all of them did."""
        items, batch_id = self._log.items, self.batch.batch_id
        self.counts = await items.counts(batch_id)
        if self.counts.processing:
            event = self._last_event()
            state = JobState.CANCELLED if isinstance(event, JobCancelled) else JobState.FAILED
            ended = ENDED_AT_ONCE
            while ended == ENDED_AT_ONCE:
                ended = await items.end_waiting(batch_id, event, but=(), limit=ENDED_AT_ONCE)
                self._tell(state, ended)
                self.counts = await items.counts(batch_id)
            for item in await items.begun(batch_id):
                await self._log.append(item.job_id, [event], item.last_seq)
                self._tell(state)
            self.counts = await items.counts(batch_id)
        await self._append(BatchEnded(at=self._parts.clock.now(), counts=self.counts))
        self.logger.info("batch ended", action="batch.ended", **asdict(self.counts))

    async def _append(self, event: BatchEvent) -> None:
        """Commit an event; nothing where the batch has gone on to where the event means nothing."""
        async with self._writing:
            batch_id = self.batch.batch_id
            if self._unsure:
                # A write that was cancelled, or failed, may have been made after all.
                self.batch = decode_batch((await self._log.records.get(batch_id)).state)
                self._unsure = False
            if type(event) not in BATCH_TRANSITIONS[self.batch.state]:
                return
            after = apply_batch(self.batch, batch_id, event)
            self._unsure = True
            fact = encode_batch_event(event)
            await self._log.records.append(record_of(after), [fact], self.batch.last_seq)
            self.batch, self._unsure = after, False

    # -- its items -------------------------------------------------------------------------------

    async def _take_up(self, nursery: trio.Nursery) -> None:
        """Go on with the items that an earlier process was at."""
        for item in await self._log.items.begun(self.batch.batch_id):
            if item.job_id in self._running:
                continue
            attempts = await attempts_of(self._log, item)
            verdict = verdict_on(item, max_attempts=self._parts.max_attempts, cut_off=attempts.cut_off)
            if verdict is Verdict.RESUME:
                wait_s = await wait_left_s(self._log, item, self._parts.clock.now())
                due_at = trio.current_time() + wait_s
                await self._slot(item.job_id)
                after_s = due_at - trio.current_time()
                self._begin(nursery, item, failed=attempts.failed, after_s=after_s)
            else:
                failure = failure_by(verdict, item, attempts)
                await end_interrupted(self._log, item, failure, self._parts.clock.now())
                self._count(ItemResult.ERRORED)
                self._tell(JobState.FAILED)

    async def _feed(self, nursery: trio.Nursery) -> bool:
        """Begin every waiting item, in order; whether there were any."""
        self._passed_over.clear()
        after = 0
        while True:
            try:
                page = await self._log.items.waiting(self.batch.batch_id, after, PAGE_ITEMS)
            except LogUnavailableError:
                self.logger.warning("waiting items not read yet", action="batch.delayed")
                await trio.sleep(LOG_RETRY_S)
                continue
            if not page:
                return after > 0
            for number, item in page:
                after = number
                await self._slot(item.job_id)
                if item.job_id in self._passed_over or item.job_id in self._running:
                    self._parts.slots.release_on_behalf_of(item.job_id)
                else:
                    self._begin(nursery, item)

    async def _slot(self, job_id: str) -> None:
        """Wait for a place to run an item in: in this batch, among all batches, beside all other jobs."""
        await self._until(lambda: len(self._running) + len(self._busy) < self._parts.max_running)
        await self._parts.slots.acquire_on_behalf_of(job_id)
        try:
            while not self._parts.supervisor.has_room:  # noqa: ASYNC110 - its room changes with every request
                await trio.sleep(ROOM_CHECK_S)
        except BaseException:
            self._parts.slots.release_on_behalf_of(job_id)
            raise

    def _begin(
        self, nursery: trio.Nursery, item: JobSnapshot, *, failed: int = 0, after_s: float = 0.0
    ) -> None:
        """Run an item, in the place that was found for it. Synchronous."""
        try:
            actor = self._parts.supervisor.resume(item, failed=failed, after_s=after_s)
        except NoSuchModelError as error:
            self._busy.add(item.job_id)
            nursery.start_soon(self._refuse, item, error.failure)
        else:
            self._running[item.job_id] = actor
            nursery.start_soon(self._await_end, actor)

    async def _refuse(self, item: JobSnapshot, failure: Failure) -> None:
        """End an item that cannot be run. One that could not be ended is found waiting again."""
        try:
            await end_interrupted(self._log, item, failure, self._parts.clock.now())
            self._count(ItemResult.ERRORED)
            self._tell(JobState.FAILED)
        except EventsError:
            self.logger.exception("item not ended yet", action="batch.delayed", job_id=item.job_id)
            await trio.sleep(LOG_RETRY_S)
        finally:
            self._busy.discard(item.job_id)
            self._parts.slots.release_on_behalf_of(item.job_id)
            self._wake()

    async def _await_end(self, actor: JobActor) -> None:
        try:
            await actor.ended.wait()
        finally:
            del self._running[actor.job_id]
            self._parts.slots.release_on_behalf_of(actor.job_id)
            if actor.snapshot.ended:
                self._count(result_of(actor.snapshot))
            self._on_item_end(self.batch.batch_id, actor)
            self._wake()

    def _count(self, result: ItemResult) -> None:
        self.counts = self.counts.moved(result)

    def _tell(self, state: JobState, count: int = 1) -> None:
        """So many items that no actor had have ended."""
        self._parts.telemetry.items_ended(state, count)

    # -- waiting ---------------------------------------------------------------------------------

    def _is_quiet(self) -> bool:
        return not self._running and not self._busy

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self._changed.wait()

    async def _retried(self, step: Callable[[], Awaitable[None]]) -> None:
        """Do something that needs the log, as soon as the log can."""
        while True:
            try:
                return await step()
            except LogUnavailableError:
                self.logger.warning("the log cannot be used now", action="batch.delayed")
                await trio.sleep(LOG_RETRY_S)
