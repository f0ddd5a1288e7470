"""``/v1/jobs``: list, look at, watch, cancel and delete jobs."""

import orjson
import trio

from actors.errors import JobConflictError
from actors.job import COMMIT_TIMEOUT_S
from actors.work import put_on_record
from events.codec import public
from events.errors import LogUnavailableError, UnknownJobError
from events.log.base import JobFilter
from events.projections import JobSnapshot
from events.state import JobState
from events.types import StoredEvent
from service import sse
from service.dependencies import Dependencies
from service.errors import InvalidRequestError
from service.http import Reply, Request
from service.replies import job_headers, job_object, json_reply
from service.routes.messages import poll_job, stream_reply
from service.routes.pagination import page_query

_STATUSES = {state.value: state for state in JobState if state is not JobState.EXPIRED}
MAX_EVENTS = 1000
"""Events in one answer; ``after`` reads on."""
MAX_SEQ_DIGITS = 12
RECORD_RETRY_S = 1.0
"""Pause of an event feed after the log could not put on disk what the feed is about to tell."""


async def list_jobs(deps: Dependencies, request: Request) -> Reply:
    """The caller's jobs, newest first."""
    query = page_query(request)
    status = request.query.get("status")
    if status is not None and status not in _STATUSES:
        raise InvalidRequestError(f"status: expected one of {', '.join(_STATUSES)}")
    where = JobFilter(
        owner=request.owner,
        states=frozenset({_STATUSES[status]}) if status else None,
        model=request.query.get("model"),
    )
    page = await deps.supervisor.page(
        where, limit=query.limit, after_id=query.after_id, before_id=query.before_id
    )
    return json_reply(
        {
            "data": [job_object(job) for job in page.jobs],
            "has_more": page.has_more,
            "first_id": page.jobs[0].job_id if page.jobs else None,
            "last_id": page.jobs[-1].job_id if page.jobs else None,
        }
    )


def _job_reply(snapshot: JobSnapshot) -> Reply:
    reply = json_reply(job_object(snapshot))
    reply.headers.extend(job_headers(snapshot))
    return reply


async def get_job(deps: Dependencies, request: Request, job_id: str) -> Reply:
    """One job."""
    return _job_reply(await deps.supervisor.describe(job_id, request.owner))


async def job_result(deps: Dependencies, request: Request, job_id: str) -> Reply:
    """What a poll answers, at an address of its own: a webhook names it."""
    return await poll_job(deps, request, job_id)


async def cancel_job(deps: Dependencies, request: Request, job_id: str) -> Reply:
    """Stop a job; one that has ended stays as it is."""
    snapshot = await deps.supervisor.cancel(job_id, request.owner, by=request.principal.name)
    if not snapshot.ended and snapshot.batch_id is not None:
        # It waits in its batch, so it has no actor to be told.
        await deps.batches.cancel_item(snapshot, by=request.principal.name)
        snapshot = await deps.supervisor.describe(job_id, request.owner)
    return _job_reply(snapshot)


async def delete_job(deps: Dependencies, request: Request, job_id: str) -> Reply:
    """Drop an ended job with its result and events."""
    deleted = await deps.supervisor.delete(job_id, request.owner)
    reply = json_reply({"id": job_id, "type": "job_deleted"})
    reply.headers.extend(job_headers(deleted))
    return reply


async def job_events(deps: Dependencies, request: Request, job_id: str) -> Reply:
    """The job's events after ``?after=SEQ``: JSON, or as SSE (``Last-Event-ID`` wins), replayed then live."""
    snapshot = await deps.supervisor.describe(job_id, request.owner)
    live = "text/event-stream" in (request.headers.get("accept") or "")
    # A browser that comes back sends both: the address it was given, and what it has seen since.
    seen = request.headers.get("last-event-id") if live else None
    after = _seq(seen or request.query.get("after"))
    if live:
        return await _event_feed(deps, request, snapshot, after)
    events = await deps.log.read(job_id, after, MAX_EVENTS)
    await put_on_record(deps.log, job_id, within_s=COMMIT_TIMEOUT_S, frames=True)
    more = len(events) == MAX_EVENTS and events[-1].seq < snapshot.last_seq
    reply = json_reply({"data": [public(event) for event in events], "has_more": more})
    reply.headers.extend(job_headers(snapshot))
    return reply


def _seq(text: str | None) -> int:
    if text is None or text == "":
        return 0
    if not (text.isascii() and text.isdigit() and len(text) <= MAX_SEQ_DIGITS):
        raise InvalidRequestError("after: expected the seq of an event")
    return int(text)


async def _event_feed(deps: Dependencies, request: Request, snapshot: JobSnapshot, after: int) -> Reply:
    """Following is watching: an attached job lives while somebody follows its events."""
    actor = deps.supervisor.actor(snapshot.job_id, request.owner)
    if actor is not None:
        request.closing.callback(actor.watch().leave)
    follower = request.closing.enter_context(deps.log.follow(snapshot.job_id, after))
    unsent: list[StoredEvent] = []

    async def receive() -> bytes | None:
        nonlocal unsent
        try:
            # Cancelled after this, as a heartbeat does, it goes on with the same events.
            unsent = unsent or await follower.receive()
        except UnknownJobError:
            return None
        await _recorded(deps, snapshot.job_id)
        events, unsent = unsent, []
        return b"".join(map(_encoded, events)) or None

    feed = sse.EventFeed(receive, heartbeat_s=deps.settings.jobs.heartbeat_s)
    return Reply(200, feed, job_headers(snapshot), sse.CONTENT_TYPE)


async def _recorded(deps: Dependencies, job_id: str) -> None:
    """Wait until what was read of a job will be so after a kill, however long the disk takes."""
    while True:
        try:
            await deps.log.settle(job_id, frames=True)
        except LogUnavailableError:
            await trio.sleep(RECORD_RETRY_S)
        else:
            return


def _encoded(event: StoredEvent) -> bytes:
    shown = public(event)
    return b"id: %d\nevent: %b\ndata: %b\n\n" % (event.seq, shown["type"].encode(), orjson.dumps(shown))


async def job_stream(deps: Dependencies, request: Request, job_id: str) -> Reply:
    """The Anthropic stream of a job: replay, then live; ``Last-Event-ID`` or ``?starting_after=`` resumes."""
    # In this order, see above: the header is the newer of the two.
    text = request.headers.get("last-event-id") or request.query.get("starting_after")
    after = sse.parse_cursor(text) if text else None
    watched = await deps.supervisor.subscribe(job_id, request.owner, after)
    if watched.actor is None and not watched.snapshot.ended and watched.snapshot.batch_id is not None:
        watched.subscription.close()
        raise JobConflictError("the job waits in its batch; there is no stream to watch yet")
    if watched.watch is not None:
        request.closing.callback(watched.watch.leave)
    return await stream_reply(
        deps, request, watched, encode=sse.with_ids, rewatched=True, resumed=after is not None
    )
