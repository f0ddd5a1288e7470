"""Webhooks as the rest of the daemon sees them: jobs that start and end, deliveries to list and send again.

:class:`Webhooks` is told of jobs by the supervisor, and from then on works in tasks of its own.
"""

from collections.abc import Sequence

import structlog
import trio

from actors.clock import Clock
from actors.errors import OverloadedError
from actors.webhooks.addresses import Resolve, resolve
from actors.webhooks.announcer import Announcer
from actors.webhooks.dispatcher import Dispatcher
from actors.webhooks.endpoint import open_endpoints
from actors.webhooks.errors import DeliveryConflictError, DeliveryNotFoundError, WebhookRefusedError
from actors.webhooks.options import WebhookOptions
from actors.webhooks.progress import Progress, Streaming
from actors.webhooks.store import DeliveryPage, DeliveryStore
from actors.webhooks.telemetry import WebhookTelemetry
from events.deliveries import DeliverySnapshot, RedeliveryRequested
from events.errors import (
    EventsError,
    IllegalTransition,
    SequenceConflict,
    UnknownJobError,
    UnknownRecordError,
)
from events.log.base import EventLog

MAX_WAITING = 100_000
"""Deliveries that are not closed. Beyond, submits that name an endpoint are refused."""
BUSY_RETRY_AFTER_S = 30
FORGET_INTERVAL_S = 60.0
"""Between two looks for deliveries that need not be kept any longer."""
FORGOTTEN_AT_ONCE = 500
"""Looked at in one go."""


class Webhooks:
    """All webhooks of this process. Nothing is sent before :meth:`run`."""

    def __init__(
        self,
        options: Sequence[WebhookOptions],
        *,
        log: EventLog,
        clock: Clock,
        telemetry: WebhookTelemetry,
        logger: structlog.typing.FilteringBoundLogger,
        history_s: float,
        public_url: str = "",
        resolve: Resolve = resolve,
        max_waiting: int = MAX_WAITING,
    ) -> None:
        """``history_s``: how long a closed delivery is kept, see :class:`DeliveryStore`.

        ``public_url``: what the URLs of results start with, without a slash at the end.
        """
        self._options = {one.name: one for one in options}
        self._endpoints = open_endpoints(options, resolve=resolve)
        self._log = log
        self._clock = clock
        self._logger = logger
        self._max_waiting = max_waiting
        self._store = DeliveryStore(log.records, history_s=history_s)
        self._dispatcher = Dispatcher(
            self._endpoints, store=self._store, clock=clock, telemetry=telemetry, logger=logger
        )
        self._announcer = Announcer(
            self._dispatcher,
            endpoints=self._endpoints,
            store=self._store,
            log=log,
            clock=clock,
            telemetry=telemetry,
            logger=logger,
            public_url=public_url,
        )
        self._progress = Progress(self._dispatcher, clock=clock, telemetry=telemetry, logger=logger)

    # -- jobs ------------------------------------------------------------------------------------

    def check(self, name: str) -> None:
        """Raise WebhookRefusedError for an endpoint no job may name, OverloadedError when too much waits."""
        if name not in self._options:
            raise WebhookRefusedError(f"no webhook endpoint is named {name[:100]!r}")
        if name not in self._endpoints:
            raise WebhookRefusedError(f"the webhook endpoint {name!r} is disabled")
        if self.waiting >= self._max_waiting:
            raise OverloadedError(
                "too many webhook deliveries wait; try again later", retry_after_s=BUSY_RETRY_AFTER_S
            )

    def job_started(self, job: Streaming, endpoint: str) -> None:
        """A job that names ``endpoint`` has its actor. Synchronous."""
        self._progress.follow(job, endpoint, self._announcer.result_url(job.job_id))

    def job_ended(self, job_id: str) -> None:
        """A job that names an endpoint has ended; that is, or will be, in the log. Synchronous."""
        self._progress.leave(job_id)
        self._announcer.owe(job_id)

    # -- deliveries ------------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """Deliveries that are not closed."""
        return self._dispatcher.waiting + self._announcer.owed

    async def page(self, *, limit: int, after_id: str | None, before_id: str | None) -> DeliveryPage:
        """Deliveries, newest first. Raises DeliveryNotFoundError for a cursor that is none."""
        try:
            return await self._store.page(limit=limit, after_id=after_id, before_id=before_id)
        except UnknownRecordError:
            raise DeliveryNotFoundError from None

    async def about(self, job_id: str) -> list[DeliverySnapshot]:
        """The deliveries of a job."""
        return await self._store.about(job_id)

    async def redeliver(self, delivery_id: str, *, by: str) -> DeliverySnapshot:
        """Send a closed delivery again, under the same ``webhook-id``, with a whole round of tries.

        Raises DeliveryNotFoundError, DeliveryConflictError while it is still being delivered or its endpoint
        cannot be called, LogUnavailableError.
        """
        try:
            snapshot = await self._store.get(delivery_id)
        except UnknownRecordError:
            raise DeliveryNotFoundError from None
        if snapshot.endpoint not in self._endpoints:
            raise DeliveryConflictError(
                f"the webhook endpoint {snapshot.endpoint!r} is not configured, or disabled"
            )
        try:
            asked = RedeliveryRequested(at=self._clock.now(), by=by)
            snapshot = await self._store.append(snapshot, delivery_id, asked)
        except (IllegalTransition, SequenceConflict):
            raise DeliveryConflictError("it is still being delivered") from None
        self._dispatcher.put(delivery_id, snapshot.endpoint, asked.at)
        self._logger.info("redelivery requested", action="webhook.redeliver", delivery_id=delivery_id, by=by)
        return snapshot

    # -- life ------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Deliver, until cancelled; first what an earlier process left. Start it once, after recovery."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._announcer.run)
            nursery.start_soon(self._dispatcher.run)
            nursery.start_soon(self._progress.run)
            nursery.start_soon(self._forget_spent)

    async def drain(self, within_s: float) -> None:
        """Let what is under way or due finish within ``within_s``. What waits for a later try is left.

        A durable log has it at the next start; with the memory log it is lost.
        """
        with trio.move_on_after(within_s):
            await self._announcer.settle()
            await self._dispatcher.settle()
        if self.waiting:
            self._logger.warning("webhook deliveries left", action="webhook.left", deliveries=self.waiting)

    async def _forget_spent(self) -> None:
        """Drop closed deliveries whose time is over, but none before its job: it would be made again."""
        while True:
            await trio.sleep(FORGET_INTERVAL_S)
            try:
                for snapshot in await self._store.spent(self._clock.now(), FORGOTTEN_AT_ONCE):
                    if not await self._is_known(snapshot.job_id):
                        await self._store.forget(snapshot.delivery_id)
            except EventsError:
                self._logger.exception("old deliveries not dropped yet", action="webhook.forget_delayed")

    async def _is_known(self, job_id: str) -> bool:
        try:
            await self._log.snapshot(job_id)
        except UnknownJobError:
            return False
        return True
