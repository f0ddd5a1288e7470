"""``fallbacks`` of a request: names for the gateway to try, beside what the Messages API means by it.

Strings are models of ours. Objects, and the string ``default``, are the API's own way to name models that the
upstream falls back to: they stay in the body, and mean nothing to upstreams of another protocol.
"""

from collections.abc import Mapping
from typing import Any

from actors.providers.splice import without_items

FIELD = "fallbacks"
UPSTREAMS_OWN = "default"


def own_fallbacks(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """The models a request names for us to fall back to, in order; usually none."""
    named = fields.get(FIELD)
    return tuple(filter(_is_own, named)) if isinstance(named, list) else ()


def drop_fallbacks(body: bytes) -> bytes:
    """The body without those names; every other byte stays. Raises ValueError for no JSON object."""
    return without_items(body, FIELD, _is_own)


def _is_own(item: object) -> bool:
    return isinstance(item, str) and item != UPSTREAMS_OWN
