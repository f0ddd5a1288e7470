"""``GET /v1/models`` and ``/v1/models/{id}``: the models the configuration names."""

from collections.abc import Iterator
from typing import Any

from actors.providers.options import ProviderOptions
from events.codec import rfc3339
from service.dependencies import Dependencies
from service.errors import InvalidRequestError, NotFoundError
from service.http import Reply, Request
from service.replies import json_reply
from service.routes.pagination import page_query
from service.settings import Settings

_GLOB_CHARS = frozenset("*?[")
_OWN_MODELS = {"echo": ("echo",), "local": ("smollm2-135m-instruct",)}
"""What providers with a model of their own are listed with when the configuration names none."""


async def list_models(deps: Dependencies, request: Request) -> Reply:
    """The models this caller may use, in the order of the configuration."""
    query = page_query(request)
    ids = [model for model in listed_models(deps.settings) if request.principal.may_use(model)]
    start, end = 0, len(ids)
    try:
        if query.after_id is not None:
            start = ids.index(query.after_id) + 1
        if query.before_id is not None:
            end = ids.index(query.before_id)
            start = max(0, end - query.limit)
    except ValueError:
        raise InvalidRequestError("after_id, before_id: no such model") from None
    page = ids[start : min(end, start + query.limit)]
    has_more = start > 0 if query.before_id is not None else start + len(page) < end
    return json_reply(
        {
            "data": [_model_object(deps, model) for model in page],
            "has_more": has_more,
            "first_id": page[0] if page else None,
            "last_id": page[-1] if page else None,
        }
    )


async def get_model(deps: Dependencies, request: Request, model_id: str) -> Reply:
    """One model of the list."""
    if model_id not in listed_models(deps.settings) or not request.principal.may_use(model_id):
        raise NotFoundError(f"model: {model_id[:100]}")
    return json_reply(_model_object(deps, model_id))


def listed_models(settings: Settings) -> list[str]:
    """Every model the configuration names, once, spelt as a client would ask for it."""
    return list(dict.fromkeys(_named(settings)))


def _named(settings: Settings) -> Iterator[str]:
    for route in settings.routes:
        if not _GLOB_CHARS & set(route.model):
            yield route.model
    for provider in settings.providers:
        for model in _models_of(provider):
            yield f"{provider.name}/{model}"


def _models_of(options: ProviderOptions) -> tuple[str, ...]:
    return options.models or _OWN_MODELS.get(options.kind, ())


def _model_object(deps: Dependencies, model: str) -> dict[str, Any]:
    return {
        "type": "model",
        "id": model,
        "display_name": model,
        "created_at": rfc3339(deps.started_at),
    }
