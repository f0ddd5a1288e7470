"""Every route's documentation, in one table: :data:`OPERATIONS`. Data only; :mod:`service.openapi` reads it.

A test holds it against the routes there are: each must be here, and nothing else may be.
"""

from collections.abc import Mapping
from types import MappingProxyType

from service import openapi_models as models
from service.metrics import TEXT_FORMAT
from service.openapi_batches import BATCHES
from service.openapi_operation import JOB_HEADERS, Answer, Operation
from service.preferences import ASYNC_ID
from service.schemas import Message

_JOB_ID = MappingProxyType({"job_id": "As in `x-bf-async-id`."})
_GREETING = MappingProxyType({"model": "echo", "messages": [{"role": "user", "content": "Hello there"}]})
_THIS_JOB = MappingProxyType({"job_id": f"$response.header.{ASYNC_ID}"})

_CREATE_MESSAGE = Operation(
    id="create_message",
    tag="messages",
    summary="Make a Message, or poll a job",
    description="Plain by default; `stream: true` in the body streams it; `x-bf-async: true` answers at once "
    "with the pending body (a Message with empty content); `x-bf-async-id` polls. A plain or streamed job is "
    "cancelled when its last watcher leaves, unless `x-bf-detach: true` or `Prefer: wait` let it go on. "
    "A stream that fails after its first frame ends with `event: error`. Polling a job that failed answers "
    "with the job's own error, one that was cancelled with 409.",
    headers=models.MessageHeaders,
    body=models.CreateMessage,
    # Polling sends none.
    body_required=False,
    examples=MappingProxyType(
        {
            "plain": {**_GREETING, "max_tokens": 64},
            "streamed": {**_GREETING, "max_tokens": 64, "stream": True},
        }
    ),
    answers={
        200: Answer(
            description="The Message, its stream, or the pending body.",
            model=Message,
            event=models.StreamEvent,
            headers=(*JOB_HEADERS, "retry-after", "preference-applied"),
            links=MappingProxyType(
                {
                    "create_message": {f"header.{ASYNC_ID}": f"$response.header.{ASYNC_ID}"},
                    "get_job": _THIS_JOB,
                    "job_events": _THIS_JOB,
                    "job_stream": _THIS_JOB,
                    "cancel_job": _THIS_JOB,
                    "delete_job": _THIS_JOB,
                }
            ),
        )
    },
    upstream=True,
)

_COUNT_TOKENS = Operation(
    id="count_tokens",
    tag="messages",
    summary="Count the input tokens of a request",
    headers=models.ForwardedHeaders,
    body=models.CountTokens,
    examples=MappingProxyType({"plain": _GREETING}),
    answers={
        200: Answer(
            description="The count, by the provider that would answer the request.",
            model=models.TokenCount,
            headers=("x-bf-token-count",),
        )
    },
    upstream=True,
)

_FORWARD = Operation(
    id="forward",
    tag="messages",
    summary="Any other path below /v1/messages",
    description="Passed on to the provider of the body's model if that speaks the Anthropic protocol; "
    "404 otherwise.",
    path=MappingProxyType({"rest": "May contain slashes."}),
    headers=models.ForwardedHeaders,
    body=models.ForwardedBody,
    answers={200: Answer(description="The upstream's own answer.", model=models.ForwardedAnswer)},
    upstream=True,
)

_FIRST_MODEL = MappingProxyType({"get_model": {"model_id": "$response.body#/data/0/id"}})
_FIRST_JOB = MappingProxyType({"get_job": {"job_id": "$response.body#/data/0/id"}})

_MODELS = {
    ("GET", "/v1/models"): Operation(
        id="list_models",
        tag="models",
        summary="List models",
        description="Those that the configuration names and the caller may use.",
        query=models.ListQuery,
        answers={200: Answer(description="A page.", model=models.ModelList, links=_FIRST_MODEL)},
    ),
    ("GET", "/v1/models/<path:model_id>"): Operation(
        id="get_model",
        tag="models",
        summary="Get a model",
        path=MappingProxyType({"model_id": "May contain slashes (`provider/model`)."}),
        answers={200: Answer(description="The model.", model=models.Model)},
    ),
}

_JOBS = {
    ("GET", "/v1/jobs"): Operation(
        id="list_jobs",
        tag="jobs",
        summary="List jobs",
        description="The caller's own, newest first; an admin key sees everybody's.",
        query=models.JobsQuery,
        answers={200: Answer(description="A page.", model=models.JobList, links=_FIRST_JOB)},
    ),
    ("GET", "/v1/jobs/<job_id>"): Operation(
        id="get_job",
        tag="jobs",
        summary="Get a job",
        path=_JOB_ID,
        answers={200: Answer(description="The job.", model=models.Job, headers=JOB_HEADERS)},
    ),
    ("DELETE", "/v1/jobs/<job_id>"): Operation(
        id="delete_job",
        tag="jobs",
        summary="Delete an ended job",
        description="With its result and its events. 409 while it runs, and for an item of a batch.",
        path=_JOB_ID,
        answers={200: Answer(description="It is gone.", model=models.JobDeleted)},
        errors=(409,),
    ),
    ("GET", "/v1/jobs/<job_id>/result"): Operation(
        id="job_result",
        tag="jobs",
        summary="Read a job's result",
        description="What a poll answers: the pending body, the Message, or the job's own error. A webhook "
        "names this address as `result_url`.",
        path=_JOB_ID,
        headers=models.ResultHeaders,
        answers={
            200: Answer(
                description="The Message, or the pending body.",
                model=Message,
                headers=(*JOB_HEADERS, "retry-after", "preference-applied"),
            )
        },
        upstream=True,
    ),
    ("GET", "/v1/jobs/<job_id>/events"): Operation(
        id="job_events",
        tag="jobs",
        summary="What happened to a job",
        description="With `Accept: text/event-stream` the events are replayed and then follow live, each "
        "with its `seq` as `id`.",
        path=_JOB_ID,
        query=models.EventsQuery,
        headers=models.EventsHeaders,
        answers={
            200: Answer(
                description="The events.",
                model=models.JobEvents,
                event=models.JobFeedEvent,
                headers=JOB_HEADERS,
            )
        },
    ),
    ("GET", "/v1/jobs/<job_id>/stream"): Operation(
        id="job_stream",
        tag="jobs",
        summary="Watch a job",
        description="Its Anthropic stream: replayed from `message_start`, or from after the frame named, and "
        "then live. Each frame has an `id` of the form ATTEMPT-FRAME. 409: the cursor's attempt was given up "
        "(read anew), or the job has no stream, or none yet (it waits in its batch). A job that failed "
        "without a frame answers with its error.",
        path=_JOB_ID,
        query=models.StreamQuery,
        headers=models.StreamHeaders,
        answers={
            200: Answer(description="The stream.", event=models.StreamEvent, headers=JOB_HEADERS),
            204: Answer(description="The cursor is at the end of a completed job.", headers=JOB_HEADERS),
        },
        upstream=True,
    ),
    ("POST", "/v1/jobs/<job_id>/cancel"): Operation(
        id="cancel_job",
        tag="jobs",
        summary="Cancel a job",
        description="Closes the upstream call. A job that has ended stays as it is.",
        path=_JOB_ID,
        answers={200: Answer(description="The job.", model=models.Job, headers=JOB_HEADERS)},
        errors=(529,),
    ),
}

_WEBHOOKS = {
    ("GET", "/v1/webhooks/deliveries"): Operation(
        id="list_deliveries",
        tag="webhooks",
        summary="List webhook deliveries",
        description="Everybody's, newest first. For admin keys.",
        access="admin",
        query=models.DeliveriesQuery,
        answers={
            200: Answer(
                description="A page.",
                model=models.WebhookDeliveryList,
                links=MappingProxyType({"redeliver": {"delivery_id": "$response.body#/data/0/id"}}),
            )
        },
    ),
    ("POST", "/v1/webhooks/deliveries/<delivery_id>/redeliver"): Operation(
        id="redeliver",
        tag="webhooks",
        summary="Send a delivery again",
        description="Under the same `webhook-id`, with a whole round of tries. 409 while it is still being "
        "delivered, or when its endpoint is not configured or disabled. For admin keys.",
        access="admin",
        path=MappingProxyType({"delivery_id": "The `webhook-id`."}),
        answers={200: Answer(description="It is under way.", model=models.WebhookDelivery)},
        errors=(409, 529),
    ),
}

_ABOUT = Answer(description="It is there.", model=models.About)


def _probe(id_: str) -> Operation:
    return Operation(
        id=id_,
        tag="gateway",
        summary="What this is",
        description="Agents probe it at their start.",
        access="open",
        answers={200: _ABOUT},
    )


_GATEWAY = {
    ("GET", "/"): _probe("root"),
    ("HEAD", "/"): _probe("probe_root"),
    ("GET", "/api/hello"): _probe("hello"),
    ("HEAD", "/api/hello"): _probe("probe_hello"),
    ("GET", "/healthz"): Operation(
        id="healthz",
        tag="gateway",
        summary="Is it alive?",
        access="open",
        answers={200: Answer(description="It is.", model=models.Health)},
    ),
    ("GET", "/readyz"): Operation(
        id="readyz",
        tag="gateway",
        summary="Does it take work?",
        access="keyed",
        answers={
            200: Answer(description="It does.", model=models.Readiness),
            503: Answer(
                description="It does not: it is shutting down, or no target can be asked.",
                model=models.Readiness,
            ),
        },
    ),
    ("GET", "/metrics"): Operation(
        id="metrics",
        tag="gateway",
        summary="Numbers for Prometheus",
        access="keyed",
        answers={200: Answer(description="The text exposition format.", text=TEXT_FORMAT)},
    ),
    ("GET", "/openapi.json"): Operation(
        id="openapi",
        tag="gateway",
        summary="This document",
        access="open",
        answers={200: Answer(description="OpenAPI 3.1.", model=models.OpenAPIDocument)},
    ),
    ("GET", "/docs"): Operation(
        id="docs",
        tag="gateway",
        summary="This document, for people",
        access="open",
        answers={200: Answer(description="A web page.", text="text/html")},
    ),
}

OPERATIONS: Mapping[tuple[str, str], Operation] = MappingProxyType(
    {
        ("POST", "/v1/messages"): _CREATE_MESSAGE,
        ("POST", "/v1/messages/count_tokens"): _COUNT_TOKENS,
        ("POST", "/v1/messages/<forwarded:rest>"): _FORWARD,
        **BATCHES,
        **_MODELS,
        **_JOBS,
        **_WEBHOOKS,
        **_GATEWAY,
    }
)
"""By method and rule of the URL map."""

ERROR_TEXTS: Mapping[int, str] = MappingProxyType(
    {
        400: "The request cannot be understood: `invalid_request_error`.",
        401: "No key, or an unknown one: `authentication_error`.",
        402: "The budget is spent: `billing_error`.",
        403: "The key is blocked, or may not do this: `permission_error`.",
        404: "There is no such thing for this caller: `not_found_error`.",
        408: "The body did not arrive in time: `invalid_request_error`.",
        409: "The state of the job, or batch, forbids it, or the job was cancelled: `conflict_error`.",
        413: "The body is too large: `request_too_large`.",
        422: "The upstream cannot process the request: `invalid_request_error`.",
        429: "Too many requests: `rate_limit_error`.",
        431: "The header fields are too large: `invalid_request_error`.",
        500: "The gateway's own fault: `api_error`.",
        502: "The upstream cannot be reached, or talks nonsense: `api_error`.",
        503: "The upstream is not available: `api_error`.",
        504: "The upstream took too long: `timeout_error`.",
        529: "Not accepted, try later: `overloaded_error`.",
    }
)
"""What each error status means here."""
