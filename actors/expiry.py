"""The task that takes results away at their deadline. It sleeps until the next one; it never polls."""

from math import inf

import structlog
import trio

from actors.clock import Clock
from events.errors import EventsError, LogUnavailableError
from events.log.base import EventLog
from events.projections import JobSnapshot
from events.snapshots import SnapshotStore
from events.types import JobExpired

RETRY_S = 5.0
"""Pause after the log refused to record an expiry; the result itself is gone from the first try on."""


class Expiry:
    """Owns the deadlines of a :class:`~events.snapshots.SnapshotStore`: everything is put through here."""

    def __init__(
        self,
        *,
        snapshots: SnapshotStore,
        log: EventLog,
        clock: Clock,
        logger: structlog.typing.FilteringBoundLogger,
    ) -> None:
        self._snapshots = snapshots
        self._log = log
        self._clock = clock
        self._logger = logger
        self._sooner = trio.Event()

    def put(self, snapshot: JobSnapshot, size_bytes: int) -> None:
        """Keep an ended job's snapshot until its deadline."""
        before = self._snapshots.next_deadline()
        self._snapshots.put(snapshot, size_bytes)
        if before is None or self._snapshots.next_deadline() != before:
            self._sooner.set()

    async def run(self) -> None:
        """Expire results until cancelled. A log that cannot take the event now is tried again."""
        unrecorded: list[JobSnapshot] = []
        while True:
            at = self._snapshots.next_deadline()
            wake_at = inf if at is None else self._clock.trio_time(at)
            if unrecorded:
                wake_at = min(wake_at, trio.current_time() + RETRY_S)
            with trio.move_on_at(wake_at):
                await self._sooner.wait()
            self._sooner = trio.Event()
            unrecorded.extend(self._snapshots.expire(self._clock.now()))
            unrecorded = [snapshot for snapshot in unrecorded if not await self._record(snapshot)]

    async def _record(self, snapshot: JobSnapshot) -> bool:
        try:
            await record_expiry(self._log, snapshot, at=self._clock.now())
        except LogUnavailableError:
            self._logger.warning(
                "expiry not recorded yet", action="job.expiry_delayed", job_id=snapshot.job_id
            )
            return False
        except EventsError:
            # The log disagrees about this job's history; trying again would not change its mind.
            self._logger.exception("expiry refused", action="job.expiry_failed", job_id=snapshot.job_id)
            await self._log.forget(snapshot.job_id)
        self._logger.debug("result expired", action="job.expired", job_id=snapshot.job_id)
        return True


async def record_expiry(log: EventLog, snapshot: JobSnapshot, *, at: float) -> None:
    """Record that a result is gone, and forget it. Raises LogError."""
    await log.append(snapshot.job_id, [JobExpired(at=at)], snapshot.last_seq)
    await log.forget(snapshot.job_id)
