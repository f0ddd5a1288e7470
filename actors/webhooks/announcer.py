"""From the end of a job to a delivery in the log.

That an endpoint is owed the news is in the job's own events: who accepted it named the endpoint. So a
process that dies between a job's end and its delivery's first event loses nothing: the next start looks for
ended jobs whose delivery is missing. A delivery's id is made of the job's, so that looking twice makes one.
"""

from collections import deque
from collections.abc import Mapping, Sequence

import structlog
import trio

from actors.clock import Clock
from actors.webhooks.dispatcher import Dispatcher
from actors.webhooks.endpoint import Endpoint
from actors.webhooks.store import KIND, DeliveryStore
from actors.webhooks.telemetry import WebhookTelemetry
from events.deliveries import (
    DeliveryAccepted,
    DeliveryEvent,
    DeliverySkipped,
    DeliverySnapshot,
    WebhookEvent,
    delivery_id,
)
from events.errors import EventsError, LogUnavailableError, SequenceConflict, UnknownJobError
from events.log.base import EventLog
from events.projections import JobSnapshot
from events.types import JobCancelled, JobCompleted, JobFailed

RECORDED_AT_ONCE = 64
"""Deliveries recorded concurrently, so that a log that commits in groups can."""
RETRY_S = 1.0
"""Pause before the log is asked again for what it cannot do now."""


class Announcer:
    """Makes deliveries of jobs that ended."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        *,
        endpoints: Mapping[str, Endpoint],
        store: DeliveryStore,
        log: EventLog,
        clock: Clock,
        telemetry: WebhookTelemetry,
        logger: structlog.typing.FilteringBoundLogger,
        public_url: str,
    ) -> None:
        """``public_url``: what result URLs start with; empty: they are paths of this gateway."""
        self._dispatcher = dispatcher
        self._endpoints = endpoints
        self._store = store
        self._log = log
        self._clock = clock
        self._telemetry = telemetry
        self._logger = logger
        self._public_url = public_url
        self._owed: deque[str] = deque()
        """Ids of ended jobs. Bounded by what may be submitted while so many wait: see ``Webhooks.check``."""
        self._recording = 0
        self._more = trio.Event()
        self._done = trio.Event()

    @property
    def owed(self) -> int:
        """Jobs whose delivery is not in the log yet."""
        return len(self._owed) + self._recording

    def owe(self, job_id: str) -> None:
        """A job with a webhook has ended. Synchronous."""
        self._owed.append(job_id)
        self._more.set()

    def result_url(self, job_id: str) -> str:
        """Where the result can be read with GET."""
        return f"{self._public_url}/v1/jobs/{job_id}/result"

    async def run(self) -> None:
        """Take up what an earlier process left, then record what is owed, until cancelled."""
        await self._take_up()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._catch_up)
            while True:
                await self._more.wait()
                self._more = trio.Event()
                while self._owed:
                    await self._record_some()
                self._done.set()
                self._done = trio.Event()

    async def settle(self) -> None:
        """Wait until nothing is owed."""
        while self.owed:
            await self._done.wait()

    # -- what an earlier process left ------------------------------------------------------------

    async def _take_up(self) -> None:
        """Queue every delivery that is not closed."""
        try:
            unfinished = await self._unfinished()
        except EventsError:
            # Those of this process are delivered all the same.
            self._logger.exception("deliveries cannot be read", action="webhook.take_up_failed")
            return
        for snapshot in unfinished:
            reason = self._refusal(snapshot.endpoint, snapshot.event)
            if reason is None:
                self._queue(snapshot)
            else:
                await self._skip(snapshot, reason)
        if unfinished:
            self._logger.info("deliveries taken up", action="webhook.taken_up", deliveries=len(unfinished))

    async def _unfinished(self) -> list[DeliverySnapshot]:
        while True:
            try:
                return await self._store.open()
            except LogUnavailableError:
                self._logger.warning("deliveries not read yet", action="webhook.take_up_delayed")
                await trio.sleep(RETRY_S)

    async def _skip(self, snapshot: DeliverySnapshot, reason: str) -> None:
        while True:
            try:
                event = DeliverySkipped(at=self._clock.now(), reason=reason)
                snapshot = await self._store.append(snapshot, snapshot.delivery_id, event)
            except LogUnavailableError:
                await trio.sleep(RETRY_S)
            except EventsError:
                self._logger.exception(
                    "delivery not skipped", action="webhook.record_failed", delivery_id=snapshot.delivery_id
                )
                return
            else:
                self._tell_skipped(snapshot)
                return

    async def _catch_up(self) -> None:
        """Record the deliveries that are missing, a bounded number at a time."""
        found = 0
        while True:
            try:
                missing = await self._log.records.unannounced(KIND, RECORDED_AT_ONCE)
                if not await self._record_all(missing):
                    break
                found += len(missing)
            except* LogUnavailableError:
                self._logger.warning("missing deliveries not recorded yet", action="webhook.catch_up_delayed")
                await trio.sleep(RETRY_S)
        if found:
            self._logger.info("missing deliveries recorded", action="webhook.caught_up", deliveries=found)

    # -- recording -------------------------------------------------------------------------------

    async def _record_some(self) -> None:
        batch = [self._owed.popleft() for _ in range(min(len(self._owed), RECORDED_AT_ONCE))]
        self._recording = len(batch)
        try:
            await self._record_all(batch)
        except* LogUnavailableError:
            self._logger.warning("deliveries not recorded yet", action="webhook.record_delayed")
            # Those of them that were recorded are recognised by their ids.
            self._owed.extendleft(reversed(batch))
            self._recording = 0
            await trio.sleep(RETRY_S)
        finally:
            self._recording = 0

    async def _record_all(self, job_ids: Sequence[str]) -> int:
        """Record the deliveries of these jobs; how many are in the log now. Raises a group of LogErrors."""
        recorded = 0

        async def record(job_id: str) -> None:
            nonlocal recorded
            try:
                recorded += await self._record(job_id)
            except LogUnavailableError:
                raise
            except Exception:
                # One job's news must not keep the others' back.
                self._logger.exception("delivery not recorded", action="webhook.record_failed", job_id=job_id)

        async with trio.open_nursery() as nursery:
            for job_id in job_ids:
                nursery.start_soon(record, job_id)
        return recorded

    async def _record(self, job_id: str) -> bool:
        """Record one job's delivery, and queue it; whether it is in the log now."""
        try:
            job = await self._log.snapshot(job_id)
            # What is told must be so after a kill.
            await self._log.settle(job_id)
        except UnknownJobError:
            return False
        end = await self._end_of(job)
        if end is None or job.webhook is None:
            # Its end could not be recorded: the next start takes the job up again.
            return False
        event, status_code = end
        accepted = DeliveryAccepted(
            at=self._clock.now(),
            endpoint=job.webhook,
            event=event,
            job_id=job_id,
            owner=job.owner,
            status=event.value.rpartition(".")[2],
            status_code=status_code,
            result_url=self.result_url(job_id),
            result_expires_at=job.expires_at or self._clock.now(),
        )
        facts: list[DeliveryEvent] = [accepted]
        reason = self._refusal(job.webhook, event)
        if reason is not None:
            facts.append(DeliverySkipped(at=accepted.at, reason=reason))
        try:
            snapshot = await self._store.append(None, delivery_id(job_id, event), *facts)
        except SequenceConflict:
            return True
        if reason is None:
            self._queue(snapshot)
        else:
            self._tell_skipped(snapshot)
        return True

    async def _end_of(self, job: JobSnapshot) -> tuple[WebhookEvent, int] | None:
        """How a job ended, and what a poll of it answers with; None if it has not. By its terminal event."""
        if not job.ended:
            return None
        # An expired job has its JobExpired after it.
        for stored in await self._log.read(job.job_id, max(0, job.last_seq - 2)):
            match stored.event:
                case JobCompleted():
                    return WebhookEvent.COMPLETED, 200
                case JobFailed(failure=failure):
                    return WebhookEvent.FAILED, failure.status
                case JobCancelled():
                    return WebhookEvent.CANCELLED, 409
        return None

    def _refusal(self, name: str, event: WebhookEvent) -> str | None:
        """Why nothing is to be sent; None if something is."""
        endpoint = self._endpoints.get(name)
        if endpoint is None:
            return "the endpoint is not configured, or disabled"
        if event not in endpoint.options.events:
            return "the endpoint does not take this event"
        return None

    def _queue(self, snapshot: DeliverySnapshot) -> None:
        self._dispatcher.put(
            snapshot.delivery_id, snapshot.endpoint, snapshot.next_attempt_at or self._clock.now()
        )

    def _tell_skipped(self, snapshot: DeliverySnapshot) -> None:
        self._telemetry.delivery_tried(snapshot.endpoint, "skipped")
        self._logger.info(
            "webhook skipped",
            action="webhook.skipped",
            delivery_id=snapshot.delivery_id,
            endpoint=snapshot.endpoint,
            job_id=snapshot.job_id,
            reason=snapshot.last_error,
        )
