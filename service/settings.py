"""What the operator can set: read once, checked as a whole, frozen.

:func:`load` is the one entrance, and the only place of the daemon that is given the environment. Sizes are
in bytes, durations in seconds.
"""

import glob
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import (
    HttpUrl,
    PrivateAttr,
    SecretStr,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from actors.providers.options import (
    AnthropicOptions,
    EchoOptions,
    LocalOptions,
    OpenaiOptions,
    ProviderOptions,
)
from actors.webhooks.options import WebhookOptions
from service.settings_secrets import resolve_secrets
from service.settings_sections import (
    AuthSettings,
    BatchesSettings,
    CircuitsSettings,
    FieldError,
    JobsSettings,
    KeySettings,
    LoggingSettings,
    LogSettings,
    RetriesSettings,
    RouteSettings,
    ServerSettings,
    check_log_url,
    is_loopback,
    key_hash,
)
from service.settings_sources import (
    ENV_DELIMITER,
    ENV_PREFIX,
    Location,
    Problem,
    SettingsError,
    Source,
    merge,
    name_place,
    read_environment,
    read_file,
    read_flags,
    read_port,
)

__all__ = [
    "AuthSettings",
    "BatchesSettings",
    "JobsSettings",
    "KeySettings",
    "LogSettings",
    "LoggingSettings",
    "Problem",
    "RouteSettings",
    "ServerSettings",
    "Settings",
    "SettingsError",
    "check_log_url",
    "derive_routes",
    "describe",
    "is_loopback",
    "key_hash",
    "load",
]

_URL = TypeAdapter(HttpUrl)
_PROVIDER: TypeAdapter[ProviderOptions] = TypeAdapter(ProviderOptions)
OPENAI_MODELS = ("gpt-*", "chatgpt-*", "o[1-9]*")
"""Globs over the names of OpenAI's models."""


def _duplicates(names: Sequence[str]) -> list[tuple[Location, str]]:
    return [
        ((index, "name"), f"{name!r} is used twice")
        for index, name in enumerate(names)
        if name in names[:index]
    ]


def derive_routes(providers: Sequence[ProviderOptions]) -> tuple[RouteSettings, ...]:
    """The routes where none are configured.

    Models a provider lists go to it; ``claude-*`` goes to the first provider of kind ``anthropic``, OpenAI's
    own names (``gpt-*``, ``chatgpt-*``, ``o1*`` ...) to the first of kind ``openai``; everything else goes to
    the first provider.
    """
    listed = [
        RouteSettings(model=glob.escape(model), provider=provider.name)
        for provider in providers
        for model in provider.models
    ]
    claude = [
        RouteSettings(model="claude-*", provider=provider.name)
        for provider in providers
        if isinstance(provider, AnthropicOptions)
    ]
    openai = next((provider.name for provider in providers if isinstance(provider, OpenaiOptions)), None)
    gpt = [RouteSettings(model=pattern, provider=openai) for pattern in OPENAI_MODELS] if openai else []
    return (*listed, *claude[:1], *gpt, RouteSettings(model="*", provider=providers[0].name))


class Settings(BaseSettings):
    """The whole configuration. ``Settings(...)`` reads nothing but its arguments: for files, :func:`load`."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        hide_input_in_errors=True,
        env_prefix=ENV_PREFIX,
        env_nested_delimiter=ENV_DELIMITER,
    )

    server: ServerSettings = ServerSettings()
    auth: AuthSettings = AuthSettings()
    jobs: JobsSettings = JobsSettings()
    batches: BatchesSettings = BatchesSettings()
    log: LogSettings = LogSettings()
    logging: LoggingSettings = LoggingSettings()
    retries: RetriesSettings = RetriesSettings()
    circuits: CircuitsSettings = CircuitsSettings()
    keys: tuple[KeySettings, ...] = ()
    providers: tuple[ProviderOptions, ...] = (EchoOptions(name="echo"),)
    routes: tuple[RouteSettings, ...] = ()
    """Never empty once read: see :func:`derive_routes`."""
    webhooks: tuple[WebhookOptions, ...] = ()
    _notices: tuple[str, ...] = PrivateAttr(())

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments only: :func:`load` has merged the other sources, and knows where each value was."""
        return (init_settings,)

    @property
    def notices(self) -> tuple[str, ...]:
        """What the operator should be told at start, a sentence each."""
        return self._notices

    @field_validator("keys")
    @classmethod
    def _check_keys(cls, keys: tuple[KeySettings, ...], info: ValidationInfo) -> tuple[KeySettings, ...]:
        problems = _duplicates([key.name for key in keys])
        hashes = [key.hash for key in keys]
        problems += [
            ((index,), f"the same key as {keys[hashes.index(value)].name!r}")
            for index, value in enumerate(hashes)
            if value in hashes[:index]
        ]
        server, auth = info.data.get("server"), info.data.get("auth")
        if server and auth and not keys and not auth.allow_anonymous and not is_loopback(server.host):
            message = (
                f"server.host {server.host} can be reached from other machines: configure at least one key "
                '("messagesd keys new NAME" makes one), or set auth.allow_anonymous = true'
            )
            problems.append(((), message))
        if problems:
            raise FieldError(problems)
        return keys

    @field_validator("providers")
    @classmethod
    def _check_providers(cls, providers: tuple[ProviderOptions, ...]) -> tuple[ProviderOptions, ...]:
        if not providers:
            raise ValueError("at least one provider is needed")
        if problems := _duplicates([provider.name for provider in providers]):
            raise FieldError(problems)
        return providers

    @field_validator("routes")
    @classmethod
    def _check_routes(
        cls, routes: tuple[RouteSettings, ...], info: ValidationInfo
    ) -> tuple[RouteSettings, ...]:
        providers = info.data.get("providers")
        if providers is None:
            return routes
        names = {provider.name for provider in providers}
        problems: list[tuple[Location, str]] = []
        for index, route in enumerate(routes):
            if route.provider is not None and route.provider not in names:
                problems.append(((index, "provider"), f"no provider is named {route.provider!r}"))
            problems += [
                ((index, "targets", place, "provider"), f"no provider is named {target.provider!r}")
                for place, target in enumerate(route.targets)
                if target.provider not in names
            ]
            for place, fallback in enumerate(route.fallbacks):
                if (name := fallback.partition("/")[0]) not in names:
                    problems.append(((index, "fallbacks", place), f"no provider is named {name!r}"))
        if problems:
            raise FieldError(problems)
        return routes or derive_routes(providers)

    @field_validator("webhooks")
    @classmethod
    def _check_webhooks(cls, webhooks: tuple[WebhookOptions, ...]) -> tuple[WebhookOptions, ...]:
        if problems := _duplicates([webhook.name for webhook in webhooks]):
            raise FieldError(problems)
        return webhooks


def _local_problem() -> str | None:
    """Why ``local`` cannot be used here; None if it can."""
    try:
        from actors.providers.local import (  # noqa: PLC0415 - needs an extra that may not be installed
            local_available,
        )
    except ImportError as error:
        return str(error)
    return local_available()


def _default_providers(
    port: str, environ: Mapping[str, str]
) -> tuple[tuple[ProviderOptions, ...], list[str]]:
    """The providers where none are configured, and what to tell about them; ``port`` is the daemon's own.

    ``local`` (``echo`` where it cannot be used), then ``anthropic`` and ``openai`` where
    ``ANTHROPIC_API_KEY`` and ``OPENAI_API_KEY`` are set. Raises :class:`SettingsError` for an
    ``ANTHROPIC_BASE_URL`` or ``OPENAI_BASE_URL`` that is no URL.
    """
    notices = []
    first: ProviderOptions = LocalOptions(name="local")
    if reason := _local_problem():
        notices.append(f"local is not available ({reason}): echo answers")
        first = EchoOptions(name="echo")
    providers = [first]
    for kind in ("anthropic", "openai"):
        if api_key := environ.get(f"{kind.upper()}_API_KEY"):
            variable = f"{kind.upper()}_BASE_URL"
            base_url = _base_url(variable, environ)
            if base_url is not None and _is_own(base_url, port):
                notices.append(f"{variable} is this daemon itself: {kind} is not configured")
                continue
            given: dict[str, Any] = {"name": kind, "kind": kind, "api_key": SecretStr(api_key)}
            if base_url is not None:
                given["base_url"] = base_url
            providers.append(_PROVIDER.validate_python(given))
    return tuple(providers), notices


def _base_url(variable: str, environ: Mapping[str, str]) -> HttpUrl | None:
    if not (base_url := environ.get(variable)):
        return None
    try:
        return _URL.validate_python(base_url)
    except ValidationError as error:
        raise SettingsError([Problem(f"environment: {variable}", error.errors()[0]["msg"])]) from None


def _is_own(url: HttpUrl, port: str) -> bool:
    """Whether a URL leads here: set for clients of this gateway, calling it would go round in circles."""
    return is_loopback((url.host or "").strip("[]")) and str(url.port) == port


def _build(values: Mapping[str, Any], environ: Mapping[str, str]) -> Settings:
    """Settings from merged values, defaults and notices included."""
    if "providers" in values:
        settings = Settings(**values)
        lazy = [p.name for p in settings.providers if isinstance(p, LocalOptions) and p.model_path is None]
        reason = _local_problem() if lazy else None
        notices = [f"{name} is not available ({reason}): its calls will fail" for name in lazy if reason]
    else:
        server = values.get("server")
        port = server.get("port") if isinstance(server, Mapping) else None
        own_port = str(ServerSettings().port if port is None else port)
        providers, notices = _default_providers(own_port, environ)
        settings = Settings(**values, providers=providers)
    # Frozen for everybody else: nobody has seen this object yet.
    settings._notices = tuple(notices)  # noqa: SLF001 - this module's own class
    return settings


_MESSAGES = {
    "extra_forbidden": "unknown option",
    "missing": "is required",
    "union_tag_not_found": "kind is required",
}


def _problems_of(error: ValidationError) -> list[tuple[Location, str]]:
    """Pydantic's errors as locations in the file's terms, without any value."""
    found: list[tuple[Location, str]] = []
    for item in error.errors(include_url=False, include_input=False):
        location: Location = item["loc"]
        if location[:1] == ("providers",):
            # The third step is the ``kind`` that chose the class; the file has no such level.
            location = (*location[:2], *location[3:])
        cause = item.get("ctx", {}).get("error")
        if isinstance(cause, FieldError):
            found += [((*location, *below), message) for below, message in cause.problems]
        else:
            message = _MESSAGES.get(item["type"], item["msg"].removeprefix("Value error, "))
            found.append((location, message))
    return found


def load(
    config_path: Path | None, environ: Mapping[str, str], host: str | None = None, port: int | None = None
) -> Settings:
    """Read the configuration: flags beat ``MESSAGESD_*`` variables, they beat ``PORT``, it beats the file.

    The file is ``config_path``, or what ``MESSAGESD_CONFIG`` names, or ``messagesd.toml`` in the working
    directory if it is there. Raises :class:`SettingsError` with every problem that could be found.
    """
    file = read_file(config_path, environ)
    environment, problems = read_environment(Settings, environ)
    flags = read_flags(host, port)
    strong = (flags, environment)
    sources: tuple[Source, ...] = (*strong, read_port(environ, strong, file), file)
    values = merge(sources)
    wrong = resolve_secrets(values, environ)
    settings = None
    try:
        settings = _build(values, environ)
    except ValidationError as error:
        wrong += [item for item in _problems_of(error) if item[0] not in {place for place, _ in wrong}]
    except SettingsError as error:
        problems += error.problems
    reported = {problem.place for problem in problems}
    found = [Problem(name_place(sources, location), message) for location, message in wrong]
    problems += [problem for problem in found if problem.place not in reported]
    if problems or settings is None:
        raise SettingsError(problems)
    return settings


_USERINFO = re.compile(r"(?<=://)[^/@\s]+@")


def _toml_value(value: object) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{name} = {_toml_value(item)}" for name, item in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    # What is left of the settings here (text, numbers, booleans) is spelt as JSON spells it.
    text = _USERINFO.sub("***@", value) if isinstance(value, str) else value
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def describe(settings: Settings) -> str:
    """The effective configuration as TOML, every secret masked and defaults written out."""
    lines: list[str] = []
    for section, content in settings.model_dump(mode="json", exclude_none=True).items():
        many = isinstance(content, list)
        for table in content if many else [content]:
            lines.append(f"[[{section}]]" if many else f"[{section}]")
            lines += [f"{name} = {_toml_value(value)}" for name, value in table.items() if value != []]
            lines.append("")
    return "\n".join(lines)
