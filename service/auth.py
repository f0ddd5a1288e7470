"""Credentials -> :class:`Principal`, as the contract's "Credentials" says.

Keys are held as SHA-256 digests. A presented key is hashed and looked up by its digest, and the digests
are compared in constant time: how long a wrong key takes tells nothing about the right ones.
"""

import base64
import binascii
import fnmatch
import hashlib
import hmac
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from actors.errors import ActorError
from service.settings import KeySettings, Settings

# RFC 9110, section 11.6.1: a 401 says how to do better. Basic lets a browser ask for name and key.
_CHALLENGES = (
    ("www-authenticate", 'Bearer realm="messagesd"'),
    ("www-authenticate", 'Basic realm="messagesd", charset="UTF-8"'),
)


class AuthenticationError(ActorError):
    """No credential, one that cannot be read, or one nobody here knows."""

    status = 401

    def __init__(self, message: str) -> None:
        super().__init__(message, headers=_CHALLENGES)


class PermissionDeniedError(ActorError):
    """The caller is known, and may not do this."""

    status = 403


class RequestHeaders(Protocol):
    """The request's header fields, by name in any case."""

    def getlist(self, key: str, /) -> Sequence[str]:
        """Every value of the field, in order; empty if it is absent."""
        ...


def _matcher(globs: Iterable[str]) -> Callable[[str], object]:
    return re.compile("|".join(fnmatch.translate(pattern) for pattern in globs)).match


@dataclass(frozen=True, slots=True)
class Principal:
    """Who calls."""

    name: str
    """The key's name; empty for an anonymous caller. The ``owner`` of what it submits."""
    admin: bool = False
    anonymous: bool = False
    models: tuple[str, ...] = ()
    """Globs of the models it may ask for; none: all of them."""
    _match: Callable[[str], object] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_match", _matcher(self.models))

    def may_use(self, model: str) -> bool:
        """Whether it may ask for ``model``, spelt as the client spells it."""
        return not self.models or self._match(model) is not None

    def may_see(self, owner: str) -> bool:
        """Whether ``owner``'s jobs exist for this caller."""
        return self.admin or owner == self.name


class _Credential(NamedTuple):
    key: str
    name: str | None = None
    """What the key has to be called; None where the caller gave no name."""


class _Known(NamedTuple):
    digest: bytes
    principal: Principal
    blocked: bool


_ANONYMOUS = Principal(name="", anonymous=True)


class Authenticator:
    """Tells who a request is from. Holds no key, only digests; safe to share between tasks."""

    def __init__(self, *, keys: Iterable[KeySettings], allow_anonymous: bool) -> None:
        self._allow_anonymous = allow_anonymous
        self._known = {
            key.digest: _Known(
                key.digest, Principal(name=key.name, admin=key.admin, models=key.models), key.blocked
            )
            for key in keys
        }

    @classmethod
    def of(cls, settings: Settings) -> "Authenticator":
        """The one that ``settings`` describe."""
        return cls(keys=settings.keys, allow_anonymous=settings.auth.allow_anonymous)

    @property
    def keys_configured(self) -> bool:
        """Whether there is any key to check against (``/metrics`` and ``/readyz`` ask for one then)."""
        return bool(self._known)

    @property
    def anonymous_allowed(self) -> bool:
        """Whether a call without a credential is served."""
        return self._allow_anonymous or not self._known

    def authenticate(self, headers: RequestHeaders) -> Principal:
        """Who sent these headers.

        Raises :class:`AuthenticationError` for a credential that is missing, unreadable or unknown, and
        :class:`PermissionDeniedError` for a blocked key. With no keys configured every credential is ignored:
        client libraries insist on sending one.
        """
        if not self._known:
            return _ANONYMOUS
        credential = _presented(headers)
        if credential is None:
            if self._allow_anonymous:
                return _ANONYMOUS
            raise AuthenticationError("no key: send it as x-api-key or as Authorization: Bearer")
        digest = hashlib.sha256(credential.key.encode(errors="replace")).digest()
        known = self._known.get(digest)
        if known is None or not hmac.compare_digest(known.digest, digest):
            raise AuthenticationError("unknown key")
        if credential.name is not None and credential.name != known.principal.name:
            raise AuthenticationError("unknown key")
        if known.blocked:
            raise PermissionDeniedError(f"the key {known.principal.name!r} is blocked")
        return known.principal


def _only(headers: RequestHeaders, name: str) -> str:
    """The field's one value; empty if it is absent. Raises AuthenticationError for contradictions."""
    values = headers.getlist(name)
    if not values:
        return ""
    if any(value != values[0] for value in values):
        raise AuthenticationError(f"several different {name} headers")
    return values[0].strip()


def _presented(headers: RequestHeaders) -> _Credential | None:
    """The credential that decides: the first present one, in the contract's order."""
    if key := _only(headers, "x-bf-vk"):
        return _Credential(key)
    if authorization := _only(headers, "authorization"):
        return _parse_authorization(authorization)
    key = _only(headers, "x-api-key") or _only(headers, "x-goog-api-key")
    return _Credential(key) if key else None


def _parse_authorization(value: str) -> _Credential:
    """RFC 6750 Bearer or RFC 7617 Basic. Raises AuthenticationError."""
    scheme, _, rest = value.partition(" ")
    rest = rest.strip()
    match scheme.lower():
        case "bearer" if rest and " " not in rest:
            return _Credential(rest)
        case "basic":
            try:
                name, colon, key = base64.b64decode(rest, validate=True).decode().partition(":")
            except (binascii.Error, ValueError):
                raise AuthenticationError("malformed Authorization: Basic is base64 of NAME:KEY") from None
            if not colon:
                raise AuthenticationError("malformed Authorization: Basic is base64 of NAME:KEY")
            return _Credential(key, name)
        case "bearer":
            raise AuthenticationError("malformed Authorization: Bearer is followed by one key")
        case _:
            raise AuthenticationError("Authorization is Bearer KEY or Basic base64(NAME:KEY)")
