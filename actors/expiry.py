"""Who takes results away at their deadline, records at their age, and content that nobody may read."""

from collections.abc import Callable
from math import inf

import structlog
import trio

from actors.clock import Clock
from events.errors import EventsError, LogUnavailableError, UnknownJobError
from events.log.base import EventLog
from events.projections import JobSnapshot
from events.snapshots import SnapshotStore
from events.state import JobState
from events.types import JobExpired

RETRY_S = 5.0
"""Pause after the log could not record an expiry; readers are told from the deadline on that it is gone."""
REDACT_RETRY_S = 1.0
"""Pause before the log is asked again to drop content."""
EXPIRIES_AT_ONCE = 64
"""Results expired concurrently, so that a log that commits in groups can."""
PURGE_INTERVAL_S = 60.0
"""Between two looks for records that are older than the history that is kept."""
PURGE_JOBS = 500
"""Records dropped between two pauses of a purge."""


class Expiry:
    """Takes results away at their deadline. Sleeps until the next one; never polls."""

    def __init__(
        self,
        *,
        snapshots: SnapshotStore,
        log: EventLog,
        clock: Clock,
        logger: structlog.typing.FilteringBoundLogger,
        on_expired: Callable[[int], None] | None = None,
    ) -> None:
        """``on_expired`` is told how many more results are recorded as gone, after each look at them."""
        self._on_expired = on_expired
        self._snapshots = snapshots
        self._log = log
        self._clock = clock
        self._logger = logger
        self._sooner = trio.Event()
        self._wake_at = inf

    def put(self, snapshot: JobSnapshot, size_bytes: int) -> None:
        """Keep an ended job's snapshot, already in the log, until its deadline."""
        self._snapshots.put(snapshot, size_bytes)
        if snapshot.expires_at is not None and snapshot.expires_at < self._wake_at:
            self._sooner.set()

    async def run(self) -> None:
        """Expire results until cancelled. A log that cannot take an expiry now is tried again."""
        while True:
            # While the log is asked, every new deadline may be the earliest.
            self._wake_at = inf
            self._sooner = trio.Event()
            self._wake_at = await self._next_deadline()
            with trio.move_on_at(self._clock.trio_time(self._wake_at)):
                await self._sooner.wait()
                continue
            self._snapshots.expire(self._clock.now())
            if not await self._expire_due():
                await trio.sleep(RETRY_S)

    async def _next_deadline(self) -> float:
        """Unix seconds; infinity when nothing is kept."""
        try:
            stored = await self._log.next_deadline()
        except EventsError:
            self._logger.exception("deadlines not read", action="job.expiry_delayed")
            stored = self._clock.now() + RETRY_S
        kept = self._snapshots.next_deadline()
        return min(inf if stored is None else stored, inf if kept is None else kept)

    async def _expire_due(self) -> bool:
        """Record everything that is due; whether the log took it all."""
        delayed = False
        count = 0
        try:
            while due := await self._log.due(self._clock.now(), EXPIRIES_AT_ONCE):
                async with trio.open_nursery() as nursery:
                    for snapshot in due:
                        nursery.start_soon(self.expire_now, snapshot)
                count += len(due)
        except* EventsError:
            self._logger.exception("expiries not recorded yet", action="job.expiry_delayed")
            delayed = True
        if self._on_expired is not None:
            self._on_expired(count)
        return not delayed

    async def expire_now(self, snapshot: JobSnapshot) -> None:
        """Record that a job's result is gone, whatever its deadline. Raises LogUnavailableError."""
        try:
            await self._log.append(snapshot.job_id, [JobExpired(at=self._clock.now())], snapshot.last_seq)
        except LogUnavailableError:
            raise
        except EventsError:
            if await self._is_gone(snapshot.job_id):
                # Its deadline and its deletion came together.
                return
            # The log disagrees about this job's history; trying again would not change its mind.
            self._logger.exception("expiry refused", action="job.expiry_failed", job_id=snapshot.job_id)
            await self._log.forget(snapshot.job_id)
            return
        if not self._log.durable:
            await self._log.forget(snapshot.job_id)
        self._logger.debug("result expired", action="job.expired", job_id=snapshot.job_id)

    async def disown(self, job_id: str) -> None:
        """Drop a job that its submitter was told is not accepted, should its commit still have come about."""
        try:
            await self._log.forget(job_id)
        except LogUnavailableError:
            self._logger.warning("a refused job may be in the log", action="job.disowned", job_id=job_id)

    async def redact(self, job_id: str) -> None:
        """Drop a job's content. A log that cannot now is asked again: it takes no new jobs meanwhile."""
        while True:
            try:
                await self._log.redact(job_id)
            except LogUnavailableError:
                self._logger.warning("content not dropped yet", action="job.redact_delayed", job_id=job_id)
                await trio.sleep(REDACT_RETRY_S)
            else:
                return

    async def _is_gone(self, job_id: str) -> bool:
        try:
            return (await self._log.snapshot(job_id)).state is JobState.EXPIRED
        except UnknownJobError:
            return True

    async def expire_overdue(self, job_id: str) -> bool:
        """Whether the job has outlived its time; that is then recorded, and its idempotency key free.

        Raises LogUnavailableError.
        """
        if await self._is_gone(job_id):
            return True
        snapshot = await self._log.snapshot(job_id)
        if snapshot.expires_at is None or snapshot.expires_at > self._clock.now():
            return False
        await self.expire_now(snapshot)
        return True


async def purge_history(
    log: EventLog,
    *,
    clock: Clock,
    history_s: float,
    logger: structlog.typing.FilteringBoundLogger,
) -> None:
    """Drop the records of jobs whose result has been gone for ``history_s``, until cancelled."""
    while True:
        try:
            while await log.purge(clock.now() - history_s, PURGE_JOBS) == PURGE_JOBS:  # noqa: ASYNC110 - no poll
                await trio.lowlevel.checkpoint()
        except EventsError:
            logger.exception("old records not dropped yet", action="log.purge_delayed")
        await trio.sleep(PURGE_INTERVAL_S)
