"""Batches and their events as bytes, for a log to keep.

An event is the JSON object ``{"v": SCHEMA_VERSION, "type": CLASS, "event": {FIELD: VALUE}}``, a state the
object ``{"v": SCHEMA_VERSION, "batch": {FIELD: VALUE}}``. Fields that a later release added are ignored.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypeVar, get_args

import orjson
from pydantic import TypeAdapter, ValidationError

from events.batches import BatchEvent, BatchSnapshot
from events.errors import CodecError

SCHEMA_VERSION = 1

_TYPES: Mapping[str, TypeAdapter[BatchEvent]] = MappingProxyType(
    {kind.__name__: TypeAdapter(kind) for kind in get_args(BatchEvent)}
)
_BATCH = TypeAdapter(BatchSnapshot)

T = TypeVar("T")


def encode_batch_event(event: BatchEvent) -> bytes:
    """The event as it is stored. Raises CodecError for what JSON cannot hold."""
    return _dumps({"v": SCHEMA_VERSION, "type": type(event).__name__, "event": event})


def decode_batch_event(data: bytes) -> BatchEvent:
    """The event that :func:`encode_batch_event` wrote. Raises CodecError for anything else."""
    stored = _loads(data)
    adapter = _TYPES.get(str(stored.get("type")))
    if adapter is None:
        raise CodecError("a stored batch event of unknown type")
    return _validated(adapter, stored.get("event"))


def encode_batch(batch: BatchSnapshot) -> bytes:
    """Where a batch stands, as it is stored beside its events."""
    return _dumps({"v": SCHEMA_VERSION, "batch": batch})


def decode_batch(data: bytes) -> BatchSnapshot:
    """The state that :func:`encode_batch` wrote. Raises CodecError for anything else."""
    return _validated(_BATCH, _loads(data).get("batch"))


def _dumps(stored: dict[str, object]) -> bytes:
    try:
        return orjson.dumps(stored)
    except orjson.JSONEncodeError as exc:
        raise CodecError(f"a batch cannot be written: {exc}") from None


def _loads(data: bytes) -> dict[str, Any]:
    try:
        stored = orjson.loads(data)
    except orjson.JSONDecodeError:
        raise CodecError("a stored batch is not JSON") from None
    if not isinstance(stored, dict) or stored.get("v") != SCHEMA_VERSION:
        raise CodecError("a stored batch of unknown version")
    return stored


def _validated(adapter: TypeAdapter[T], values: object) -> T:
    try:
        return adapter.validate_python(values)
    except ValidationError as exc:
        places = {".".join(map(str, error["loc"])) or "itself" for error in exc.errors(include_input=False)}
        raise CodecError(f"a stored batch is damaged at: {', '.join(sorted(places))}") from None
