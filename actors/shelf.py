"""What can be read of jobs without an actor: results that are kept, and records."""

from actors.clock import Clock
from actors.errors import JobNotFoundError
from actors.expiry import Expiry
from actors.job import COMMIT_TIMEOUT_S
from actors.work import put_on_record
from events.errors import UnknownJobError
from events.log.base import EventLog, JobFilter, Page
from events.projections import JobSnapshot
from events.snapshots import SnapshotStore
from events.state import JobState


class Shelf:
    """Jobs as the log and the snapshots have them. ``owner`` None is anybody."""

    def __init__(self, *, log: EventLog, snapshots: SnapshotStore, expiry: Expiry, clock: Clock) -> None:
        self._log = log
        self._snapshots = snapshots
        self._expiry = expiry
        self._clock = clock
        self._drops = 0

    async def result(self, job_id: str, owner: str | None) -> JobSnapshot:
        """A job whose result is kept, or that an earlier process left. Raises JobNotFoundError."""
        now = self._clock.now()
        snapshot = self._snapshots.get(job_id, now)
        if snapshot is None:
            drops = self._drops
            snapshot = await self._stored(job_id, owner)
            if snapshot.detached and not snapshot.ended:
                return snapshot
            redacted = snapshot.state is JobState.COMPLETED and not snapshot.message
            if redacted or snapshot.expires_at is None or snapshot.expires_at <= now:
                raise JobNotFoundError
            if snapshot.batch_id is None and drops == self._drops:
                self._snapshots.cache(snapshot)
        if owner is not None and snapshot.owner != owner:
            raise JobNotFoundError
        return snapshot

    def drop(self, job_id: str) -> None:
        """Keep a result in memory no longer, nor what is being read back from the log just now."""
        self._drops += 1
        self._snapshots.remove(job_id)

    async def delete(self, snapshot: JobSnapshot) -> None:
        """Have an ended job expired, whatever its deadline. Raises LogUnavailableError."""
        self.drop(snapshot.job_id)
        try:
            await self._expiry.expire_now(snapshot)
        finally:
            # Somebody may have read it back meanwhile.
            self.drop(snapshot.job_id)

    async def redact(self, job_id: str) -> None:
        """Drop a job's content, here and in the log."""
        await self._expiry.redact(job_id)
        self.drop(job_id)

    async def describe(self, job_id: str, owner: str | None) -> JobSnapshot:
        """A job's record, also where no result is kept. What it says will be so after a kill.

        Raises JobNotFoundError, LogUnavailableError.
        """
        snapshot = await self._stored(job_id, owner)
        gone = snapshot.expires_at is not None and snapshot.expires_at <= self._clock.now()
        if snapshot.detached and gone:
            raise JobNotFoundError
        await put_on_record(self._log, job_id, within_s=COMMIT_TIMEOUT_S)
        return snapshot

    async def _stored(self, job_id: str, owner: str | None) -> JobSnapshot:
        try:
            snapshot = await self._log.snapshot(job_id)
        except UnknownJobError:
            raise JobNotFoundError from None
        if snapshot.state is JobState.EXPIRED or (owner is not None and snapshot.owner != owner):
            raise JobNotFoundError
        return snapshot

    async def page(
        self, where: JobFilter, *, limit: int, after_id: str | None, before_id: str | None
    ) -> Page:
        """A page of jobs, newest first. Raises JobNotFoundError for a cursor that is not the owner's."""
        for cursor in (after_id, before_id):
            if cursor is not None:
                await self.describe(cursor, where.owner)
        page = await self._log.page(where, limit=limit, after_id=after_id, before_id=before_id)
        now = self._clock.now()
        # Their time is up, and the task that records so has not come to it yet. Items go with their batch.
        overdue = [
            job.job_id
            for job in page.jobs
            if job.detached and job.batch_id is None and job.expires_at is not None and job.expires_at <= now
        ]
        for job_id in overdue:
            await self._expiry.expire_overdue(job_id)
        if overdue:
            page = await self._log.page(where, limit=limit, after_id=after_id, before_id=before_id)
        return page
