"""``/openapi.json`` and ``/docs``: what :mod:`service.openapi_table` says, as OpenAPI 3.1, by quart-schema.

quart-schema's extension is never installed in the application: it would look through every response for
models to convert (10 us each, measured), and there are none. Its decorators and its builder are used, once.
"""

import base64
import hashlib
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from inspect import getdoc
from typing import Any

import orjson
from pydantic import BaseModel
from quart import Quart
from quart_schema import (
    APIKeySecurityScheme,
    DataSource,
    HttpSecurityScheme,
    Info,
    OpenAPIProvider,
    QuartSchema,
    Server,
    Tag,
    document_headers,
    document_querystring,
    document_request,
    document_response,
    operation_id,
    security_scheme,
    tag,
)
from werkzeug.routing import Rule

from service.auth import Authenticator
from service.cli import version
from service.dependencies import Dependencies
from service.http import Reply, Request
from service.openapi_models import RESPONSE_HEADERS, ErrorEnvelope
from service.openapi_operation import JOB_HEADERS, Answer, Operation
from service.openapi_page import PAGE, SCRIPT, SWAGGER_UI, with_code
from service.openapi_table import ERROR_TEXTS, OPERATIONS
from service.sse import CONTENT_TYPE as EVENT_STREAM

_JSON = "application/json"
_UPSTREAM_ERROR = "UpstreamError"

_INFO = Info(
    title="messagesd",
    version=version(),
    summary="The Anthropic Messages API over any model provider, every request a job.",
    description="Every path is served under `/anthropic` too. Every answer carries `request-id`; every error "
    "has the same shape. Further fields may come in any object: skip those you do not know.",
)
_TAGS: list[Tag | dict[str, Any]] = [
    Tag(name="messages", description="Messages, made plain, streamed or as async jobs."),
    Tag(name="batches", description="Many Messages at once, made in the background."),
    Tag(name="jobs", description="Every request is a job: look at it, watch it, cancel it."),
    Tag(name="webhooks", description="What endpoints were told about jobs. For admin keys."),
    Tag(name="models", description="What can be asked for."),
    Tag(name="gateway", description="The daemon itself."),
]
_SERVERS: list[Server | dict[str, Any]] = [
    Server(url="/", description="Also for `base_url` without a path."),
    Server(url="/anthropic", description="The same."),
]
_CREDENTIALS = {
    "virtualKey": APIKeySecurityScheme(name="x-bf-vk", in_="header"),
    "bearer": HttpSecurityScheme(scheme="bearer"),
    "basic": HttpSecurityScheme(scheme="basic"),
    "apiKey": APIKeySecurityScheme(name="x-api-key", in_="header"),
    "googApiKey": APIKeySecurityScheme(name="x-goog-api-key", in_="header"),
}
"""Where a key may stand; of several, the first in this order decides."""


class Documentation:
    """The documentation of an application whose routes are all there. Built at its first use, then kept."""

    def __init__(self, app: Quart, authenticator: Authenticator) -> None:
        self._app = app
        self._anonymous_allowed = authenticator.anonymous_allowed
        self._page: bytes | None = None

    async def openapi(self, deps: Dependencies, request: Request) -> Reply:
        """The OpenAPI document."""
        return Reply(200, self._document_bytes)

    async def docs(self, deps: Dependencies, request: Request) -> Reply:
        """The documentation as a web page."""
        if self._page is None:
            template = self._app.jinja_env.from_string(PAGE)
            text = await template.render_async(
                document=self.document, ui=SWAGGER_UI, script=SCRIPT, with_code=with_code
            )
            self._page = text.encode()
        headers = [
            ("content-security-policy", _content_security_policy()),
            ("x-content-type-options", "nosniff"),
            ("referrer-policy", "no-referrer"),
        ]
        return Reply(200, self._page, headers, "text/html; charset=utf-8")

    @cached_property
    def document(self) -> dict[str, Any]:
        """The document. Every route of the application is in it that :data:`OPERATIONS` knows."""
        extension = QuartSchema(
            info=_INFO,
            tags=_TAGS,
            servers=_SERVERS,
            security_schemes={**_CREDENTIALS},
            security=self._security,
        )
        # All that the builder reads of the extension's settings.
        self._app.config.setdefault("QUART_SCHEMA_CONVERSION_PREFERENCE", "pydantic")
        self._app.config.setdefault("QUART_SCHEMA_CONVERT_CASING", False)
        for rule in self._app.url_map.iter_rules():
            for _, operation in _operations_of(rule):
                self._annotate(self._app.view_functions[rule.endpoint], operation)
        return _Builder(self._app, extension).schema()

    @cached_property
    def _document_bytes(self) -> bytes:
        return orjson.dumps(self.document)

    @property
    def _security(self) -> list[dict[str, list[str]]]:
        """One of the credentials; none at all, too, where callers without a key are served."""
        credentials: list[dict[str, list[str]]] = [{name: []} for name in _CREDENTIALS]
        return [{}, *credentials] if self._anonymous_allowed else credentials

    def _annotate(self, view: Callable[..., Any], operation: Operation) -> None:
        """Hang the documentation on a view, as quart-schema's decorators do."""
        tag([operation.tag])(view)
        operation_id(operation.id)(view)
        if operation.access == "open":
            security_scheme([])(view)
        if operation.query is not None:
            document_querystring(operation.query)(view)
        if operation.headers is not None:
            document_headers(operation.headers)(view)
        if operation.body is not None:
            document_request(operation.body)(view)
        for status, answer in operation.answers.items():
            if answer.model is not None:
                document_response(answer.model, status)(view)


def _operations_of(rule: Rule) -> Iterable[tuple[str, Operation]]:
    """The documented methods of a rule."""
    for method in sorted(rule.methods or ()):
        operation = OPERATIONS.get((method, rule.rule))
        if operation is not None:
            yield method, operation


class _Builder(OpenAPIProvider):
    """quart-schema's builder, and what it has no words for.

    Those are: several media types for one status, errors, links, headers of answers (it puts them where
    OpenAPI does not look), optional parameters that are absent rather than null, and HEAD.
    """

    def schema(self) -> dict[str, Any]:
        schema = super().schema()
        models: list[type[BaseModel]] = [ErrorEnvelope, *_events()]
        for model in models:
            definitions, itself = _named(model)
            schema["components"]["schemas"] |= {**definitions, model.__name__: itself}
        schema["components"]["responses"] = dict(_error_responses())
        schema["components"]["headers"] = {
            name: {"description": text, "schema": header} for name, (text, header) in RESPONSE_HEADERS.items()
        }
        schema["info"]["license"] = {"name": "Apache License 2.0", "identifier": "Apache-2.0"}
        return schema

    def generate_rules(self) -> Iterable[Rule]:
        return (rule for rule in super().generate_rules() if any(_operations_of(rule)))

    def generate_methods(self, rule: Rule) -> Iterable[str]:
        return [method for method, _ in _operations_of(rule)]

    def operation_id(self, method: str, path: str, func: Callable[..., Any]) -> str | None:
        # One view may serve several methods; build_paths knows which is which.
        return None

    def build_paths(self, rule: Rule) -> tuple[dict[str, Any], dict[str, Any]]:
        paths, components = super().build_paths(rule)
        for methods in paths.values():
            for method, operation in _operations_of(rule):
                methods[method.lower()] = _completed(methods[method.lower()], operation, method)
        return paths, components

    def build_querystring_parameters(self, model: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        parameters, definitions = super().build_querystring_parameters(model)
        return [_absent_not_null(parameter) for parameter in parameters], definitions

    def build_headers_parameters(self, model: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        parameters, definitions = super().build_headers_parameters(model)
        return [_absent_not_null(parameter) for parameter in parameters], definitions

    def build_request_body(self, model: Any, source: DataSource) -> tuple[dict[str, Any], dict[str, Any]]:
        body, definitions = super().build_request_body(model, source)
        return body, _by_name(body["content"][_JSON], model, definitions)

    def build_response_object(self, model: Any, headers_model: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        response, definitions = super().build_response_object(model, headers_model)
        return response, _by_name(response["content"][_JSON], model, definitions)


def _by_name(content: dict[str, Any], model: type, definitions: dict[str, Any]) -> dict[str, Any]:
    """Move the content's schema to the components, under the model's name, and leave a reference."""
    schema, content["schema"] = content["schema"], _reference(model)
    return {**definitions, model.__name__: {"description": getdoc(model), **schema}}


def _events() -> Iterable[type[BaseModel]]:
    """What streams are made of."""
    answers = (answer for operation in OPERATIONS.values() for answer in operation.answers.values())
    return (answer.event for answer in answers if answer.event is not None)


def _named(model: type[BaseModel]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A model's definitions and its schema."""
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    return schema.pop("$defs", {}), schema


def _absent_not_null(parameter: dict[str, Any]) -> dict[str, Any]:
    """A parameter that need not be there: pydantic says "or null", which no query or header can say."""
    schema = dict(parameter["schema"])
    if "anyOf" in schema:
        (meant,) = (choice for choice in schema.pop("anyOf") if choice != {"type": "null"})
        schema = {**schema, **meant}
    if schema.get("default", ...) is None:
        del schema["default"]
    schema.pop("title", None)
    return {**parameter, "schema": schema}


def _completed(built: Mapping[str, Any], operation: Operation, method: str) -> dict[str, Any]:
    """An operation object with all that its table entry says."""
    answers = {
        str(status): _answer(built["responses"].get(status, {}), answer, with_body=method != "HEAD")
        for status, answer in operation.answers.items()
    }
    completed = {
        **built,
        "operationId": operation.id,
        "summary": operation.summary,
        "parameters": [_with_path_text(parameter, operation) for parameter in built["parameters"]],
        "responses": answers | _errors(operation),
    }
    completed.pop("description", None)
    if operation.description:
        completed["description"] = operation.description
    if "requestBody" in built:
        content = {_JSON: dict(built["requestBody"]["content"][_JSON])}
        if operation.examples:
            content[_JSON]["examples"] = {
                name: {"value": dict(example)} for name, example in operation.examples.items()
            }
        completed["requestBody"] = {"required": operation.body_required, "content": content}
    return completed


def _with_path_text(parameter: dict[str, Any], operation: Operation) -> dict[str, Any]:
    text = operation.path.get(parameter["name"]) if parameter["in"] == "path" else None
    return parameter if text is None else {**parameter, "description": text}


def _answer(built: Mapping[str, Any], answer: Answer, *, with_body: bool) -> dict[str, Any]:
    """A response object that is no error."""
    names = ("request-id", *answer.headers)
    response: dict[str, Any] = {
        "description": answer.description,
        "headers": {name: {"$ref": f"#/components/headers/{name}"} for name in names},
    }
    if with_body:
        response["content"] = dict(built.get("content", {}))
        if answer.event is not None:
            response["content"][_media_type(EVENT_STREAM)] = {"schema": _reference(answer.event)}
        if answer.text is not None:
            response["content"][_media_type(answer.text)] = {"schema": {"type": "string"}}
    if answer.links:
        response["links"] = {
            name: {"operationId": name, "parameters": dict(parameters)}
            for name, parameters in answer.links.items()
        }
    return response


def _reference(model: type) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{model.__name__}"}


def _media_type(content_type: str) -> str:
    return content_type.partition(";")[0]


def _errors(operation: Operation) -> dict[str, Any]:
    names = {str(status): f"Error{status}" for status in operation.all_errors}
    if operation.upstream:
        names |= {"4XX": _UPSTREAM_ERROR, "5XX": _UPSTREAM_ERROR}
    return {status: {"$ref": f"#/components/responses/{name}"} for status, name in names.items()}


def _error_responses() -> Iterable[tuple[str, dict[str, Any]]]:
    def response(text: str, *headers: str) -> dict[str, Any]:
        return {
            "description": text,
            "headers": {name: {"$ref": f"#/components/headers/{name}"} for name in ("request-id", *headers)},
            "content": {_JSON: {"schema": _reference(ErrorEnvelope)}},
        }

    for status, text in ERROR_TEXTS.items():
        match status:
            case 401:
                yield f"Error{status}", response(text, "www-authenticate")
            case 409:
                yield f"Error{status}", response(text, *JOB_HEADERS, "x-should-retry")
            case 429 | 503 | 529:
                yield f"Error{status}", response(text, "retry-after")
            case _:
                yield f"Error{status}", response(text)
    text = "An upstream's error, with its own status, type and text."
    yield _UPSTREAM_ERROR, response(text, *JOB_HEADERS, "retry-after", "x-should-retry")


def _content_security_policy() -> str:
    """Nothing but the page's own script, the pinned one, and calls to this gateway."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{digest}' {SWAGGER_UI.script_url}; "
        f"style-src 'unsafe-inline' {SWAGGER_UI.style_url}; "
        "img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
