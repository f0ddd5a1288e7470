"""Model name -> where it is answered. Pure; the first route that matches wins."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from actors.errors import NoSuchModelError
from actors.providers.base import Provider


@dataclass(frozen=True, slots=True)
class Route:
    """One ``[[routes]]`` table."""

    pattern: str
    """A glob over model names (``*``, ``?``, ``[...]``), case-sensitive."""
    provider: str
    rename: str | None = None
    """What the upstream calls the model; default: what the client called it."""


@dataclass(frozen=True, slots=True)
class Target:
    """A provider and the model's name there."""

    provider: Provider
    model: str


class Router:
    """Resolves models. ``provider/model`` picks a provider by name before any glob is tried."""

    def __init__(self, routes: Sequence[Route], providers: Mapping[str, Provider]) -> None:
        self._routes = tuple(routes)
        self.providers = providers

    def resolve(self, model: str) -> Target:
        """The target of a model. Raises NoSuchModelError."""
        name, slash, rest = model.partition("/")
        if slash and rest and name in self.providers:
            return Target(self.providers[name], rest)
        for route in self._routes:
            if fnmatchcase(model, route.pattern):
                return Target(self.providers[route.provider], route.rename or model)
        raise NoSuchModelError(f"model: {model}")
