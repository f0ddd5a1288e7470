"""The documentation against what it documents: routes, errors, credentials, names. And as OpenAPI 3.1."""

import base64
import hashlib
import re
from collections.abc import Iterator
from typing import Any, get_args

import orjson
import pytest
from schemathesis.specs.openapi.definitions import OPENAPI_31_VALIDATOR

from actors.errors import error_type_of
from events import deliveries
from events.deliveries import DeliveryAccepted, WebhookEvent
from events.projections import apply
from events.state import JobState
from events.types import Event, JobAccepted, Mode
from service import openapi_models as models
from service.app import GatewayApp, create_app
from service.main import Gateway
from service.openapi import Documentation
from service.openapi_page import SCRIPT, with_code
from service.openapi_table import ERROR_TEXTS, OPERATIONS
from service.preferences import ASYNC, ASYNC_ID, DETACH, RESULT_TTL, WEBHOOK
from service.replies import job_object
from service.routes.webhooks import delivery_object
from tests.support.gateway import open_fake_gateway, request

KEY = "sk-bf-of-the-tests"
CONTRACT_ERRORS = {400, 401, 402, 403, 404, 409, 413, 422, 429, 500, 504, 529}
METHODS = {"get", "head", "post", "put", "patch", "delete", "options", "trace"}


def documented(gateway: Gateway) -> tuple[GatewayApp, dict[str, Any]]:
    app = create_app(gateway.dependencies)
    authenticator = gateway.dependencies.authenticator
    return app, Documentation(app, authenticator).document


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield method, path, operation


def references(part: object) -> Iterator[str]:
    if isinstance(part, dict):
        for name, value in part.items():
            if name == "$ref":
                yield value
            else:
                yield from references(value)
    elif isinstance(part, list):
        for value in part:
            yield from references(value)


async def test_every_route_is_documented_and_nothing_else() -> None:
    async with open_fake_gateway() as gateway:
        app, document = documented(gateway)
    rules = app.url_map.iter_rules()
    routes = {(method, rule.rule) for rule in rules for method in rule.methods or ()}
    # HEAD comes with every GET; it is documented where it is what clients send.
    assert {route for route in OPERATIONS if route[0] != "HEAD"} == {r for r in routes if r[0] != "HEAD"}
    assert {route for route in OPERATIONS if route[0] == "HEAD"} <= routes
    in_document = {(method.upper(), path) for method, path, _ in operations(document)}
    assert in_document == {
        (method, re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule)) for method, rule in OPERATIONS
    }


async def test_the_document_is_valid_openapi_3_1() -> None:
    async with open_fake_gateway() as gateway:
        _, document = documented(gateway)
    assert document["openapi"].startswith("3.1.")
    # As a client sees it: keys are strings, tuples are arrays.
    document = orjson.loads(orjson.dumps(document))
    assert [error.message for error in OPENAPI_31_VALIDATOR.iter_errors(document)] == []
    for reference in references(document):
        part = document
        for name in reference.removeprefix("#/").split("/"):
            part = part[name]
    ids = [operation["operationId"] for _, _, operation in operations(document)]
    assert len(ids) == len(set(ids)) == len(OPERATIONS)
    for _, _, operation in operations(document):
        for response in operation["responses"].values():
            assert {link["operationId"] for link in response.get("links", {}).values()} <= set(ids)


async def test_every_status_of_the_contract_has_the_envelope() -> None:
    async with open_fake_gateway() as gateway:
        _, document = documented(gateway)
    responses = document["paths"]["/v1/messages"]["post"]["responses"]
    assert {str(status) for status in CONTRACT_ERRORS} <= responses.keys()
    for _, _, operation in operations(document):
        for status, response in operation["responses"].items():
            if status[0] not in "45" or "$ref" not in response:
                continue
            named = document["components"]["responses"][response["$ref"].rpartition("/")[2]]
            schema = named["content"]["application/json"]["schema"]
            assert schema == {"$ref": "#/components/schemas/ErrorEnvelope"}
            assert "request-id" in named["headers"]


@pytest.mark.parametrize("status", ERROR_TEXTS)
def test_errors_are_documented_with_the_type_they_have(status: int) -> None:
    assert ERROR_TEXTS[status].endswith(f"`{error_type_of(status)}`.")


@pytest.mark.parametrize("keyed", [False, True])
async def test_credentials_are_documented_where_they_are_asked_for(keyed: bool) -> None:
    keys = [{"name": "ci", "key": KEY}] if keyed else []
    async with open_fake_gateway(keys=keys) as gateway:
        _, document = documented(gateway)
        for method, path, operation in operations(document):
            assert method in METHODS
            security = operation.get("security", document["security"])
            asked_for = bool(security) and {} not in security
            if method == "head":
                # Its answer has no body to read; GET on the same path has the same access.
                continue
            answer = await request(gateway.url, method.upper(), re.sub(r"\{\w+\}", "x", path))
            assert (answer.status == 401) == asked_for, (method, path, answer.status)
            if asked_for:
                assert keyed
                assert "401" in operation["responses"]


async def test_anonymous_access_beside_keys_is_documented() -> None:
    keys = [{"name": "ci", "key": KEY}]
    async with open_fake_gateway(keys=keys, auth={"allow_anonymous": True}) as gateway:
        _, document = documented(gateway)
        answer = await request(gateway.url, "GET", "/v1/jobs")
        wrong = await request(gateway.url, "GET", "/v1/jobs", {"x-api-key": "wrong"})
    assert document["security"][0] == {}
    assert answer.status == 200
    assert wrong.status == 401


@pytest.mark.parametrize("scheme", ["virtualKey", "apiKey", "googApiKey", "bearer", "basic"])
async def test_each_security_scheme_lets_its_key_in(scheme: str) -> None:
    async with open_fake_gateway(keys=[{"name": "ci", "key": KEY}]) as gateway:
        _, document = documented(gateway)
        described = document["components"]["securitySchemes"][scheme]
        match described:
            case {"type": "apiKey", "in": "header", "name": name}:
                headers = {name: KEY}
            case {"type": "http", "scheme": "bearer"}:
                headers = {"authorization": f"Bearer {KEY}"}
            case {"type": "http", "scheme": "basic"}:
                headers = {"authorization": f"Basic {base64.b64encode(f'ci:{KEY}'.encode()).decode()}"}
        answer = await request(gateway.url, "GET", "/v1/jobs", headers)
    assert answer.status == 200
    assert {scheme: []} in document["security"]


def test_bodies_are_documented_with_the_fields_they_have() -> None:
    accepted = JobAccepted(at=0.0, owner="", model="m", mode=Mode.PLAIN, body=b"{}")
    job = job_object(apply(None, "id", accepted))
    assert job.keys() == models.Job.model_fields.keys()
    assert set(get_args(models.JobStatus)) == {state.value for state in JobState} - {"expired"}
    assert set(get_args(models.JobStatus)) == set(models.RESPONSE_HEADERS["x-bf-async-status"][1]["enum"])
    told = DeliveryAccepted(
        at=0.0,
        endpoint="hook",
        event=WebhookEvent.COMPLETED,
        job_id="id",
        owner="",
        status="completed",
        status_code=200,
        result_url="/",
        result_expires_at=0.0,
    )
    delivery = delivery_object(deliveries.apply(None, "whd_1", told))
    assert delivery.keys() == models.WebhookDelivery.model_fields.keys()
    types = models.JobEvent.model_fields["type"].annotation
    assert set(get_args(types)) == {kind.__name__ for kind in get_args(Event)}


def test_the_control_headers_are_documented_under_their_names() -> None:
    names = {name.replace("_", "-") for name in models.MessageHeaders.model_fields}
    assert {ASYNC, ASYNC_ID, RESULT_TTL, DETACH, WEBHOOK, "prefer"} <= names


async def test_parameters_are_absent_rather_than_null() -> None:
    async with open_fake_gateway() as gateway:
        _, document = documented(gateway)
    for _, path, operation in operations(document):
        for parameter in operation["parameters"]:
            assert "null" not in repr(parameter["schema"]), (path, parameter)
            assert parameter["description"]
            assert parameter.get("required", False) == (parameter["in"] == "path")


async def test_both_pages_are_open_and_their_errors_are_envelopes() -> None:
    async with open_fake_gateway(keys=[{"name": "ci", "key": KEY}]) as gateway:
        document = await request(gateway.url, "GET", "/openapi.json")
        same = await request(gateway.url, "GET", "/anthropic/openapi.json")
        page = await request(gateway.url, "GET", "/anthropic/docs")
        refused = await request(gateway.url, "POST", "/openapi.json")
        lost = await request(gateway.url, "GET", "/docs/")
    assert document.status == same.status == page.status == 200
    assert document.headers["content-type"] == "application/json"
    assert document.body == same.body
    assert document.json["info"]["title"] == "messagesd"
    assert [server["url"] for server in document.json["servers"]] == ["/", "/anthropic"]
    assert page.headers["content-type"].startswith("text/html")
    for operation in OPERATIONS.values():
        assert f'id="{operation.id}"' in page.body.decode()
    assert (refused.status, refused.error_type) == (405, "invalid_request_error")
    assert (lost.status, lost.error_type) == (404, "not_found_error")
    assert KEY not in document.body.decode() + page.body.decode()


async def test_the_plain_page_marks_code_up_and_escapes_the_rest() -> None:
    assert with_code("`a<b>` & `c`: d") == "<code>a&lt;b&gt;</code> &amp; <code>c</code>: d"
    async with open_fake_gateway() as gateway:
        page = await request(gateway.url, "GET", "/docs")
    assert "`" not in page.body.decode().partition("<script")[0]


async def test_the_page_runs_its_own_script_and_the_pinned_one_only() -> None:
    async with open_fake_gateway() as gateway:
        page = await request(gateway.url, "GET", "/docs")
    text = page.body.decode()
    inline = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert inline == [SCRIPT]
    digest = base64.b64encode(hashlib.sha256(inline[0].encode()).digest()).decode()
    policy = page.headers["content-security-policy"]
    (allowed,) = re.findall(r"script-src ([^;]*)", policy)
    ((url, integrity),) = re.findall(r'<script src="([^"]*)" integrity="([^"]*)"', text)
    assert allowed.split() == [f"'sha256-{digest}'", url]
    assert integrity.startswith("sha384-")
    assert "connect-src 'self'" in policy


async def test_quart_schema_is_kept_off_the_hot_path() -> None:
    async with open_fake_gateway() as gateway:
        app, _ = documented(gateway)
    assert "QUART_SCHEMA" not in app.extensions
    assert "make_response" not in vars(app)
    assert app.after_request_funcs == {}


async def test_the_document_is_built_once() -> None:
    async with open_fake_gateway() as gateway:
        app = create_app(gateway.dependencies)
        documentation = Documentation(app, gateway.dependencies.authenticator)
        assert documentation.document is documentation.document
