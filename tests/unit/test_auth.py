"""Credentials: which one decides, and what a bad one costs."""

import base64

import pytest
from werkzeug.datastructures import Headers

from service.auth import AuthenticationError, Authenticator, PermissionDeniedError, Principal
from service.settings import AuthSettings, KeySettings, Settings

CI, ADMIN, BLOCKED = "sk-bf-ci-key", "sk-bf-admin-key", "sk-bf-blocked-key"
KEYS = tuple(
    KeySettings.model_validate(table)
    for table in (
        {"name": "ci", "key": CI, "models": ["claude-*", "echo"]},
        {"name": "boss", "key": ADMIN, "admin": True},
        {"name": "gone", "key": BLOCKED, "blocked": True},
    )
)


def basic(name: str, key: str) -> str:
    return "Basic " + base64.b64encode(f"{name}:{key}".encode()).decode()


def ask(
    *fields: tuple[str, str], allow_anonymous: bool = False, keys: tuple[KeySettings, ...] = KEYS
) -> Principal:
    settings = Settings(keys=keys, auth=AuthSettings(allow_anonymous=allow_anonymous))
    return Authenticator.of(settings).authenticate(Headers(list(fields)))


@pytest.mark.parametrize(
    "field",
    [
        ("x-bf-vk", CI),
        ("X-BF-VK", f" {CI} "),
        ("authorization", f"Bearer {CI}"),
        ("authorization", f"bearer   {CI}"),
        ("authorization", basic("ci", CI)),
        ("x-api-key", CI),
        ("x-goog-api-key", CI),
    ],
)
def test_every_place_of_the_contract(field: tuple[str, str]) -> None:
    principal = ask(field)
    assert (principal.name, principal.admin, principal.anonymous) == ("ci", False, False)


def test_admin() -> None:
    principal = ask(("x-api-key", ADMIN))
    assert principal.admin
    assert principal.may_see("ci")
    assert not ask(("x-api-key", CI)).may_see("boss")
    assert ask(("x-api-key", CI)).may_see("ci")


def test_the_first_present_decides() -> None:
    order = [
        ("x-bf-vk", "{}"),
        ("authorization", "Bearer {}"),
        ("x-api-key", "{}"),
        ("x-goog-api-key", "{}"),
    ]
    for index, (name, form) in enumerate(order):
        later = [(other, template.format("wrong")) for other, template in order[index + 1 :]]
        assert ask(*later, (name, form.format(CI))).name == "ci"
        if later:
            right = [(other, template.format(CI)) for other, template in order[index + 1 :]]
            with pytest.raises(AuthenticationError):
                ask(*right, (name, form.format("wrong")))


def test_empty_fields_are_absent() -> None:
    assert (
        ask(("x-bf-vk", ""), ("authorization", " "), ("x-api-key", ""), ("x-goog-api-key", CI)).name == "ci"
    )


@pytest.mark.parametrize("allow_anonymous", [False, True])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ([("x-api-key", "wrong")], "unknown key"),
        ([("x-api-key", "wr\udcffng")], "unknown key"),
        ([("authorization", "Bearer")], "malformed Authorization: Bearer"),
        ([("authorization", f"Bearer {CI} {CI}")], "malformed Authorization: Bearer"),
        ([("authorization", f"Token {CI}")], "Authorization is Bearer KEY"),
        ([("authorization", CI)], "Authorization is Bearer KEY"),
        ([("authorization", "Basic %%%")], "malformed Authorization: Basic"),
        ([("authorization", "Basic /w==")], "malformed Authorization: Basic"),
        ([("authorization", "Basic é")], "malformed Authorization: Basic"),
        (
            [("authorization", "Basic " + base64.b64encode(CI.encode()).decode())],
            "malformed Authorization: Basic",
        ),
        ([("authorization", basic("boss", CI))], "unknown key"),
        ([("authorization", basic("", CI))], "unknown key"),
        (
            [("authorization", f"Bearer {CI}"), ("authorization", "Bearer other")],
            "several different authorization",
        ),
        ([("x-api-key", CI), ("x-api-key", ADMIN)], "several different x-api-key"),
    ],
)
def test_a_wrong_one_is_401_even_where_anonymous_is_allowed(
    fields: list[tuple[str, str]], message: str, allow_anonymous: bool
) -> None:
    with pytest.raises(AuthenticationError, match=message) as caught:
        ask(*fields, allow_anonymous=allow_anonymous)
    assert caught.value.failure.status == 401
    assert caught.value.failure.type == "authentication_error"
    assert ("www-authenticate", 'Bearer realm="messagesd"') in caught.value.headers
    assert CI not in caught.value.message


def test_the_same_twice_is_no_contradiction() -> None:
    assert ask(("authorization", f"Bearer {CI}"), ("authorization", f"Bearer {CI}")).name == "ci"


def test_none_at_all() -> None:
    with pytest.raises(AuthenticationError, match="no key"):
        ask()
    principal = ask(allow_anonymous=True)
    assert (principal.name, principal.anonymous, principal.admin) == ("", True, False)


def test_without_keys_every_credential_is_ignored() -> None:
    for field in (("x-api-key", "any"), ("authorization", "Nonsense"), ("authorization", basic("a", "b"))):
        assert ask(field, keys=()).anonymous


def test_blocked_is_403() -> None:
    with pytest.raises(PermissionDeniedError, match="'gone' is blocked") as caught:
        ask(("x-api-key", BLOCKED))
    assert (caught.value.failure.status, caught.value.failure.type) == (403, "permission_error")


def test_models_are_globs() -> None:
    principal = ask(("x-api-key", CI))
    assert principal.models == ("claude-*", "echo")
    allowed = {
        model: principal.may_use(model) for model in ("claude-x", "echo", "echo2", "Claude-x", "a\nclaude-x")
    }
    assert allowed == {
        "claude-x": True,
        "echo": True,
        "echo2": False,
        "Claude-x": False,
        "a\nclaude-x": False,
    }
    assert ask(("x-api-key", ADMIN)).may_use("anything")


def test_what_the_start_up_says() -> None:
    closed = Authenticator(keys=KEYS, allow_anonymous=False)
    mixed = Authenticator(keys=KEYS, allow_anonymous=True)
    empty = Authenticator(keys=(), allow_anonymous=False)
    assert [(a.keys_configured, a.anonymous_allowed) for a in (closed, mixed, empty)] == [
        (True, False),
        (True, True),
        (False, True),
    ]


def test_no_key_is_held() -> None:
    authenticator = Authenticator(keys=KEYS, allow_anonymous=False)
    assert CI not in repr(vars(authenticator))
