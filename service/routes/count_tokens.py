"""``POST /v1/messages/count_tokens``, and the wildcard below ``/v1/messages/``. Neither makes a job."""

from actors.errors import NoSuchModelError
from actors.providers.base import ForwardCall, ProviderCall
from actors.providers.fallbacks import drop_fallbacks, own_fallbacks
from actors.providers.splice import set_model
from service import schemas
from service.dependencies import Dependencies
from service.errors import NotFoundError
from service.http import Reply, Request
from service.replies import json_reply
from service.routes.messages import check_model, forwarded_headers, parse_json_body

JSON = "application/json"


async def count_tokens(deps: Dependencies, request: Request) -> Reply:
    """Count the input tokens of a request, by the provider that would answer it."""
    body = await request.read_body()
    fields = parse_json_body(request, body)
    schemas.check(schemas.CountTokensBody, fields)
    check_model(request.principal, fields["model"])
    target = deps.router.resolve(fields["model"])
    count = await target.provider.count_tokens(
        ProviderCall(body, fields, target.model, forwarded_headers(request))
    )
    reply = json_reply({"input_tokens": count.input_tokens})
    if count.estimated:
        reply.headers.append(("x-bf-token-count", "estimated"))
    return reply


async def forward(deps: Dependencies, request: Request, rest: str) -> Reply:
    """Pass a request on to the provider of its model, if that speaks the Anthropic protocol; else 404."""
    body = await request.read_body()
    fields = parse_json_body(request, body)
    model = fields.get("model")
    if not isinstance(model, str):
        raise NotFoundError("no such path; a path passed on to a provider needs a model in its body")
    check_model(request.principal, model)
    try:
        target = deps.router.resolve(model)
    except NoSuchModelError:
        raise NotFoundError("no such path for this model") from None
    body = drop_fallbacks(body) if own_fallbacks(fields) else body
    headers = (*forwarded_headers(request), ("content-type", request.headers.get("content-type") or JSON))
    answer = await target.provider.forward(
        ForwardCall(request.method, request.path, set_model(body, target.model), headers)
    )
    content_type = next((value for name, value in answer.headers if name == "content-type"), JSON)
    # Our own request-id is on every answer; the upstream's would stand beside it.
    shown = [(n, v) for n, v in answer.headers if n not in ("content-type", "request-id", "content-length")]
    return Reply(answer.status, answer.body, shown, content_type)
