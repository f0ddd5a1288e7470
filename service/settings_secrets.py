"""Secrets of the configuration that stand in the environment: ``env:NAME``."""

from collections.abc import Mapping
from typing import Any

from service.settings_sources import Location


def resolve_secrets(values: dict[str, Any], environ: Mapping[str, str]) -> list[tuple[Location, str]]:
    """Put the variable's value where ``env:NAME`` stands; return what could not be."""
    problems: list[tuple[Location, str]] = []
    for table, field in (("keys", "key"), ("providers", "api_key"), ("webhooks", "secrets")):
        problems += _resolve_field(values, table, (table,), field, environ)
    providers = values.get("providers")
    for index, provider in enumerate(providers if isinstance(providers, list) else ()):
        if isinstance(provider, dict):
            problems += _resolve_field(provider, "api_keys", ("providers", index, "api_keys"), "key", environ)
    return problems


def _resolve_field(
    values: dict[str, Any],
    table: str,
    location: Location,
    field: str,
    environ: Mapping[str, str],
) -> list[tuple[Location, str]]:
    """The same for one field (or each of a list) of every item of a table; items are copied, not changed."""
    problems: list[tuple[Location, str]] = []

    def resolved(written: object, place: Location) -> object:
        if not isinstance(written, str) or not written.startswith("env:"):
            return written
        name = written.removeprefix("env:")
        if environ.get(name):
            return environ[name]
        problems.append((place, f"the environment variable {name!r} is not set"))
        return written

    items = values.get(table)
    if not isinstance(items, list):
        return problems
    values[table] = items = [dict(item) if isinstance(item, Mapping) else item for item in items]
    for index, item in enumerate(items):
        if not isinstance(item, dict) or field not in item:
            continue
        place = (*location, index, field)
        if isinstance(item[field], list):
            item[field] = [resolved(one, (*place, number)) for number, one in enumerate(item[field])]
        else:
            item[field] = resolved(item[field], place)
    return problems
