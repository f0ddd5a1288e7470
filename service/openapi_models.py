"""The bodies, query strings and headers of the wire, as ``/openapi.json`` shows them.

Documentation only: no request is checked against these and no answer is made of them. What is checked is in
:mod:`service.schemas`. The tests compare the two with what the daemon really says.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, Json

from events.deliveries import DeliveryState, WebhookEvent
from events.types import Mode
from service.preferences import ASYNC_ID
from service.routes.pagination import DEFAULT_LIMIT, MAX_CURSOR_CHARS, MAX_LIMIT
from service.schemas import CountTokensBody, MessagesBody

Timestamp = Annotated[str, Field(json_schema_extra={"format": "date-time"})]
JobId = Annotated[str, Field(json_schema_extra={"format": "uuid"})]
JobStatus = Literal["pending", "processing", "completed", "failed", "cancelled"]
Flag = Literal["true", "false"]
FRAME_ID = r"^[0-9]{1,9}-[0-9]{1,9}$"
Cursor = Annotated[str, Field(min_length=1, max_length=MAX_CURSOR_CHARS)]


class _Answer(BaseModel):
    """Fields may be added: clients skip those they do not know."""

    model_config = ConfigDict(extra="allow")


class CreateMessage(MessagesBody):
    """What `POST /v1/messages` of the Anthropic API takes. Fields not named here are passed on."""

    fallbacks: Annotated[
        list[Any] | str | None,
        Field(
            description="Strings other than `default` are models that the gateway tries when this one fails, "
            "at most 8; they are not passed on. Anything else is for the upstream."
        ),
    ] = None


class CountTokens(CountTokensBody):
    """What `POST /v1/messages/count_tokens` of the Anthropic API takes. `max_tokens` may be missing."""


class ForwardedBody(_Answer):
    """Any JSON object that names a model."""

    model: str


class ForwardedAnswer(_Answer):
    """The upstream's answer."""


class StreamEventData(_Answer):
    """A step of a Message in the making, as the Anthropic API has them."""

    type: Annotated[str, Field(description="The same as the event's name.")]


class StreamEvent(BaseModel):
    """A server-sent event (WHATWG HTML, 9.2) of a Message stream.

    In order: `message_start`; for each block `content_block_start`, any number of `content_block_delta`,
    `content_block_stop`; `message_delta`; `message_stop`. `ping` may come anywhere after the start. A stream
    that failed ends with `error`, whose data is the error envelope, and without `message_stop`.
    """

    event: str
    data: Json[StreamEventData]
    id: Annotated[str, Field(description="ATTEMPT-FRAME, where the job can be watched again later.")] = ""


class TokenCount(_Answer):
    """Input tokens of a request."""

    input_tokens: Annotated[int, Field(ge=0)]


class ErrorDetail(_Answer):
    """What went wrong."""

    type: Annotated[
        str,
        Field(
            description="`invalid_request_error`, `authentication_error`, `billing_error`, "
            "`permission_error`, `not_found_error`, `conflict_error`, `request_too_large`, "
            "`rate_limit_error`, `api_error`, `timeout_error`, `overloaded_error`, "
            "or whatever an upstream called its error."
        ),
    ]
    message: str


class ErrorEnvelope(_Answer):
    """The shape of every error, for every path and method."""

    type: Literal["error"]
    error: ErrorDetail
    request_id: Annotated[str, Field(description="The same as in the `request-id` header.")]


class JobError(BaseModel):
    """Why a job failed or was cancelled."""

    type: str
    message: str


class Job(_Answer):
    """A job's record. Its result is read at `POST /v1/messages` with `x-bf-async-id`."""

    id: JobId
    type: Literal["job"]
    status: JobStatus
    mode: Mode
    model: str
    created_at: Timestamp
    started_at: Timestamp | None
    ended_at: Timestamp | None
    expires_at: Annotated[Timestamp | None, Field(description="When its result goes.")]
    attempts: Annotated[int, Field(ge=0)]
    usage: Annotated[
        dict[str, Any], Field(description="As the upstream counts, or estimated; so far, if it runs.")
    ]
    error: JobError | None


class JobList(_Answer):
    """A page of jobs, newest first."""

    data: list[Job]
    has_more: bool
    first_id: JobId | None
    last_id: JobId | None


class JobDeleted(_Answer):
    """The job, its result and its events are gone."""

    id: JobId
    type: Literal["job_deleted"]


class JobEvent(_Answer):
    """One thing that happened to a job, with the fields of its type."""

    seq: Annotated[int, Field(ge=1, description="1, 2, 3... per job.")]
    at: Timestamp
    type: Literal[
        "JobAccepted",
        "JobDetached",
        "AttemptStarted",
        "FramesReceived",
        "AttemptFailed",
        "JobCompleted",
        "JobFailed",
        "JobCancelled",
        "JobExpired",
    ]


class JobFeedEvent(BaseModel):
    """A server-sent event (WHATWG HTML, 9.2) of a job's event feed."""

    id: Annotated[str, Field(description="`seq`.")]
    event: Annotated[str, Field(description="`type`.")]
    data: Json[JobEvent]


class JobEvents(_Answer):
    """A job's events, oldest first."""

    data: list[JobEvent]
    has_more: Annotated[bool, Field(description="Read on with `after` = the last `seq`.")]


class WebhookDelivery(_Answer):
    """A webhook endpoint being told how a job ended."""

    id: Annotated[str, Field(description="The `webhook-id` of every try.")]
    type: Literal["webhook_delivery"]
    status: Annotated[
        DeliveryState,
        Field(description="`skipped`: the configuration says that nothing is sent. `failed`: given up."),
    ]
    endpoint: str
    event: WebhookEvent
    job_id: JobId
    owner: Annotated[str, Field(description="Name of the key that submitted the job.")]
    created_at: Timestamp
    attempts: Annotated[int, Field(ge=0, description="Tries in all, redeliveries included.")]
    next_attempt_at: Timestamp | None
    ended_at: Timestamp | None
    last_status_code: Annotated[int | None, Field(description="What the endpoint answered to the last try.")]
    last_error: str | None


class WebhookDeliveryList(_Answer):
    """A page of deliveries, newest first."""

    data: list[WebhookDelivery]
    has_more: bool
    first_id: str | None
    last_id: str | None


class Model(_Answer):
    """A model that can be asked for."""

    type: Literal["model"]
    id: str
    display_name: str
    created_at: Timestamp


class ModelList(_Answer):
    """A page of models, in the order of the configuration."""

    data: list[Model]
    has_more: bool
    first_id: str | None
    last_id: str | None


class About(_Answer):
    """What this is."""

    name: Literal["messagesd"]
    documentation: str


class Health(_Answer):
    """The daemon is alive."""

    status: Literal["ok"]


class OpenCircuit(_Answer):
    """A target that is left alone because it kept failing."""

    provider: str
    model: str
    state: Literal["open", "half_open"]
    retry_in_s: Annotated[float, Field(description="Until a probe is sent; 0 once one may be.")]


class Readiness(_Answer):
    """Whether the daemon takes work. `degraded`: it does, but some targets cannot be asked now."""

    status: Literal["ready", "degraded", "not ready"]
    draining: bool
    providers: list[str]
    down: Annotated[list[str], Field(description="Providers none of whose targets can be asked, as known.")]
    circuits: Annotated[list[OpenCircuit], Field(description="At most 100, the last to fail first.")]


class OpenAPIDocument(_Answer):
    """OpenAPI 3.1."""

    openapi: str


class MessageHeaders(BaseModel):
    """How a Message is to be made."""

    x_bf_async: Flag | None = Field(
        None, description="`true`: answer at once with the pending body; the job runs on. Not with `stream`."
    )
    x_bf_async_id: JobId | None = Field(
        None, description="Poll this job. The request body is not read. Wins over `x-bf-async`."
    )
    x_bf_async_job_result_ttl: int | None = Field(
        None,
        ge=1,
        description="Seconds to keep the result, from completion; at most `jobs.max_result_ttl_s`.",
    )
    x_bf_detach: Flag | None = Field(
        None, description="`true`: a plain or streamed job that goes on when the client leaves."
    )
    x_bf_async_webhook: str | None = Field(
        None,
        description="The name of a configured endpoint that is told how the job ended, with a signed call. "
        "For async and detached jobs. Unknown or disabled: 400.",
    )
    prefer: str | None = Field(
        None,
        description="`wait=S` (RFC 7240): answer with the pending body after S seconds, and let the job go "
        "on. On a poll: wait up to S seconds for its end. Other preferences are ignored.",
        examples=["wait=10"],
    )
    anthropic_version: str | None = Field(None, description="Passed on.", examples=["2023-06-01"])
    anthropic_beta: str | None = Field(None, description="Passed on, as is every other `anthropic-*` header.")


class ResultHeaders(BaseModel):
    """How long to wait for a result."""

    prefer: str | None = Field(
        None,
        description="`wait=S` (RFC 7240): wait up to S seconds for the job's end.",
        examples=["wait=10"],
    )


class ForwardedHeaders(BaseModel):
    """What is passed on with a body."""

    anthropic_version: str | None = Field(None, description="Passed on.", examples=["2023-06-01"])
    anthropic_beta: str | None = Field(None, description="Passed on.")


class EventsHeaders(BaseModel):
    """Where to resume an event feed."""

    last_event_id: str | None = Field(
        None,
        pattern=r"^[0-9]{1,12}$",
        description="The `seq` of the last event seen; event streams only. Wins over `after`.",
    )


class StreamHeaders(BaseModel):
    """Where to resume a stream."""

    last_event_id: str | None = Field(
        None,
        pattern=FRAME_ID,
        description="The `id` of the last frame seen: ATTEMPT-FRAME.",
        examples=["1-17"],
    )


class ListQuery(BaseModel):
    """Which page of a list."""

    limit: Annotated[int, Field(ge=1, le=MAX_LIMIT, description="Entries of a page.")] = DEFAULT_LIMIT
    after_id: Cursor | None = Field(None, description="The page after this entry. Not with `before_id`.")
    before_id: Cursor | None = Field(None, description="The page before this entry. Not with `after_id`.")


class JobsQuery(ListQuery):
    """Which jobs."""

    status: JobStatus | None = Field(None, description="Only jobs in this state.")
    model: str | None = Field(None, description="Only jobs for this model, spelt as it was asked for.")


class DeliveriesQuery(ListQuery):
    """Which deliveries."""

    job_id: JobId | None = Field(
        None, description="Only those of this job: one page, without `after_id` and `before_id`."
    )


class EventsQuery(BaseModel):
    """Which events."""

    after: int | None = Field(None, ge=0, lt=10**12, description="Only events with a greater `seq`.")


class StreamQuery(BaseModel):
    """Where to resume a stream, for clients that cannot set headers."""

    starting_after: str | None = Field(
        None, pattern=FRAME_ID, description="As `Last-Event-ID`, which wins over it.", examples=["1-17"]
    )


RESPONSE_HEADERS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "request-id": ("On every answer; name it when you report a problem.", {"type": "string"}),
    ASYNC_ID: ("The job this answer is about.", {"type": "string", "format": "uuid"}),
    "x-bf-async-status": (
        "Where that job stands.",
        {"type": "string", "enum": ["pending", "processing", "completed", "failed", "cancelled"]},
    ),
    "retry-after": ("Seconds to wait before the next try or poll.", {"type": "string"}),
    "preference-applied": ("The wait that was honoured (RFC 7240).", {"type": "string"}),
    "x-should-retry": ("`false`: the same request would fail again.", {"type": "string"}),
    "x-bf-token-count": (
        "There when the count is an estimate.",
        {"type": "string", "enum": ["estimated"]},
    ),
    "www-authenticate": ("Which credentials are taken (RFC 9110, 11.6.1).", {"type": "string"}),
}
"""Header fields of answers: what each says, and its schema."""
