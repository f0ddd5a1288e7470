"""Who may come in, by which door, and what they may see there: the contract's "Credentials" over HTTP."""

import base64
from collections.abc import AsyncIterator
from itertools import product

import pytest
import trio

from service.main import Gateway
from tests.e2e.daemon import running
from tests.e2e.wire import BODY, ask, assert_error, connect, post, request

WIRE_TIMEOUT_S = 10
KEY, ADMIN, BLOCKED, NARROW = "sk-bf-good", "sk-bf-admin", "sk-bf-blocked", "sk-bf-narrow"
KEYS = [
    {"name": "good", "key": KEY},
    {"name": "root", "key": ADMIN, "admin": True},
    {"name": "bad", "key": BLOCKED, "blocked": True},
    {"name": "narrow", "key": NARROW, "models": ["allowed-*"]},
]


def basic(text: str) -> str:
    return "Basic " + base64.b64encode(text.encode()).decode()


def presented(key: str, name: str) -> list[tuple[str, str]]:
    """``key`` in each place a key can stand, in the order in which they decide."""
    return [
        ("x-bf-vk", key),
        ("authorization", f"Bearer {key}"),
        ("authorization", basic(f"{name}:{key}")),
        ("x-api-key", key),
        ("x-goog-api-key", key),
    ]


@pytest.fixture
async def locked() -> AsyncIterator[Gateway]:
    with trio.fail_after(WIRE_TIMEOUT_S):
        async with running(keys=KEYS) as gateway:
            yield gateway


async def test_a_key_in_each_place(locked: Gateway) -> None:
    async with connect(locked.url) as wire:
        for header in presented(KEY, "good"):
            assert (await wire.ask(post(BODY, header))).status == 200
        for header in presented("sk-bf-wrong", "good"):
            answer = await wire.ask(post(BODY, header))
            assert_error(answer, 401)
            assert len(answer.headers_of("www-authenticate")) == 2
            assert "sk-bf-wrong" not in answer.body.decode()
        for header in presented(BLOCKED, "bad"):
            assert_error(await wire.ask(post(BODY, header)), 403)
        assert_error(await wire.ask(post(BODY)), 401)


async def test_the_first_one_present_decides(locked: Gateway) -> None:
    async with connect(locked.url) as wire:
        right, wrong = presented(KEY, "good"), presented("sk-bf-wrong", "good")
        for first, second in product(range(5), range(5)):
            # The two forms of Authorization are one header.
            if first < second and {first, second} != {1, 2}:
                # The order on the wire is not the order that counts.
                answer = await wire.ask(post(BODY, wrong[second], right[first]))
                assert answer.status == 200, (right[first], wrong[second])
                assert_error(await wire.ask(post(BODY, right[second], wrong[first])), 401)


@pytest.mark.parametrize(
    "headers",
    [
        [("authorization", KEY)],
        [("authorization", "Bearer")],
        [("authorization", f"Bearer {KEY} {KEY}")],
        [("authorization", f"Digest {KEY}")],
        [("authorization", "Basic !!!")],
        [("authorization", basic(KEY))],
        [("authorization", basic(f"root:{KEY}"))],
        [("authorization", basic(f":{KEY}"))],
        [("authorization", "Basic " + base64.b64encode(b"\xff\xfe:\xff").decode())],
        [("x-api-key", KEY), ("x-api-key", "sk-bf-wrong")],
        [("x-api-key", "")],
        [("x-api-key", "\u00e9")],
        [("x-api-key", "k" * 5000)],
        [("x-api-key", KEY.upper())],
    ],
)
async def test_credentials_that_are_none(locked: Gateway, headers: list[tuple[str, str]]) -> None:
    assert_error(await ask(locked.url, post(BODY, *headers)), 401)


async def test_what_is_open_and_what_is_not(locked: Gateway) -> None:
    async with connect(locked.url) as wire:
        for target in ("/healthz", "/", "/api/hello"):
            assert (await wire.ask(request("GET", target), method="GET")).status == 200
        for target in ("/metrics", "/readyz", "/v1/models", "/v1/jobs", "/v1/jobs/x", "/v1/jobs/x/stream"):
            assert_error(await wire.ask(request("GET", target), method="GET"), 401)
        for target in ("/metrics", "/readyz", "/v1/models", "/v1/jobs"):
            keyed = request("GET", target, headers=[("x-api-key", KEY)])
            assert (await wire.ask(keyed, method="GET")).status == 200
        # Who may not come in learns nothing of what is wrong with the rest of the request.
        assert_error(await wire.ask(post(b"{", ("x-bf-async", "what"))), 401)
        assert_error(await wire.ask(post(b"", ("x-bf-async-id", "x"))), 401)
        assert_error(await wire.ask(request("GET", "/nowhere"), method="GET"), 404)


async def test_models_a_key_may_not_use(locked: Gateway) -> None:
    async with connect(locked.url) as wire:
        key = ("x-api-key", NARROW)
        assert (await wire.ask(post(BODY | {"model": "allowed-1"}, key))).status == 200
        for target in ("/v1/messages", "/v1/messages/count_tokens", "/v1/messages/else"):
            assert_error(await wire.ask(post(BODY, key, target=target)), 403)


async def test_jobs_are_their_owners_and_the_admins(locked: Gateway) -> None:
    async with connect(locked.url) as wire:
        owner, other, admin = (("x-api-key", key) for key in (KEY, NARROW, ADMIN))
        job_id = (await wire.ask(post(BODY, owner, ("x-bf-async", "true")))).json()["id"]
        seen = []
        for caller in (owner, admin, other):
            polled = await wire.ask(post(b"", caller, ("x-bf-async-id", job_id)))
            listed = await wire.ask(request("GET", "/v1/jobs", headers=[caller]), method="GET")
            got = [
                await wire.ask(request("GET", f"/v1/jobs/{job_id}{what}", headers=[caller]), method="GET")
                for what in ("", "/events", "/stream")
            ]
            seen.append((polled.status, len(listed.json()["data"]), [answer.status for answer in got]))
        assert seen == [(200, 1, [200] * 3), (200, 1, [200] * 3), (404, 0, [404] * 3)]
        unknown = await wire.ask(post(b"", other, ("x-bf-async-id", "nothing")))
        foreign = await wire.ask(post(b"", other, ("x-bf-async-id", job_id)))
        assert unknown.json()["error"] == foreign.json()["error"]
        for method, what in (("POST", "/cancel"), ("DELETE", "")):
            data = request(method, f"/v1/jobs/{job_id}{what}", headers=[other])
            assert_error(await wire.ask(data, method=method), 404)


async def test_anonymous_calls_where_they_are_allowed_beside_keys() -> None:
    async with running(keys=KEYS, auth={"allow_anonymous": True}) as gateway, connect(gateway.url) as wire:
        assert (await wire.ask(post(BODY))).status == 200
        assert_error(await wire.ask(post(BODY, ("x-api-key", "sk-bf-wrong"))), 401)
        assert (await wire.ask(post(BODY, ("x-api-key", KEY)))).status == 200
        assert_error(await wire.ask(request("GET", "/v1/jobs/x"), method="GET"), 404)


async def test_without_keys_any_credential_will_do() -> None:
    async with running() as gateway:
        for header in presented("whatever", "whoever"):
            assert (await ask(gateway.url, post(BODY, header))).status == 200
