"""The documentation of Message Batches: their shapes, and their entries of the table of operations."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from service import openapi_models as models
from service.openapi_operation import Answer, Operation
from service.routes.batches import JSONL
from service.schemas import BatchRequest

BatchId = Annotated[str, Field(pattern="^msgbatch_[0-9a-f]{28}$")]


class _Shape(BaseModel):
    """Fields may be added: clients skip those they do not know."""

    model_config = ConfigDict(extra="allow")


class CreateBatch(_Shape):
    """Requests to be answered in the background; `params` is the body of a Messages call without `stream`."""

    requests: Annotated[list[BatchRequest], Field(min_length=1, max_length=100_000)]


class RequestCounts(BaseModel):
    """How many requests of the batch stand how; their sum is the number of its requests at every moment."""

    processing: Annotated[int, Field(ge=0)]
    succeeded: Annotated[int, Field(ge=0)]
    errored: Annotated[int, Field(ge=0)]
    canceled: Annotated[int, Field(ge=0)]
    expired: Annotated[int, Field(ge=0)]


class MessageBatch(_Shape):
    """A batch, in the shape of the Anthropic API."""

    id: BatchId
    type: Literal["message_batch"]
    processing_status: Literal["in_progress", "canceling", "ended"]
    request_counts: RequestCounts
    created_at: models.Timestamp
    expires_at: Annotated[models.Timestamp, Field(description="24 hours later: what has not ended expires.")]
    ended_at: models.Timestamp | None
    archived_at: Annotated[None, Field(description="Batches are forgotten, not archived.")]
    cancel_initiated_at: models.Timestamp | None
    results_url: Annotated[str | None, Field(description="Of this gateway; null until the batch has ended.")]


class MessageBatchList(_Shape):
    """A page of batches, newest first."""

    data: list[MessageBatch]
    has_more: bool
    first_id: BatchId | None
    last_id: BatchId | None


class MessageBatchDeleted(_Shape):
    """The batch, its results and its items are gone."""

    id: BatchId
    type: Literal["message_batch_deleted"]


_BATCH_ID = MappingProxyType({"batch_id": "The `id` of the batch."})
_THIS_BATCH = MappingProxyType({"batch_id": "$response.body#/id"})
_EXAMPLE = MappingProxyType(
    {
        "requests": [
            {
                "custom_id": "greeting-1",
                "params": {
                    "model": "echo",
                    "max_tokens": 64,
                    "messages": [{"role": "user", "content": "Hello there"}],
                },
            }
        ]
    }
)

BATCHES: Mapping[tuple[str, str], Operation] = MappingProxyType(
    {
        ("POST", "/v1/messages/batches"): Operation(
            id="create_batch",
            tag="batches",
            summary="Create a Message Batch",
            description="All of it is accepted, or none. A request whose `params` are no Messages call ends "
            "as `errored`, and fails nothing else; 400 names the first that has no proper `custom_id` or "
            "`params`.",
            headers=models.ForwardedHeaders,
            body=CreateBatch,
            examples=MappingProxyType({"one": _EXAMPLE}),
            answers={
                200: Answer(
                    description="The batch, in progress.",
                    model=MessageBatch,
                    links=MappingProxyType(
                        {
                            "get_batch": _THIS_BATCH,
                            "cancel_batch": _THIS_BATCH,
                            "batch_results": _THIS_BATCH,
                            "delete_batch": _THIS_BATCH,
                        }
                    ),
                )
            },
            errors=(529,),
        ),
        ("GET", "/v1/messages/batches"): Operation(
            id="list_batches",
            tag="batches",
            summary="List Message Batches",
            description="The caller's own, newest first; an admin key sees everybody's.",
            query=models.ListQuery,
            answers={200: Answer(description="A page.", model=MessageBatchList)},
        ),
        ("GET", "/v1/messages/batches/<batch_id>"): Operation(
            id="get_batch",
            tag="batches",
            summary="Get a Message Batch",
            path=_BATCH_ID,
            answers={200: Answer(description="The batch.", model=MessageBatch)},
        ),
        ("DELETE", "/v1/messages/batches/<batch_id>"): Operation(
            id="delete_batch",
            tag="batches",
            summary="Delete an ended Message Batch",
            description="With its results and its items. 409 before it has ended: cancel it first.",
            path=_BATCH_ID,
            answers={200: Answer(description="It is gone.", model=MessageBatchDeleted)},
            errors=(409, 529),
        ),
        ("POST", "/v1/messages/batches/<batch_id>/cancel"): Operation(
            id="cancel_batch",
            tag="batches",
            summary="Cancel a Message Batch",
            description="Requests that run are cancelled, those that wait are not begun; the batch has ended "
            "soon after. One that has ended stays as it is.",
            path=_BATCH_ID,
            answers={200: Answer(description="The batch, canceling.", model=MessageBatch)},
            errors=(529,),
        ),
        ("GET", "/v1/messages/batches/<batch_id>/results"): Operation(
            id="batch_results",
            tag="batches",
            summary="Read the results of a Message Batch",
            description='A JSON object a line: `{"custom_id", "result"}`, where `result` is of the type '
            "`succeeded` (with `message`), `errored` (with `error`, an error envelope), `canceled` or "
            "`expired`. In the order of the requests. 404 until the batch has ended.",
            path=_BATCH_ID,
            answers={200: Answer(description="The results.", text=JSONL)},
        ),
    }
)
"""By method and rule of the URL map."""
