"""``[[webhooks]]``: what may be said, what is refused and how, and that no secret is ever shown."""

import base64
import tomllib
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from standardwebhooks.webhooks import Webhook, WebhookVerificationError

from actors.webhooks.options import WebhookOptions
from actors.webhooks.signing import Signer
from events.deliveries import WebhookEvent
from service.settings import Settings, SettingsError, describe, load

SECRET = "whsec_" + base64.b64encode(b"the first of two secrets").decode()
OTHER = "whsec_" + base64.b64encode(b"the second of two secret").decode()
MINIMAL = {"name": "orders", "url": "https://hooks.example.com/x?y=1", "secrets": [SECRET]}


def options(**changes: Any) -> WebhookOptions:
    return WebhookOptions.model_validate(MINIMAL | changes)


def test_the_defaults_are_those_of_the_contract() -> None:
    made = options()
    assert (made.enabled, made.progress, made.allow_private) == (True, False, False)
    assert (made.backoff_s, made.max_retries, made.timeout_s) == (30.0, 4, 10.0)
    assert made.events == tuple(WebhookEvent)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "a b"}, "String should match pattern"),
        ({"url": "ftp://hooks.example.com/"}, "URL scheme should be 'http' or 'https'"),
        ({"url": "https://me:word@hooks.example.com/"}, "takes no user name and no password"),
        ({"url": "https://hooks.example.com/#here"}, "takes no fragment"),
        ({"url": "http://10.0.0.1/"}, "allow it with allow_private = true"),
        ({"url": "http://localhost:8000/"}, "allow it with allow_private = true"),
        ({"url": "http://[::1]/"}, "allow it with allow_private = true"),
        ({"url": "http://169.254.169.254/latest"}, "allow it with allow_private = true"),
        ({"secrets": []}, "1 to 4 secrets are expected"),
        ({"secrets": [SECRET] * 5}, "1 to 4 secrets are expected"),
        ({"secrets": ["hunter2"]}, 'not "whsec_" and base64'),
        ({"secrets": ["whsec_hunter2!"]}, 'not "whsec_" and base64'),
        ({"secrets": ["whsec_aHVudGVyMg=="]}, "the base64 of 24 to 64 bytes"),
        ({"events": []}, "at least one event"),
        ({"events": ["async_job.progress"]}, "async_job.completed"),
        ({"max_retries": 21}, "less than or equal to 20"),
        ({"max_retries": -1}, "greater than or equal to 0"),
        ({"backoff_s": 0}, "greater than 0"),
        ({"max_backoff_s": 29}, "is less than backoff_s"),
        ({"timeout_s": 301}, "less than or equal to 300"),
        ({"max_concurrency": 0}, "greater than or equal to 1"),
        ({"retries": 1}, "Extra inputs are not permitted"),
    ],
)
def test_what_is_refused(changes: Mapping[str, object], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        options(**changes)
    assert message in str(caught.value)
    assert "hunter2" not in str(caught.value)
    assert SECRET not in str(caught.value)


def test_private_addresses_may_be_allowed() -> None:
    assert str(options(url="http://127.0.0.1:1/x", allow_private=True).url) == "http://127.0.0.1:1/x"


def test_no_secret_is_shown() -> None:
    made = options(secrets=[SECRET, OTHER])
    described = describe(Settings(webhooks=(made,)))
    for text in (repr(made), str(made), made.model_dump_json(), described):
        assert SECRET not in text
        assert OTHER not in text
    (table,) = tomllib.loads(described)["webhooks"]
    assert table["name"] == "orders"


TOML = """
[[providers]]
name = "echo"
kind = "echo"
[[webhooks]]
name = "orders"
url = "https://hooks.example.com/"
secrets = ["env:NEW", "env:OLD"]
"""


def test_secrets_come_from_the_environment(tmp_path: Path) -> None:
    path = tmp_path / "messagesd.toml"
    path.write_text(TOML)
    (webhook,) = load(path, {"NEW": SECRET, "OLD": OTHER}).webhooks
    assert [secret.get_secret_value() for secret in webhook.secrets] == [SECRET, OTHER]
    with pytest.raises(SettingsError) as caught:
        load(path, {"NEW": "hunter2"})
    assert [str(problem) for problem in caught.value.problems] == [
        f"{path}: webhooks[0].secrets[1]: the environment variable 'OLD' is not set",
        f'{path}: webhooks[0].secrets[0]: not "whsec_" and base64',
    ]


def test_two_endpoints_have_two_names() -> None:
    with pytest.raises(ValidationError, match="'orders' is used twice"):
        Settings(webhooks=(options(), options()))


# --- signatures ---------------------------------------------------------------------------------------


def test_a_receiver_verifies_with_either_secret() -> None:
    now = datetime.now(UTC).timestamp()
    headers = dict(Signer([SECRET, OTHER]).headers("whd_1", now, '{"a":"\u00fc"}'))
    assert headers["webhook-id"] == "whd_1"
    assert headers["webhook-timestamp"] == str(int(now))
    assert len(headers["webhook-signature"].split(" ")) == 2
    for secret in (SECRET, OTHER):
        assert Webhook(secret).verify('{"a":"\u00fc"}'.encode(), headers) == {"a": "\u00fc"}
    third = "whsec_" + base64.b64encode(b"some other secret of ours").decode()
    with pytest.raises(WebhookVerificationError, match="No matching signature"):
        Webhook(third).verify(b'{"a":1}', headers)


def test_the_signature_is_that_of_the_specification() -> None:
    # The vector of the specification's own test suites.
    secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
    headers = dict(
        Signer([secret]).headers("msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330.9, '{"test": 2432232314}')
    )
    assert headers["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
