"""``/v1/messages/batches``: Message Batches, in the shapes of the Anthropic API.

See https://docs.anthropic.com/en/api/creating-message-batches. What differs: ``request_counts`` are right at
every moment, not only once the batch has ended, and a batch is forgotten rather than archived.
"""

from collections.abc import AsyncIterator
from typing import Any

import orjson
import trio

from actors.batch_upload import BatchItem, UploadTerms
from actors.batches import Batch
from actors.errors import ActorError, JobConflictError
from actors.providers.splice import member
from events.batches import ItemResult, result_of
from events.codec import rfc3339
from events.log.items import Item
from events.projections import JobSnapshot
from service import schemas
from service.batch_body import BatchBodyReader, RawRequest
from service.dependencies import Dependencies
from service.errors import INTERNAL_FAILURE, InvalidRequestError, NotFoundError, envelope
from service.http import HeaderList, Reply, Request
from service.preferences import may_rerun
from service.replies import json_reply
from service.routes.messages import check_json, check_model, fallbacks_of, forwarded_headers
from service.routes.pagination import page_query

JSONL = "application/x-jsonl"
RESULTS_AT_ONCE = 256
"""Results read from the log at once."""
RESULTS_BYTES = 256 << 10
"""Of Messages read from the log at once, about."""
TURN_ITEMS = 16
"""Items taken in before others have a turn."""
WRAPPING_BYTES = 1024
"""What an item's ``custom_id`` and brackets may add to its params."""

_FINAL: HeaderList = [("x-should-retry", "false")]


class BatchConflictError(JobConflictError):
    """The batch's state does not allow it, and asking again at once would not change that."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.headers = tuple(_FINAL)


async def create_batch(deps: Dependencies, request: Request) -> Reply:
    """Take a batch on. Everything is in the log before this answers."""
    check_json(request)
    upload = request.upload
    if upload is None:
        raise AssertionError("this route takes an upload")
    upload.check_length(request.headers.get("content-length"))
    reader = BatchBodyReader(max_request_bytes=deps.settings.server.max_body_bytes + WRAPPING_BYTES)
    terms = UploadTerms(
        owner=request.principal.name,
        request_id=request.request_id,
        headers=forwarded_headers(request),
        may_rerun=may_rerun(request.headers),
    )
    seen: set[str] = set()
    async with deps.batches.open_upload(terms) as batch:
        async for chunk in upload:
            for raw in reader.feed(chunk):
                await batch.add(_item(deps, request, raw, seen))
                if raw.place % TURN_ITEMS == 0:
                    await trio.lowlevel.checkpoint()
        if not reader.finish():
            raise InvalidRequestError("requests: List should have at least 1 item")
        return json_reply(_message_batch(Batch(*await batch.commit()), request))


def _item(deps: Dependencies, request: Request, raw: RawRequest, seen: set[str]) -> BatchItem:
    """One request of the batch. Raises InvalidRequestError for one that has no name to be errored under."""
    place = f"requests.{raw.place}"
    try:
        fields = schemas.parse_object(raw.raw)
    except InvalidRequestError as error:
        raise InvalidRequestError(f"{place}: {error.message}") from None
    schemas.check(schemas.BatchRequest, fields, within=f"{place}.")
    custom_id, params = fields["custom_id"], fields["params"]
    if custom_id in seen:
        raise InvalidRequestError(f"{place}.custom_id: {custom_id!r} is used twice")
    seen.add(custom_id)
    model = params.get("model")
    failure = None
    try:
        _check_params(deps, request, params)
    except ActorError as error:
        failure = error.failure
    return BatchItem(
        custom_id=custom_id,
        body=member(raw.raw, "params"),
        model=model if isinstance(model, str) else "",
        failure=failure,
    )


def _check_params(deps: Dependencies, request: Request, params: dict[str, Any]) -> None:
    schemas.check(schemas.MessagesBody, params)
    if params.get("stream"):
        raise InvalidRequestError("stream: a request of a batch is not streamed")
    check_model(request.principal, params["model"])
    # Read again from the item once it is run: what is refused of a call is refused here.
    fallbacks_of(request.principal, params)
    deps.router.resolve(params["model"])


def _message_batch(found: Batch, request: Request) -> dict[str, Any]:
    batch, counts = found

    def moment(at: float | None) -> str | None:
        return None if at is None else rfc3339(at)

    results = f"{request.origin}/v1/messages/batches/{batch.batch_id}/results"
    return {
        "id": batch.batch_id,
        "type": "message_batch",
        "processing_status": batch.state.value,
        "request_counts": counts,
        "created_at": rfc3339(batch.created_at),
        "expires_at": rfc3339(batch.expires_at),
        "ended_at": moment(batch.ended_at),
        "archived_at": None,
        "cancel_initiated_at": moment(batch.cancel_initiated_at),
        "results_url": results if batch.ended else None,
    }


async def list_batches(deps: Dependencies, request: Request) -> Reply:
    """The caller's batches, newest first."""
    query = page_query(request)
    page = await deps.batches.page(
        request.owner, limit=query.limit, after_id=query.after_id, before_id=query.before_id
    )
    data = [_message_batch(found, request) for found in page.batches]
    return json_reply(
        {
            "data": data,
            "has_more": page.has_more,
            "first_id": data[0]["id"] if data else None,
            "last_id": data[-1]["id"] if data else None,
        }
    )


async def get_batch(deps: Dependencies, request: Request, batch_id: str) -> Reply:
    """One batch."""
    return json_reply(_message_batch(await deps.batches.describe(batch_id, request.owner), request))


async def cancel_batch(deps: Dependencies, request: Request, batch_id: str) -> Reply:
    """Begin to stop a batch; one that has ended stays as it is."""
    found = await deps.batches.cancel(batch_id, request.owner, by=request.principal.name)
    return json_reply(_message_batch(found, request))


async def delete_batch(deps: Dependencies, request: Request, batch_id: str) -> Reply:
    """Drop an ended batch with its results and its items."""
    try:
        await deps.batches.delete(batch_id, request.owner)
    except JobConflictError as error:
        raise BatchConflictError(error.message) from None
    return json_reply({"id": batch_id, "type": "message_batch_deleted"})


async def batch_results(deps: Dependencies, request: Request, batch_id: str) -> Reply:
    """The results of an ended batch, a JSON object a line, in the order of its requests."""
    batch, _ = await deps.batches.describe(batch_id, request.owner)
    if not batch.ended:
        raise NotFoundError("the batch has not ended; it has no results yet")
    return Reply(200, _Results(deps, batch_id, batch.requests), [], JSONL)


class _Results:
    """Read page by page as they leave, so that a page is all that is held."""

    def __init__(self, deps: Dependencies, batch_id: str, requests: int) -> None:
        self._items = deps.log.items
        self._batch_id = batch_id
        self._requests = requests

    async def __aiter__(self) -> AsyncIterator[bytes]:
        sent = after = 0
        while sent < self._requests:
            page = await self._items.results(
                self._batch_id, after, limit=RESULTS_AT_ONCE, max_bytes=RESULTS_BYTES
            )
            if not page:
                # Broken off, the reader knows that it has not got all of them.
                raise NotFoundError("the batch was deleted while its results were read")
            sent += len(page)
            after = page[-1].number
            yield b"".join(map(_line, page))


def _line(item: Item) -> bytes:
    custom_id = orjson.dumps(item.job.custom_id)
    return b'{"custom_id":%b,"result":%b}\n' % (custom_id, _result(item.job))


def _result(job: JobSnapshot) -> bytes:
    match result_of(job):
        case ItemResult.SUCCEEDED:
            # A line break between tokens would break the line; within strings JSON has none.
            message = job.message if b"\n" not in job.message else orjson.dumps(orjson.loads(job.message))
            return b'{"type":"succeeded","message":%b}' % message
        case ItemResult.ERRORED:
            error = envelope(job.failure or INTERNAL_FAILURE, job.request_id)
            return b'{"type":"errored","error":%b}' % error
        case ending:
            return b'{"type":"%b"}' % ending.value.encode()
