"""``POST /v1/messages``: plain, streamed, async, detached, waited for, polled."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import trio

from actors.commands import LEFT_FAILURE, DetachJob
from actors.job import COMMIT_TIMEOUT_S, JobActor
from actors.providers.fallbacks import FIELD, own_fallbacks
from actors.submission import Submission, SubmitJob, Watched
from actors.work import put_on_record
from events.log.base import FrameCursor, FrameRun
from events.projections import JobSnapshot
from events.state import JobState
from events.types import Failure, Headers, Mode
from service import schemas, sse
from service.auth import PermissionDeniedError, Principal
from service.dependencies import Dependencies
from service.errors import InvalidRequestError
from service.http import Reply, Request
from service.preferences import ASYNC_ID, Preferences, applied, preferences_of, wait_s
from service.recorded import RecordedStream
from service.replies import error_reply, failed_job_reply, job_headers, pending_reply

FORWARDED_PREFIX = "anthropic-"
MAX_FORWARDED_BYTES = 16_384
"""Of all ``anthropic-*`` headers of a request together."""
MAX_FALLBACKS = 8
"""Models a request may name beside its own."""


async def post_messages(deps: Dependencies, request: Request) -> Reply:
    """Make a Message, in whichever way the headers ask for; or poll a job."""
    job_id = request.headers.single(ASYNC_ID)
    if job_id is not None:
        return await poll_job(deps, request, job_id)
    preferences = preferences_of(request.headers, deps.settings.jobs)
    body = await request.read_body()
    fields = parse_json_body(request, body)
    schemas.check(schemas.MessagesBody, fields)
    check_model(request.principal, fields["model"])
    if fields.get("stream"):
        if preferences.asynchronous:
            raise InvalidRequestError(
                "stream: an async job answers at once; watch GET /v1/jobs/{id}/stream instead"
            )
        return await _stream(deps, request, preferences, body, fields)
    return await _plain(deps, request, preferences, body, fields)


def check_model(principal: Principal, model: str) -> None:
    """Raises PermissionDeniedError for a model the key may not use."""
    if not principal.may_use(model):
        raise PermissionDeniedError(f"the key {principal.name!r} may not use the model {model}")


def fallbacks_of(principal: Principal, fields: Mapping[str, Any]) -> tuple[str, ...]:
    """The models that a request names to be tried after its own; objects and ``default`` are the upstream's.

    Raises InvalidRequestError, and PermissionDeniedError for a model the key may not use.
    """
    named = own_fallbacks(fields)
    if len(named) > MAX_FALLBACKS:
        raise InvalidRequestError(f"fallbacks: more than {MAX_FALLBACKS} models")
    for model in named:
        if not 0 < len(model) <= schemas.MAX_MODEL_CHARS:
            raise InvalidRequestError(f"fallbacks: a model has 1 to {schemas.MAX_MODEL_CHARS} characters")
        check_model(principal, model)
    return named


def parse_json_body(request: Request, body: bytes) -> dict[str, Any]:
    """The request's JSON object. Raises InvalidRequestError for another type, encoding or shape."""
    check_json(request)
    return schemas.parse_object(body)


def check_json(request: Request) -> None:
    """Raise InvalidRequestError for a body that does not say it is JSON in UTF-8, as it is."""
    content_type = (request.headers.single("content-type") or "application/json").lower()
    media_type, _, parameters = content_type.partition(";")
    if media_type.strip() != "application/json" and not media_type.strip().endswith("+json"):
        raise InvalidRequestError(f"content-type: expected application/json, not {media_type.strip()[:100]}")
    charset = parameters.partition("charset=")[2].partition(";")[0].strip().strip('"')
    if charset not in ("", "utf-8", "utf8"):
        raise InvalidRequestError("content-type: JSON is UTF-8 (RFC 8259)")
    if (request.headers.single("content-encoding") or "identity").lower() != "identity":
        raise InvalidRequestError("content-encoding: request bodies are taken uncompressed only")


def forwarded_headers(request: Request) -> Headers:
    """The ``anthropic-*`` headers of a request, to be passed on. Raises InvalidRequestError."""
    found = tuple(
        (name, value) for name, value in request.headers.items() if name.startswith(FORWARDED_PREFIX)
    )
    if sum(len(name) + len(value) for name, value in found) > MAX_FORWARDED_BYTES:
        raise InvalidRequestError(f"anthropic-* headers: more than {MAX_FORWARDED_BYTES} bytes")
    return found


async def _submit(
    deps: Dependencies,
    request: Request,
    preferences: Preferences,
    body: bytes,
    fields: Mapping[str, Any],
    *,
    mode: Mode,
) -> Submission:
    """Submit the job, or find the one with its idempotency key. Its watch is left with the request."""
    if preferences.webhook is not None:
        deps.webhooks.check(preferences.webhook)
    submission = await deps.supervisor.submit_once(
        SubmitJob(
            owner=request.principal.name,
            body=body,
            fields=fields,
            model=fields["model"],
            fallbacks=fallbacks_of(request.principal, fields) if FIELD in fields else (),
            mode=mode,
            detached=preferences.detached or mode is Mode.ASYNC,
            may_detach=mode is Mode.PLAIN and preferences.wait_s is not None and not preferences.detached,
            result_ttl_s=preferences.result_ttl_s,
            headers=forwarded_headers(request),
            request_id=request.request_id,
            may_rerun=preferences.may_rerun,
            idempotency_key=preferences.idempotency_key,
            webhook=preferences.webhook,
        )
    )
    if submission.watch is not None:
        request.closing.callback(submission.watch.leave)
    return submission


async def _plain(
    deps: Dependencies, request: Request, preferences: Preferences, body: bytes, fields: dict[str, Any]
) -> Reply:
    mode = Mode.ASYNC if preferences.asynchronous else Mode.PLAIN
    snapshot, actor, _, state = await _submit(deps, request, preferences, body, fields, mode=mode)
    if actor is None:
        # Its idempotency key led to a job that has ended: the same key will not bring another end.
        return _result(deps, request, snapshot, snapshot.message, polled=True)
    if preferences.asynchronous:
        return pending_reply(snapshot, state)
    if preferences.wait_s is None:
        await actor.ended.wait()
        return _result(deps, request, actor.snapshot, actor.answer)
    with trio.move_on_after(preferences.wait_s):
        await actor.ended.wait()
    if not actor.ended.is_set() and not actor.snapshot.detached:
        detach = DetachJob(preferences.result_ttl_s)
        if actor.tell(detach):
            await detach.done.wait()
        if not actor.snapshot.detached:
            # It is about to end, so there would be nothing to come back for.
            await actor.ended.wait()
    reply = (
        _result(deps, request, actor.snapshot, actor.answer)
        if actor.ended.is_set()
        else pending_reply(actor.snapshot, actor.snapshot.state)
    )
    reply.headers.append(applied(preferences.wait_s))
    return reply


async def _stream(
    deps: Dependencies, request: Request, preferences: Preferences, body: bytes, fields: dict[str, Any]
) -> Reply:
    snapshot, actor, *_ = await _submit(deps, request, preferences, body, fields, mode=Mode.STREAM)
    if actor is not None:
        subscription = actor.subscribe()
    else:
        subscription = (await deps.supervisor.subscribe(snapshot.job_id, request.owner, None)).subscription
    encode = sse.with_ids if preferences.detached else sse.without_ids
    return await stream_reply(deps, request, Watched(subscription, actor, snapshot), encode=encode)


async def stream_reply(
    deps: Dependencies,
    request: Request,
    watched: Watched,
    *,
    encode: Callable[[Sequence[FrameRun]], bytes],
    rewatched: bool = False,
    resumed: bool = False,
) -> Reply:
    """The stream of a job. Until its first frame is here a failure is answered with its own status.

    ``rewatched``: somebody else made the job, so a failure of it is final. ``resumed``: the reader has seen
    frames, so that what follows them may be nothing but the end.
    """
    subscription, actor, snapshot, _ = watched
    request.closing.callback(subscription.close)
    runs: sse.Runs = subscription
    if rewatched and actor is not None and not snapshot.detached:
        runs = RecordedStream(subscription, actor, deps.log)
    first = [] if resumed else await _first_runs(deps, runs, actor)

    def now() -> JobSnapshot:
        return snapshot if actor is None else actor.snapshot

    def ending() -> Failure | None:
        if not now().ended:
            return LEFT_FAILURE
        return None if now().state is JobState.COMPLETED else now().failure

    if actor is not None and not resumed and not first:
        await actor.ended.wait()
    if not resumed and not first and not now().ended:
        reply = error_reply(LEFT_FAILURE, request.request_id)
        reply.headers.extend(job_headers(now()))
        return reply
    if not resumed and not first and now().failure is not None:
        reply = failed_job_reply(now(), request.request_id)
        return _without_retry(reply) if rewatched else reply
    last = FrameCursor(snapshot.attempt, snapshot.frames)
    if resumed and actor is None and snapshot.state is JobState.COMPLETED and subscription.cursor == last:
        # Nothing is left to read. To an EventSource 204 says: do not reconnect (WHATWG HTML, 9.2.3).
        return Reply(204, b"", job_headers(snapshot))

    beat = deps.heartbeat.watch(subscription.nudge)
    request.closing.callback(beat.stop)
    stream = sse.FrameStream(
        runs,
        first=first,
        encode=encode,
        ending=ending,
        beat=beat,
        request_id=request.request_id,
    )
    return Reply(200, stream, job_headers(now()), sse.CONTENT_TYPE, attach=stream.attach)


async def _first_runs(deps: Dependencies, runs: sse.Runs, actor: JobActor | None) -> Sequence[FrameRun]:
    """The first runs of a stream. What precedes content is held back no longer than a silence may last."""
    while actor is not None:
        with trio.move_on_after(deps.settings.jobs.heartbeat_s):
            return await runs.receive()
        await actor.reveal()
    return await runs.receive()


async def poll_job(deps: Dependencies, request: Request, job_id: str) -> Reply:
    """The state of a job; with ``Prefer: wait=S``, once it has ended or S seconds have passed."""
    seconds = wait_s(request.headers, deps.settings.jobs)
    snapshot = await deps.supervisor.result(job_id, request.owner)
    answer = snapshot.message
    actor = deps.supervisor.actor(job_id, request.owner)
    waits = actor is None and not snapshot.ended and snapshot.batch_id is not None
    if seconds is not None and (actor is not None or waits):
        with trio.move_on_after(seconds):
            if actor is None:
                actor = await _begun(deps, request, snapshot)
            if actor is not None:
                request.closing.callback(actor.watch().leave)
                await actor.ended.wait()
        snapshot = actor.snapshot if actor else await deps.supervisor.result(job_id, request.owner)
        answer = actor.answer if actor else snapshot.message
    if not snapshot.detached:
        # All that happens to others is on disk before anybody can ask.
        await put_on_record(deps.log, job_id, within_s=COMMIT_TIMEOUT_S)
    reply = _result(deps, request, snapshot, answer, polled=True)
    if seconds is not None:
        reply.headers.append(applied(seconds))
    return reply


async def _begun(deps: Dependencies, request: Request, item: JobSnapshot) -> JobActor | None:
    """The actor of an item that waits in its batch, once it has one; None when it ends without."""
    with deps.log.follow(item.job_id, item.last_seq) as follower:
        await follower.receive()
    return deps.supervisor.actor(item.job_id, request.owner)


def _result(
    deps: Dependencies, request: Request, snapshot: JobSnapshot, answer: bytes, *, polled: bool = False
) -> Reply:
    reply = result_reply(snapshot, request, answer=answer, polled=polled)
    reply.on_sent = partial(deps.supervisor.was_read, snapshot)
    return reply


def result_reply(snapshot: JobSnapshot, request: Request, *, answer: bytes, polled: bool = False) -> Reply:
    """What a job answers as it stands: pending body, Message, or error.

    A poll's error tells the SDKs not to retry: asking again would not change it.
    """
    match snapshot.state:
        case JobState.PENDING | JobState.PROCESSING:
            return pending_reply(snapshot, snapshot.state)
        case JobState.COMPLETED:
            return Reply(200, answer, job_headers(snapshot))
        case _:
            reply = failed_job_reply(snapshot, request.request_id)
            final = polled or snapshot.state is JobState.CANCELLED
            return _without_retry(reply) if final else reply


def _without_retry(reply: Reply) -> Reply:
    """Tell the SDKs that asking again would not change the answer."""
    reply.headers = [header for header in reply.headers if header[0] != "x-should-retry"]
    reply.headers.append(("x-should-retry", "false"))
    return reply
