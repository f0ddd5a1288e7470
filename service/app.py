"""The application: routes, and what every answer has in common. One definition a route.

:func:`create_app` is the only way to one; there is no module-level app. Around Quart sits
:class:`GatewayConnection`, which gives each request its id, takes the ``/anthropic`` prefix off, and closes
what the request opened, whichever way it ended. Quart-Trio cancels a request when its client leaves:
nothing of a job ever runs in here.
"""

import secrets
from collections.abc import Awaitable, Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import Any, Concatenate, ParamSpec, cast

import h11
import quart
import trio
from hypercorn.typing import ASGIReceiveCallable, ASGISendCallable, ASGISendEvent, HTTPScope
from quart.wrappers import Response
from quart_trio import QuartTrio
from quart_trio.asgi import TrioASGIHTTPConnection
from werkzeug.exceptions import HTTPException
from werkzeug.routing import PathConverter

from service.auth import AuthenticationError, PermissionDeniedError, Principal
from service.dependencies import Dependencies
from service.direct import DirectCall, DirectRoute, Respond
from service.errors import failure_of
from service.http import Reply, Request, RequestHeaders
from service.openapi import Documentation
from service.preferences import ASYNC_ID, refuse_job_headers
from service.replies import error_reply
from service.routes import batches, count_tokens, health, jobs, messages, models, webhooks
from service.streamed import StreamedBody
from service.upload import Upload

PREFIX = "/anthropic"
EXCHANGE = "messagesd.exchange"

P = ParamSpec("P")
Handler = Callable[Concatenate[Dependencies, Request, P], Awaitable[Reply]]

_ASYNC_ID = ASYNC_ID.encode()
_PREFIX_SLASH = PREFIX.encode() + b"/"
_ANYONE = Principal(name="", anonymous=True)


@dataclass(slots=True)
class Exchange:
    """One request and its answer, from the first byte to the last."""

    request_id: str
    prefix: str
    closing: ExitStack = field(default_factory=ExitStack)
    route: str | None = None
    status: int = 0
    sent: bool = False
    """The last byte of the answer was handed to the socket."""
    on_sent: Callable[[], None] | None = None
    upload: Upload | None = None


def new_request_id() -> str:
    """What a request is called in its answer, its log lines and its events."""
    return f"req_{secrets.token_hex(12)}"


@dataclass(frozen=True, slots=True)
class Route:
    """What every way of serving a route has to know of it."""

    rule: str
    handler: Handler[...]
    access: str = "key"
    """``key``, ``admin``, ``keyed`` (a key as soon as keys are configured), or ``open``."""
    makes_jobs: bool = False


class GatewayConnection(TrioASGIHTTPConnection):
    """One HTTP request, around Quart's own handling of it."""

    app: "GatewayApp"

    def __init__(self, app: "GatewayApp", scope: HTTPScope) -> None:
        path = scope["path"]
        prefix = PREFIX if path == PREFIX or path.startswith(PREFIX + "/") else ""
        self._exchange = Exchange(new_request_id(), prefix)
        ours = cast(HTTPScope, {**scope, "path": path[len(prefix) :] or "/", EXCHANGE: self._exchange})
        super().__init__(app, ours)

    async def __call__(self, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        """Serve the request. What it opened is closed when this returns, also when the client left."""
        exchange = self._exchange
        started = perf_counter()
        if (self.scope["method"], self.scope["path"]) in self.app.upload_routes:
            batches_of = self.app.dependencies.settings.batches
            exchange.upload = Upload(
                receive, max_bytes=batches_of.max_body_bytes, timeout_s=batches_of.upload_timeout_s
            )

        async def send_with_id(message: ASGISendEvent) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                message["headers"] = [*message["headers"], (b"request-id", exchange.request_id.encode())]
            await send(message)
            exchange.sent = message["type"] == "http.response.body" and not message.get("more_body", False)

        try:
            with exchange.closing:
                await super().__call__(receive, send_with_id)
                if exchange.on_sent is not None and exchange.sent:
                    exchange.on_sent()
        finally:
            self.app.answered(self.scope["method"], self.scope["path"], exchange, perf_counter() - started)

    async def handle_messages(  # type: ignore[override] # as in quart-trio, whose it is
        self, nursery: trio.Nursery, request: quart.Request, receive: ASGIReceiveCallable
    ) -> None:
        """Feed the request's body, unless its handler reads it; then watch for the client's leaving."""
        upload = self._exchange.upload
        if upload is not None:
            await upload.over.wait()
            if upload.client_left:
                nursery.cancel_scope.cancel()
                return
        await super().handle_messages(nursery, request, receive)


class GatewayApp(QuartTrio):
    """Quart-Trio with our exchange around each request, and a shorter way to its hottest routes."""

    # quart-trio's annotation names its own class where Quart asks for any of its kind.
    asgi_http_class = GatewayConnection  # type: ignore[assignment]

    def __init__(self, dependencies: Dependencies) -> None:
        super().__init__("service", static_folder=None)
        self.dependencies = dependencies
        self.direct_routes: dict[tuple[bytes, bytes], Route] = {}
        self.upload_routes: set[tuple[str, str]] = set()

    def direct(self, request: h11.Request) -> DirectRoute | None:
        """The routes that are answered without Quart: see :mod:`service.direct`."""
        path, _, query = request.target.partition(b"?")
        prefix = ""
        if path.startswith(_PREFIX_SLASH):
            prefix, path = PREFIX, path[len(PREFIX) :]
        route = self.direct_routes.get((request.method, path))
        if route is None:
            return None
        server = self.dependencies.settings.server
        return DirectRoute(
            path=route.rule,
            prefix=prefix,
            query=query,
            max_body_bytes=server.max_body_bytes,
            body_timeout_s=server.body_timeout_s,
            reads_body=all(name != _ASYNC_ID for name, _ in request.headers),
            serve=partial(self._serve_direct, route),
        )

    async def _serve_direct(self, route: Route, call: DirectCall, respond: Respond) -> None:
        exchange = Exchange(new_request_id(), call.prefix)
        started = perf_counter()

        async def read_body() -> bytes:
            return call.body

        try:
            with exchange.closing:
                reply = await _answer(
                    self.dependencies,
                    route,
                    exchange,
                    method=call.method,
                    path=call.path,
                    scheme="http",
                    headers=RequestHeaders(call.headers),
                    query=call.query,
                    read_body=read_body,
                    path_parts={},
                )
                exchange.status = reply.status
                await respond(reply, exchange.request_id)
                if reply.on_sent is not None:
                    reply.on_sent()
        finally:
            self.answered(call.method, call.path, exchange, perf_counter() - started)

    def answered(self, method: str, path: str, exchange: Exchange, duration_s: float) -> None:
        """Count and log a request. Status 0: the client left before the answer began."""
        self.dependencies.metrics.http_request(method, exchange.route, exchange.status)
        self.dependencies.logger.debug(
            "request answered",
            action="http.answered",
            method=method,
            path=path,
            status=exchange.status,
            request_id=exchange.request_id,
            duration_s=round(duration_s, 4),
        )


class ForwardedPath(PathConverter):
    """What is below ``/v1/messages/`` and not ours: any path but those of batches."""

    regex = r"(?!batches(?:/|$))[^/].*?"


def _exchange() -> Exchange:
    return cast(Exchange, cast(Any, quart.request.scope)[EXCHANGE])


def _response(reply: Reply) -> Response:
    app = quart.current_app
    body = reply.body if isinstance(reply.body, bytes) else StreamedBody(reply.body)
    response = app.response_class(body, reply.status, content_type=reply.content_type)
    if not isinstance(reply.body, bytes):
        response.timeout = None
    for name, value in reply.all_headers()[1:]:
        response.headers.add(name, value)
    return response


async def _read_body() -> bytes:
    return cast(bytes, await quart.request.get_data(as_text=False))


def _authenticated(deps: Dependencies, headers: RequestHeaders, access: str) -> Principal:
    if access == "open" or (access == "keyed" and not deps.authenticator.keys_configured):
        return _ANYONE
    principal = deps.authenticator.authenticate(headers)
    if access == "keyed" and principal.anonymous:
        raise AuthenticationError("this path asks for a key, also where anonymous calls are allowed")
    if access == "admin" and deps.authenticator.keys_configured and not principal.admin:
        raise PermissionDeniedError("this path is for admin keys")
    return principal


async def _answer(
    deps: Dependencies,
    route: Route,
    exchange: Exchange,
    *,
    method: str,
    path: str,
    scheme: str,
    headers: RequestHeaders,
    query: Mapping[str, str],
    read_body: Callable[[], Awaitable[bytes]],
    path_parts: Mapping[str, str],
) -> Reply:
    """The reply of a route: credentials, the request as handlers see it, errors as envelopes."""
    exchange.route = route.rule
    try:
        principal = _authenticated(deps, headers, route.access)
        if not route.makes_jobs and route.access in ("key", "admin"):
            refuse_job_headers(headers)
        request = Request(
            method=method,
            path=path,
            headers=headers,
            query=query,
            principal=principal,
            request_id=exchange.request_id,
            origin=_origin(deps, scheme, headers) + exchange.prefix,
            read_body=read_body,
            closing=exchange.closing,
            upload=exchange.upload,
        )
        reply = await route.handler(deps, request, **path_parts)
        exchange.on_sent = reply.on_sent
        return reply
    except Exception as error:  # noqa: BLE001 - the wire has an envelope for every error
        return _error_reply(deps, error, exchange)


def _view(deps: Dependencies, route: Route) -> Callable[..., Awaitable[Response]]:
    """A Quart view of a route."""

    async def view(**path_parts: str) -> Response:
        scope = cast(HTTPScope, quart.request.scope)
        exchange = _exchange()
        reply = await _answer(
            deps,
            route,
            exchange,
            method=scope["method"],
            path=scope["path"],
            scheme=scope["scheme"],
            headers=RequestHeaders(scope["headers"]),
            query=quart.request.args,
            read_body=_read_body,
            path_parts=path_parts,
        )
        if exchange.upload is not None:
            await exchange.upload.discard()
        return _response(reply)

    view.__name__ = route.handler.__name__
    view.__doc__ = route.handler.__doc__
    return view


def _origin(deps: Dependencies, scheme: str, headers: RequestHeaders) -> str:
    public_url = deps.settings.server.public_url
    if public_url is not None:
        return str(public_url).rstrip("/")
    return f"{scheme}://{headers.get('host') or deps.settings.server.host}"


def _error_reply(deps: Dependencies, error: Exception, exchange: Exchange) -> Reply:
    failure = failure_of(error)
    if failure.status == 500:
        deps.logger.error(
            "request failed",
            action="http.failed",
            request_id=exchange.request_id,
            exc_info=error,
        )
    return error_reply(failure, exchange.request_id)


def _add_routes(route: Callable[..., None]) -> None:
    route("/v1/messages", messages.post_messages, "POST", makes_jobs=True, direct=True)
    route("/v1/messages/count_tokens", count_tokens.count_tokens, "POST")
    route("/v1/messages/batches", batches.create_batch, "POST", upload=True)
    route("/v1/messages/batches", batches.list_batches)
    route("/v1/messages/batches/<batch_id>", batches.get_batch)
    route("/v1/messages/batches/<batch_id>", batches.delete_batch, "DELETE")
    route("/v1/messages/batches/<batch_id>/cancel", batches.cancel_batch, "POST")
    route("/v1/messages/batches/<batch_id>/results", batches.batch_results)
    route("/v1/messages/<forwarded:rest>", count_tokens.forward, "POST")
    route("/v1/models", models.list_models)
    route("/v1/models/<path:model_id>", models.get_model)
    route("/v1/jobs", jobs.list_jobs)
    route("/v1/jobs/<job_id>", jobs.get_job)
    route("/v1/jobs/<job_id>", jobs.delete_job, "DELETE")
    route("/v1/jobs/<job_id>/result", jobs.job_result)
    route("/v1/jobs/<job_id>/events", jobs.job_events)
    route("/v1/jobs/<job_id>/stream", jobs.job_stream)
    route("/v1/jobs/<job_id>/cancel", jobs.cancel_job, "POST")
    route("/v1/webhooks/deliveries", webhooks.list_deliveries, access="admin")
    route("/v1/webhooks/deliveries/<delivery_id>/redeliver", webhooks.redeliver, "POST", access="admin")
    route("/", health.root, access="open")
    route("/api/hello", health.root, access="open")
    route("/healthz", health.healthz, access="open")
    route("/readyz", health.readyz, access="keyed")
    route("/metrics", health.metrics, access="keyed")


def create_app(deps: Dependencies) -> GatewayApp:
    """The application over these parts."""
    app = GatewayApp(deps)
    app.config["MAX_CONTENT_LENGTH"] = deps.settings.server.max_body_bytes
    app.config["BODY_TIMEOUT"] = deps.settings.server.body_timeout_s
    # Streams end when their job does; the bound on a stalled reader is the socket's.
    app.config["RESPONSE_TIMEOUT"] = None
    # A second slash is another path, and a redirect would not be an Anthropic error.
    app.url_map.merge_slashes = False
    app.url_map.converters["forwarded"] = ForwardedPath

    def route(
        path: str,
        handler: Handler[...],
        *methods: str,
        access: str = "key",
        makes_jobs: bool = False,
        direct: bool = False,
        upload: bool = False,
    ) -> None:
        route = Route(path, handler, access, makes_jobs)
        app.add_url_rule(
            path,
            endpoint=f"{handler.__name__}:{path}",
            view_func=_view(deps, route),
            methods=list(methods or ("GET",)),
            provide_automatic_options=False,
            strict_slashes=True,
        )
        if upload:
            app.upload_routes.update((method, path) for method in methods)
        if direct:
            app.direct_routes.update({(method.encode(), path.encode()): route for method in methods})

    _add_routes(route)
    documentation = Documentation(app, deps.authenticator)
    route("/openapi.json", documentation.openapi, access="open")
    route("/docs", documentation.docs, access="open")

    async def on_error(error: Exception) -> Response:
        return _response(_error_reply(deps, error, _exchange()))

    app.register_error_handler(HTTPException, on_error)
    app.register_error_handler(Exception, on_error)
    return app
