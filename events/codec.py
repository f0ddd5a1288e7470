"""Events as bytes, for a log to keep, and as JSON objects, for people to read.

A stored event is the JSON object ``{"v": SCHEMA_VERSION, "kind": CLASS, "event": {FIELD: VALUE}}``. Content
(bodies, frames, messages) is a string where it is UTF-8, as nearly always, and ``{"b64": BASE64}``
otherwise. Fields that a later release added without a new version are ignored when read.
"""

from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping
from dataclasses import fields
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any, get_args

import orjson
from pydantic import TypeAdapter, ValidationError

from events.errors import CodecError
from events.types import Event, Failure, StoredEvent

SCHEMA_VERSION = 1

Upgrade = Callable[[dict[str, Any]], dict[str, Any]]
"""Turns the stored object of one version into that of the next."""

UPGRADES: Mapping[int, Upgrade] = MappingProxyType({})
"""By the version they start from."""

_KINDS: Mapping[str, TypeAdapter[Event]] = MappingProxyType(
    {kind.__name__: TypeAdapter(kind) for kind in get_args(Event)}
)
_CONTENT = ("body", "message")


def encode(event: Event, *, content: bool = True) -> bytes:
    """The event as it is stored, with its content or without (but for frames, which always come along).

    Raises CodecError for what JSON cannot hold (lone surrogates, depth).
    """
    stored = {"v": SCHEMA_VERSION, "kind": type(event).__name__, "event": event}
    try:
        return orjson.dumps(stored, default=_encode_other if content else _encode_without_content)
    except orjson.JSONEncodeError as exc:
        raise CodecError(f"{type(event).__name__} cannot be written: {exc}") from None


def decode(data: bytes, *, upgrades: Mapping[int, Upgrade] = UPGRADES) -> Event:
    """The event that :func:`encode` wrote, also by an older release when ``upgrades`` lead to this one.

    Raises CodecError for anything else: garbage, a newer version, an unknown kind, a wrong field.
    """
    try:
        stored = orjson.loads(data)
    except orjson.JSONDecodeError:
        raise CodecError("a stored event is not JSON") from None
    stored = _upgrade(stored, upgrades)
    kind, values = stored.get("kind"), stored.get("event")
    adapter = _KINDS.get(kind) if isinstance(kind, str) else None
    if adapter is None or not isinstance(values, dict):
        raise CodecError("a stored event of unknown kind")
    try:
        return adapter.validate_python(_with_content(values))
    except ValidationError as exc:
        places = {".".join(map(str, error["loc"])) or "event" for error in exc.errors(include_input=False)}
        raise CodecError(f"a stored {kind} is damaged at: {', '.join(sorted(places))}") from None
    except ValueError:
        raise CodecError(f"a stored {kind} has damaged content") from None


def public(event: StoredEvent) -> dict[str, Any]:
    """The event for ``GET /v1/jobs/{id}/events``: always fit for JSON, never with a credential.

    ``seq``, ``at`` (RFC 3339), ``type``, then the event's own fields. The request body and the Message are
    parsed where that is possible and strings otherwise; they and the frames are absent once redacted, as
    is every field without a value. Headers are pairs of name and value.
    """
    fact = event.event
    view: dict[str, Any] = {"seq": event.seq, "at": rfc3339(event.at), "type": type(fact).__name__}
    for field in fields(fact):
        value = getattr(fact, field.name)
        if field.name != "at" and value not in (None, b"", ()):
            view[field.name] = _public_value(field.name, value)
    return view


def rfc3339(at: float) -> str:
    """A moment in Unix seconds as ``2026-01-02T03:04:05.678Z``: UTC, milliseconds, rounded down.

    Raises ValueError or OverflowError for one outside the years 1 to 9999.
    """
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _encode_without_content(value: object) -> object:
    return "" if isinstance(value, bytes) else _encode_other(value)


def _encode_other(value: object) -> object:
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return {"b64": b64encode(value).decode("ascii")}
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} is no field of an event")


def _upgrade(stored: object, upgrades: Mapping[int, Upgrade]) -> dict[str, Any]:
    while isinstance(stored, dict):
        version = stored.get("v")
        if type(version) is not int or version > SCHEMA_VERSION:
            raise CodecError("a stored event of unknown version")
        if version == SCHEMA_VERSION:
            return stored
        if version not in upgrades:
            raise CodecError(f"no upgrade leads on from version {version}")
        try:
            stored = upgrades[version](stored) | {"v": version + 1}
        except (LookupError, TypeError, ValueError, AttributeError):
            raise CodecError(f"a stored event of version {version} is damaged") from None
    raise CodecError("a stored event is not an object")


def _with_content(values: dict[str, Any]) -> dict[str, Any]:
    """The fields with content as bytes. Raises ValueError where it is neither of its two forms."""
    for name in _CONTENT:
        if name in values:
            values[name] = _content(values[name])
    if isinstance(values.get("frames"), list):
        values["frames"] = tuple(map(_content, values["frames"]))
    return values


def _content(value: object) -> bytes:
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, dict) and isinstance(value.get("b64"), str):
        return b64decode(value["b64"], validate=True)
    raise ValueError("content is a string or base64")


def _public_value(name: str, value: Any) -> Any:
    if name == "headers":
        return [[key, text] for key, text in value if key.startswith("anthropic-")]
    if name == "frames":
        return [frame.decode("utf-8", "replace") for frame in value]
    if isinstance(value, Failure):
        return {"status": value.status, "type": value.type, "message": value.message}
    if isinstance(value, bytes):
        return _parsed(value)
    return dict(value) if isinstance(value, Mapping) else value


def _parsed(content: bytes) -> Any:
    try:
        parsed = orjson.loads(content)
        # It reads 1024 levels and writes 254: what is deeper stays a string.
        orjson.dumps(parsed)
    except (orjson.JSONDecodeError, orjson.JSONEncodeError):
        return content.decode("utf-8", "replace")
    return parsed
