"""``/v1/webhooks/deliveries``: what endpoints were told, and telling them again. For admin keys."""

from typing import Any

from events.codec import rfc3339
from events.deliveries import DeliverySnapshot
from service.dependencies import Dependencies
from service.errors import InvalidRequestError
from service.http import Reply, Request
from service.replies import json_reply
from service.routes.pagination import page_query


async def list_deliveries(deps: Dependencies, request: Request) -> Reply:
    """Deliveries, newest first; with ``?job_id=`` those of that job, on one page."""
    query = page_query(request)
    job_id = request.query.get("job_id")
    if job_id is not None:
        if query.after_id or query.before_id:
            raise InvalidRequestError(
                "job_id: a job's deliveries are one page; give no after_id or before_id"
            )
        deliveries, has_more = await deps.webhooks.about(job_id), False
    else:
        deliveries, has_more = await deps.webhooks.page(
            limit=query.limit, after_id=query.after_id, before_id=query.before_id
        )
    return json_reply(
        {
            "data": [delivery_object(delivery) for delivery in deliveries],
            "has_more": has_more,
            "first_id": deliveries[0].delivery_id if deliveries else None,
            "last_id": deliveries[-1].delivery_id if deliveries else None,
        }
    )


async def redeliver(deps: Dependencies, request: Request, delivery_id: str) -> Reply:
    """Send a delivery that is closed again; 409 while it is not."""
    return json_reply(delivery_object(await deps.webhooks.redeliver(delivery_id, by=request.principal.name)))


def delivery_object(delivery: DeliverySnapshot) -> dict[str, Any]:
    """A delivery as the wire shows it. No address and no secret."""

    def moment(at: float | None) -> str | None:
        return None if at is None else rfc3339(at)

    return {
        "id": delivery.delivery_id,
        "type": "webhook_delivery",
        "status": delivery.state.value,
        "endpoint": delivery.endpoint,
        "event": delivery.event.value,
        "job_id": delivery.job_id,
        "owner": delivery.owner,
        "created_at": rfc3339(delivery.created_at),
        "attempts": delivery.attempts,
        "next_attempt_at": moment(delivery.next_attempt_at),
        "ended_at": moment(delivery.ended_at),
        "last_status_code": delivery.last_status_code,
        "last_error": delivery.last_error,
    }
