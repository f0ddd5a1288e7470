"""Where settings come from, and how the place of a value is named.

Four sources, the later beats the earlier: the TOML file, the platform's ``PORT``, ``MESSAGESD_*``
variables, command line flags. A source keeps its values apart so that an error can say which of them
it is about.
"""

import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, EnvSettingsSource

ENV_PREFIX = "MESSAGESD_"
ENV_DELIMITER = "__"
CONFIG_VARIABLE = "MESSAGESD_CONFIG"
DEFAULT_CONFIG = Path("messagesd.toml")

Location = tuple[int | str, ...]
"""The path of a value: ``("providers", 0, "base_url")``."""


class Problem(NamedTuple):
    """One thing that is wrong with the configuration."""

    place: str
    """Which source, and where in it: ``messagesd.toml: jobs.drain_s``, ``environment: PORT``, ``--port``."""
    message: str

    def __str__(self) -> str:
        return f"{self.place}: {self.message}"


class SettingsError(Exception):
    """The configuration cannot be used. Carries every problem found; never shows a secret."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


@dataclass(frozen=True, slots=True)
class Source:
    """The values one source gave, and its way to name a location."""

    values: Mapping[str, Any]
    place: Callable[[Location], str]

    def depth(self, location: Location) -> int:
        """How many leading steps of ``location`` this source has a value for."""
        here: Any = self.values
        for depth, step in enumerate(location):
            try:
                here = here[step]
            except (KeyError, IndexError, TypeError):
                return depth
        return len(location)


def dotted(location: Location) -> str:
    """``("providers", 0, "name")`` as ``providers[0].name``."""
    text = ""
    for step in location:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text


def name_place(sources: Sequence[Source], location: Location) -> str:
    """The place of ``location``; ``sources`` come with the strongest first.

    The source that knows most of the path is meant; a value that nobody gave is named bare.
    """
    depth, _, source = max((s.depth(location), -n, s) for n, s in enumerate(sources))
    return source.place(location) if depth else dotted(location)


def merge(sources: Sequence[Source]) -> dict[str, Any]:
    """One tree of values; ``sources`` come with the strongest first. Tables are merged, lists replaced."""
    merged: dict[str, Any] = {}
    for source in reversed(sources):
        _merge_into(merged, source.values)
    return merged


def _merge_into(target: dict[str, Any], values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, Mapping):
            below = target.get(key)
            target[key] = dict(below) if isinstance(below, Mapping) else {}
            _merge_into(target[key], value)
        else:
            target[key] = value


def read_file(config_path: Path | None, environ: Mapping[str, str]) -> Source:
    """The TOML file: ``config_path``, or ``MESSAGESD_CONFIG``, or ``messagesd.toml`` where there is one.

    Raises :class:`SettingsError` for a named file that cannot be read, and for text that is not TOML
    (with line and column).
    """
    named_by_env = environ.get(CONFIG_VARIABLE)
    path = config_path or (Path(named_by_env) if named_by_env else DEFAULT_CONFIG)
    named = config_path is not None or bool(named_by_env)
    asked_by = f"environment: {CONFIG_VARIABLE}" if config_path is None else "--config"
    try:
        # A byte order mark is what some editors leave; TOML itself knows none.
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        if named:
            raise SettingsError([Problem(asked_by, f"no such file: {path}")]) from None
        values = {}
    except OSError as error:
        raise SettingsError([Problem(str(path), f"cannot be read: {error.strerror}")]) from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise SettingsError([Problem(str(path), f"is not UTF-8 (at line {line})")]) from None
    except tomllib.TOMLDecodeError as error:
        raise SettingsError([Problem(str(path), str(error))]) from None
    return Source(values, lambda location: f"{path}: {dotted(location)}")


class _Environment(EnvSettingsSource):
    """``MESSAGESD_SECTION__OPTION=value`` and ``MESSAGESD_SECTION=JSON``, from a given mapping."""

    def __init__(self, settings_cls: type[BaseSettings], environ: Mapping[str, str]) -> None:
        self._environ = {name.lower(): value for name, value in environ.items() if value}
        self.problems: list[Problem] = []
        super().__init__(settings_cls, env_prefix=ENV_PREFIX, env_nested_delimiter=ENV_DELIMITER)

    def _load_env_vars(self) -> Mapping[str, str | None]:
        return self._environ

    def decode_complex_value(self, field_name: str, field: FieldInfo | None, value: Any) -> Any:
        try:
            return super().decode_complex_value(field_name, field, value)  # type: ignore[arg-type]  # None is passed by the base itself
        except ValueError:
            self.problems.append(
                Problem(f"environment: {ENV_PREFIX}{field_name.upper()}", "is not valid JSON")
            )
            return {}


def read_environment(
    settings_cls: type[BaseSettings], environ: Mapping[str, str]
) -> tuple[Source, list[Problem]]:
    """The ``MESSAGESD_*`` variables; an empty one counts as unset.

    Names without ``__`` that are no section are left alone: a platform may make up
    ``MESSAGESD_SERVICE_HOST`` and the like for a service of this name.
    """
    reader = _Environment(settings_cls, environ)
    values = reader()
    names = {name.upper() for name in environ}
    problems = reader.problems
    for name in sorted(names):
        section, nested, _ = name.removeprefix(ENV_PREFIX).partition(ENV_DELIMITER)
        if name.startswith(ENV_PREFIX) and nested and section.lower() not in settings_cls.model_fields:
            problems.append(Problem(f"environment: {name}", f"no section is named {section.lower()!r}"))

    def place(location: Location) -> str:
        for end in range(len(location), 0, -1):
            name = ENV_PREFIX + ENV_DELIMITER.join(str(step).upper() for step in location[:end])
            if name in names:
                rest = dotted(location[end:])
                return f"environment: {name}" + (f": {rest}" if rest else "")
        return f"environment: {dotted(location)}"

    return Source(values, place), problems


def read_flags(host: str | None, port: int | None) -> Source:
    """``--host`` and ``--port``."""
    given = {name: value for name, value in (("host", host), ("port", port)) if value is not None}
    return Source({"server": given} if given else {}, lambda location: f"--{location[-1]}")


def read_port(environ: Mapping[str, str], stronger: Sequence[Source], weaker: Source) -> Source:
    """``PORT``, as Procfile platforms set it: that port, on all interfaces.

    A port set on purpose (``--port``, ``MESSAGESD_SERVER__PORT``) makes it void; a host set on purpose
    (anywhere) is kept, and so is loopback where ``--port`` or ``--host`` was given.
    """
    port = environ.get("PORT")
    if not port or any(source.depth(("server", "port")) == 2 for source in stronger):
        return Source({}, dotted)
    server: dict[str, Any] = {"port": port}
    if all(source.depth(("server", "host")) < 2 for source in (*stronger, weaker)):
        server["host"] = "0.0.0.0"  # noqa: S104 - what such a platform routes to; a key is required then
    return Source({"server": server}, lambda _: "environment: PORT")
