"""What a ``[[webhooks]]`` table may say. Frozen; durations in seconds.

Secrets arrive here already resolved (``env:NAME`` is the business of the settings).
"""

import base64
import binascii
from typing import Annotated

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    HttpUrl,
    SecretStr,
    ValidationInfo,
    field_validator,
)

from actors.providers.options import Name
from actors.webhooks.addresses import is_public, literal_address
from events.deliveries import WebhookEvent

SECRET_PREFIX = "whsec_"  # noqa: S105 - the form of secrets, not one of them
MIN_SECRET_BYTES, MAX_SECRET_BYTES = 24, 64
"""Standard Webhooks 1.0, "Signature scheme"."""
MAX_SECRETS = 4
"""Valid at once. Two are what a rotation takes."""


def _check_url(url: HttpUrl) -> HttpUrl:
    if url.username or url.password:
        raise ValueError("takes no user name and no password: the signature says who calls")
    if url.fragment:
        raise ValueError("takes no fragment")
    return url


def secret_bytes(secret: str) -> bytes:
    """The key of a ``whsec_`` secret. Raises ValueError, which does not show it."""
    if not secret.startswith(SECRET_PREFIX):
        raise ValueError('not "whsec_" and base64')
    try:
        key = base64.b64decode(secret.removeprefix(SECRET_PREFIX), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError('not "whsec_" and base64') from None
    if not MIN_SECRET_BYTES <= len(key) <= MAX_SECRET_BYTES:
        raise ValueError(f"the base64 of {MIN_SECRET_BYTES} to {MAX_SECRET_BYTES} bytes is expected")
    return key


def _check_secret(secret: SecretStr) -> SecretStr:
    secret_bytes(secret.get_secret_value())
    return secret


# Bounds of a length would be reported, too, for a list whose items are wrong.
def _check_secrets(secrets: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
    if not 1 <= len(secrets) <= MAX_SECRETS:
        raise ValueError(f"1 to {MAX_SECRETS} secrets are expected")
    return secrets


def _check_events(events: tuple[WebhookEvent, ...]) -> tuple[WebhookEvent, ...]:
    if not events:
        raise ValueError("at least one event is needed")
    return events


class WebhookOptions(BaseModel):
    """``[[webhooks]]``: an endpoint that callers may name in ``x-bf-async-webhook``."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    name: Name
    allow_private: bool = False
    """Call it at private, loopback, link-local and other addresses that are not the public internet's."""
    url: Annotated[HttpUrl, AfterValidator(_check_url)]
    secrets: Annotated[
        tuple[Annotated[SecretStr, AfterValidator(_check_secret)], ...], AfterValidator(_check_secrets)
    ]
    """``whsec_…``. Every call is signed with each of them, so that a receiver can change over."""
    enabled: bool = True
    """False: naming it is refused, and nothing is sent."""
    events: Annotated[tuple[WebhookEvent, ...], AfterValidator(_check_events)] = tuple(WebhookEvent)
    """Which ends of jobs it is told of."""
    progress: bool = False
    """Send ``async_job.progress`` while a job has new frames, at most once a second and as best it can."""
    max_retries: Annotated[int, Field(ge=0, le=20)] = 4
    """After the first try."""
    backoff_s: Annotated[float, Field(gt=0, le=3600, allow_inf_nan=False)] = 30.0
    """Before the first retry; each further one waits twice as long."""
    max_backoff_s: Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)] = 1800.0
    """The longest wait between two tries, whoever asks for it."""
    timeout_s: Annotated[float, Field(gt=0, le=300, allow_inf_nan=False)] = 10.0
    """Of one try, from the name's resolution to the answer's head."""
    max_concurrency: Annotated[int, Field(ge=1, le=1000)] = 10
    """Tries under way at once; others wait."""

    @field_validator("url")
    @classmethod
    def _is_allowed(cls, url: HttpUrl, info: ValidationInfo) -> HttpUrl:
        """A name may resolve to anything at any time; an address is known now."""
        address = literal_address((url.host or "").strip("[]"))
        if address is not None and not is_public(address) and not info.data.get("allow_private", False):
            raise ValueError("is an address that is not public: allow it with allow_private = true")
        return url

    @field_validator("max_backoff_s")
    @classmethod
    def _holds_the_first(cls, value: float, info: ValidationInfo) -> float:
        if value < info.data.get("backoff_s", 0.0):
            raise ValueError("is less than backoff_s")
        return value
