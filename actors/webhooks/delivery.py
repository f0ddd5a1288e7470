"""The actor of one delivery: it makes a try when the delivery's time has come, and records what came of it.

Between two tries a delivery is a record and an entry of a queue, not a task. While it runs, the actor is the
only writer of its delivery. :func:`conclusion` is the whole decision, pure and synchronous.
"""

import structlog
import trio

from actors.clock import Clock
from actors.webhooks.client import Answered, NotCalled, NotReached, Outcome, retry_after_s
from actors.webhooks.endpoint import Endpoint
from actors.webhooks.options import WebhookOptions
from actors.webhooks.store import DeliveryStore
from actors.webhooks.telemetry import WebhookTelemetry
from events.deliveries import (
    DeliveryAttemptFailed,
    DeliveryGivenUp,
    DeliverySnapshot,
    DeliverySucceeded,
    payload,
)
from events.errors import LogUnavailableError, SequenceConflict, UnknownRecordError

COMMIT_RETRY_S = 1.0
"""Pause before what came of a try is offered to the log again."""
CRASHED = NotReached("the gateway failed while it made this try")

Conclusion = DeliverySucceeded | DeliveryAttemptFailed | DeliveryGivenUp


def may_retry(outcome: Outcome) -> bool:
    """Whether another try may fare better: no answer, 408, 429 and 5xx. A redirect is refused for good."""
    match outcome:
        case Answered(status=status):
            return status in (408, 429) or 500 <= status <= 599
        case NotReached():
            return True
        case NotCalled():
            return False


def backoff_s(retry: int, options: WebhookOptions) -> float:
    """The pause before retry number ``retry``, from 1: each twice as long as the last, up to a bound."""
    return min(options.backoff_s * 2.0 ** (retry - 1), options.max_backoff_s)


def conclusion(
    snapshot: DeliverySnapshot, outcome: Outcome, options: WebhookOptions, *, at: float, duration_s: float
) -> Conclusion:
    """What a try that ended at ``at`` means for its delivery."""
    status = outcome.status if isinstance(outcome, Answered) else None
    if isinstance(outcome, Answered) and 200 <= outcome.status <= 299:
        return DeliverySucceeded(at=at, status_code=outcome.status, duration_s=duration_s)
    error = f"it answered {outcome.status}" if isinstance(outcome, Answered) else outcome.reason
    retry = snapshot.round_attempts + 1
    if not may_retry(outcome) or retry > options.max_retries:
        return DeliveryGivenUp(at=at, error=error, status_code=status, duration_s=duration_s)
    asked_s = retry_after_s(outcome.retry_after, now=at) if isinstance(outcome, Answered) else 0.0
    pause_s = max(backoff_s(retry, options), min(asked_s, options.max_backoff_s))
    return DeliveryAttemptFailed(
        at=at, next_attempt_at=at + pause_s, error=error, status_code=status, duration_s=duration_s
    )


class DeliveryActor:
    """One delivery whose time has come."""

    def __init__(
        self,
        delivery_id: str,
        endpoint: Endpoint,
        *,
        store: DeliveryStore,
        clock: Clock,
        telemetry: WebhookTelemetry,
        logger: structlog.typing.FilteringBoundLogger,
    ) -> None:
        self._delivery_id = delivery_id
        self._endpoint = endpoint
        self._store = store
        self._clock = clock
        self._telemetry = telemetry
        self._logger = logger.bind(delivery_id=delivery_id, endpoint=endpoint.name)

    async def run(self) -> float | None:
        """One try; when the next is due (Unix seconds), None when there is none.

        Raises nothing but what cancels it. A crash of the try counts as one without an answer; a delivery
        that cannot be read or recorded for another reason than an unavailable log is left for the next start.
        Cancelled before the outcome is recorded, the try was not made as
        far as the log knows: it is made again at the next start.
        """
        try:
            return await self._try()
        except LogUnavailableError:
            self._logger.warning("the delivery cannot be read now", action="webhook.delayed")
            return self._clock.now() + COMMIT_RETRY_S
        except Exception:
            # The nursery is every delivery's: what left it here would end them all.
            self._logger.exception("delivery crashed", action="webhook.stuck")
            return None

    async def _try(self) -> float | None:
        try:
            snapshot = await self._store.get(self._delivery_id)
        except UnknownRecordError:
            return None
        if not snapshot.pending:
            return None
        started_at = self._clock.now()
        outcome = await self._call(snapshot, started_at)
        ended_at = self._clock.now()
        event = conclusion(
            snapshot, outcome, self._endpoint.options, at=ended_at, duration_s=ended_at - started_at
        )
        snapshot = await self._record(snapshot, event)
        self._tell(snapshot, event)
        return snapshot.next_attempt_at

    async def _call(self, snapshot: DeliverySnapshot, at: float) -> Outcome:
        try:
            return await self._endpoint.post(snapshot.delivery_id, payload(snapshot), at=at)
        except Exception:
            self._logger.exception("try crashed", action="webhook.crashed")
            return CRASHED

    async def _record(self, snapshot: DeliverySnapshot, event: Conclusion) -> DeliverySnapshot:
        while True:
            try:
                return await self._store.append(snapshot, self._delivery_id, event)
            except SequenceConflict:
                # A write of ours that was not heard of may have been made after all.
                return await self._store.get(self._delivery_id)
            except LogUnavailableError:
                self._logger.warning("the try is not recorded yet", action="webhook.commit_delayed")
                await trio.sleep(COMMIT_RETRY_S)

    def _tell(self, snapshot: DeliverySnapshot, event: Conclusion) -> None:
        outcome = "retry" if snapshot.pending else snapshot.state.value
        self._telemetry.delivery_tried(self._endpoint.name, outcome)
        level = self._logger.info if isinstance(event, DeliverySucceeded) else self._logger.warning
        level(
            "webhook tried",
            action=f"webhook.{outcome}",
            job_id=snapshot.job_id,
            webhook_event=snapshot.event.value,
            attempt=snapshot.attempts,
            status_code=snapshot.last_status_code,
            error=snapshot.last_error,
            duration_s=round(event.duration_s, 3),
        )
