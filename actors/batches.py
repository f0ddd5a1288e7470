"""All batches of this process: who takes them on, finds them, ends them, and forgets them in time."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import NamedTuple

import structlog
import trio

from actors.batch import KIND, LOG_RETRY_S, BatchActor, BatchParts
from actors.batch_upload import Upload, UploadTerms
from actors.clock import Clock
from actors.errors import BatchNotFoundError, JobConflictError, OverloadedError
from actors.job import COMMIT_TIMEOUT_S, JobActor
from actors.supervisor import Supervisor
from actors.telemetry import Telemetry
from events.batch_codec import decode_batch
from events.batches import BatchSnapshot, ItemCounts
from events.errors import EventsError, LogUnavailableError, UnknownRecordError
from events.log.base import EventLog
from events.log.records import Record
from events.projections import JobSnapshot
from events.snapshots import RESERVED_RESULT_BYTES, SnapshotStore
from events.state import JobState
from events.types import Mode

MAX_UPLOADS = 16
"""Uploads under way at once. Each holds an item, and what the network brought, in memory."""
FORGOTTEN_AT_ONCE = 500
"""Items dropped between two pauses."""
LOOK_INTERVAL_S = 60.0
"""At most so long between two looks for batches whose time is up."""
DUE_AT_ONCE = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLimits:
    """Bounds of batches."""

    max_open: int
    """Batches that have not ended."""
    max_running: int
    """Items of all batches that run at once."""
    max_running_per_batch: int
    max_requests: int
    """Items of one batch."""
    max_attempts: int
    """Attempts at one item, those that a restart cut off included."""
    lifetime_s: float
    """From its acceptance, until what has not ended of a batch expires."""
    result_ttl_s: float
    """From its end, until a batch is forgotten."""


class Batch(NamedTuple):
    """A batch, and how its items stand."""

    batch: BatchSnapshot
    counts: ItemCounts


class BatchesPage(NamedTuple):
    """A page of batches, newest first."""

    batches: list[Batch]
    has_more: bool


class Batches:
    """The manager of batch actors. They run in the nursery it is given, as the jobs' actors do."""

    def __init__(
        self,
        *,
        nursery: trio.Nursery,
        log: EventLog,
        snapshots: SnapshotStore,
        supervisor: Supervisor,
        clock: Clock,
        telemetry: Telemetry,
        logger: structlog.typing.FilteringBoundLogger,
        limits: BatchLimits,
    ) -> None:
        self._nursery = nursery
        self._log = log
        self._snapshots = snapshots
        self._clock = clock
        self._telemetry = telemetry
        self._logger = logger
        self._limits = limits
        self._parts = BatchParts(
            log=log,
            supervisor=supervisor,
            clock=clock,
            slots=trio.CapacityLimiter(limits.max_running),
            max_running=limits.max_running_per_batch,
            max_attempts=limits.max_attempts,
            telemetry=telemetry,
        )
        self._actors: dict[str, BatchActor] = {}
        self._uploads = 0
        self._stopped = False

    # -- what it knows ---------------------------------------------------------------------------

    @property
    def open(self) -> int:
        """Batches that have not ended."""
        return len(self._actors)

    @property
    def running_items(self) -> int:
        """Items that run."""
        return sum(actor.running for actor in self._actors.values())

    @property
    def waiting_items(self) -> int:
        """Items accepted and not begun."""
        return sum(actor.counts.processing - actor.running for actor in self._actors.values())

    async def describe(self, batch_id: str, owner: str | None) -> Batch:
        """A batch and how its items stand. ``owner`` None: anybody's. Raises BatchNotFoundError, LogError."""
        try:
            record = await self._log.records.get(batch_id)
        except UnknownRecordError:
            raise BatchNotFoundError from None
        if record.kind != KIND or (owner is not None and record.owner != owner):
            raise BatchNotFoundError
        return await self._shown(record)

    async def _shown(self, record: Record) -> Batch:
        actor = self._actors.get(record.record_id)
        if actor is None:
            batch = decode_batch(record.state)
            # Open without an actor: left by a shutdown, or in the moment of its end.
            return Batch(batch, batch.counts or await self._log.items.counts(batch.batch_id))
        with trio.move_on_after(COMMIT_TIMEOUT_S):
            await actor.counted.wait()
            return Batch(actor.batch, actor.counts)
        raise OverloadedError("the items of the batch are not counted yet; try again")

    async def page(
        self, owner: str | None, *, limit: int, after_id: str | None, before_id: str | None
    ) -> BatchesPage:
        """A page of batches, newest first. Raises BatchNotFoundError for a cursor that is not the owner's."""
        for cursor in (after_id, before_id):
            if cursor is not None:
                await self.describe(cursor, owner)
        records = self._log.records
        page = await records.page(KIND, owner, limit=limit, after_id=after_id, before_id=before_id)
        return BatchesPage([await self._shown(record) for record in page.records], page.has_more)

    # -- taking on -------------------------------------------------------------------------------

    @asynccontextmanager
    async def open_upload(self, terms: UploadTerms) -> AsyncIterator[Upload]:
        """A batch being made: its items are added, then it is committed, and runs.

        Leaving without a commit drops what was added. Raises OverloadedError.
        """
        self._check_admission()
        upload = Upload(
            terms,
            log=self._log,
            snapshots=None if self._log.durable else self._snapshots,
            clock=self._clock,
            lifetime_s=self._limits.lifetime_s,
            result_ttl_s=self._limits.result_ttl_s,
            max_requests=self._limits.max_requests,
            admit=self._check_running,
            on_commit=self._accepted,
        )
        self._uploads += 1
        try:
            yield upload
        finally:
            self._uploads -= 1
            if not upload.committed:
                self._nursery.start_soon(self._discard, upload.batch_id)

    def _check_admission(self) -> None:
        self._check_running()
        if self._uploads >= MAX_UPLOADS:
            raise OverloadedError("too many batches are being uploaded; try again")
        if len(self._actors) + self._uploads >= self._limits.max_open:
            raise OverloadedError("too many batches are open; try again later", retry_after_s=30)

    def _check_running(self) -> None:
        if self._stopped:
            raise OverloadedError("the gateway is shutting down; try again", retry_after_s=5)

    def _accepted(self, batch: BatchSnapshot, counts: ItemCounts) -> None:
        for _ in range(batch.requests):
            self._telemetry.job_accepted(Mode.BATCH)
        self._telemetry.items_ended(JobState.FAILED, counts.errored)
        self._start(batch, counts)
        self._logger.info(
            "batch accepted",
            action="batch.accepted",
            batch_id=batch.batch_id,
            requests=batch.requests,
            request_id=batch.request_id,
        )

    def _start(self, batch: BatchSnapshot, counts: ItemCounts | None) -> None:
        actor = BatchActor(
            batch,
            counts=counts,
            parts=self._parts,
            logger=self._logger.bind(batch_id=batch.batch_id),
            on_end=self._ended,
            on_item_end=self._item_ended,
        )
        self._actors[batch.batch_id] = actor
        self._nursery.start_soon(actor.run)

    def _item_ended(self, batch_id: str, actor: JobActor) -> None:
        """What an item came to is held in memory by a log in memory."""
        if not self._log.durable:
            size = actor.frame_bytes + len(actor.snapshot.message)
            self._snapshots.correct(batch_id, size - RESERVED_RESULT_BYTES)

    def _ended(self, actor: BatchActor) -> None:
        self._actors.pop(actor.batch.batch_id, None)

    # -- ending ----------------------------------------------------------------------------------

    async def cancel(self, batch_id: str, owner: str | None, *, by: str) -> Batch:
        """Stop a batch. Idempotent; one that has ended is returned as it is.

        Returns once that is recorded; its items end soon after. Raises BatchNotFoundError, LogError, and
        trio.TooSlowError when the log does not answer in time.
        """
        found = await self.describe(batch_id, owner)
        actor = self._actors.get(batch_id)
        if actor is None:
            return found
        return Batch(await actor.cancel(by), actor.counts)

    async def cancel_item(self, item: JobSnapshot, *, by: str) -> None:
        """End an item that was not begun when ``item`` was read. Returns once it has ended.

        Raises JobConflictError where its batch is not at work: still being uploaded, or left by a shutdown.
        """
        actor = self._actors.get(item.batch_id or "")
        if actor is None:
            raise JobConflictError("the batch of this job is not at work")
        await actor.counted.wait()
        await actor.cancel_item(item, by=by)

    async def delete(self, batch_id: str, owner: str | None) -> None:
        """Drop an ended batch with its items. Raises BatchNotFoundError, JobConflictError, LogError."""
        found = await self.describe(batch_id, owner)
        if not found.batch.ended or batch_id in self._actors:
            raise JobConflictError("the batch has not ended; cancel it first, and wait for its end")
        await self._log.records.forget(batch_id)
        self._nursery.start_soon(self._discard, batch_id)

    async def _discard(self, batch_id: str) -> None:
        """Drop a batch and its items. What a crash leaves of them has no record, and is found at start."""
        while True:
            try:
                await self._log.records.forget(batch_id)
                while await self._log.items.forget(batch_id, FORGOTTEN_AT_ONCE) == FORGOTTEN_AT_ONCE:  # noqa: ASYNC110 - no poll
                    await trio.lowlevel.checkpoint()
            except LogUnavailableError:
                self._logger.warning("batch not dropped yet", action="batch.drop_delayed", batch_id=batch_id)
                await trio.sleep(LOG_RETRY_S)
            else:
                self._snapshots.release(batch_id)
                return

    # -- from start to end -----------------------------------------------------------------------

    async def recover(self) -> int:
        """Take up what an earlier process left; how many batches. Call it before the server accepts.

        Batches go on where they were. What is left of uploads that broke off, or of batches being dropped,
        is dropped. Raises LogUnavailableError.
        """
        for batch_id in await self._log.items.orphans():
            self._nursery.start_soon(self._discard, batch_id)
        records = await self._log.records.open(KIND)
        for record in records:
            self._start(decode_batch(record.state), None)
        if records:
            self._logger.info("batches recovered", action="batch.recovered", batches=len(records))
        return len(records)

    async def forget_old(self) -> None:
        """Forget batches when their time is up, until cancelled."""
        while True:
            try:
                await self._forget_due()
                next_due = await self._log.records.next_due(KIND)
            except EventsError:
                self._logger.exception("old batches not dropped yet", action="batch.drop_delayed")
                next_due = None
            wait_s = LOOK_INTERVAL_S if next_due is None else next_due - self._clock.now()
            await trio.sleep(min(max(wait_s, 0.0), LOOK_INTERVAL_S))

    async def _forget_due(self) -> None:
        while due := await self._log.records.due(KIND, self._clock.now(), DUE_AT_ONCE):
            for record in due:
                await self._discard(record.record_id)

    def stop(self) -> None:
        """Begin no further item, take no further batch: the daemon ends. Synchronous."""
        self._stopped = True
        for actor in self._actors.values():
            actor.stop()

    async def drain(self) -> None:
        """Wait, for a commit's time at most, until what is to be recorded of the batches is."""
        with trio.move_on_after(COMMIT_TIMEOUT_S):
            for actor in list(self._actors.values()):
                await actor.ended.wait()
