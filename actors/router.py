"""Model name -> where it is answered, in the order of trying. The first route that matches wins."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import accumulate
from random import Random

from actors.errors import NoSuchModelError
from actors.providers.base import Provider


@dataclass(frozen=True, slots=True)
class RouteTarget:
    """One of the targets of a route."""

    provider: str
    model: str | None = None
    """What the upstream calls the model; default: what the client called it."""
    weight: float = 0.0
    """Its share of the jobs whose first try it gets, in proportion to the others'. 0: a fallback only."""


@dataclass(frozen=True, slots=True)
class Route:
    """One ``[[routes]]`` table: either one provider, or ``targets``."""

    pattern: str
    """A glob over model names (``*``, ``?``, ``[...]``), case-sensitive."""
    provider: str = ""
    rename: str | None = None
    """What the upstream calls the model; default: what the client called it."""
    targets: tuple[RouteTarget, ...] = ()
    """In the order of trying, but for the first, which is drawn by weight where there are weights."""
    fallbacks: tuple[str, ...] = ()
    """What is tried after them: ``PROVIDER/MODEL``, or ``PROVIDER`` for the same model."""

    @property
    def choices(self) -> tuple[RouteTarget, ...]:
        """Every target, in the order in which it is written."""
        after = [name.partition("/") for name in self.fallbacks]
        return (
            *(self.targets or (RouteTarget(self.provider, self.rename),)),
            *(RouteTarget(provider, model or None) for provider, _, model in after),
        )


@dataclass(frozen=True, slots=True)
class Target:
    """A provider and the model's name there."""

    provider: Provider
    model: str

    @property
    def key(self) -> tuple[str, str]:
        """The names of both: what its health is kept under."""
        return self.provider.name, self.model


class _Choices:
    """The targets of a route, their providers looked up."""

    __slots__ = ("_sums", "pattern", "targets")

    def __init__(self, route: Route, providers: Mapping[str, Provider]) -> None:
        self.pattern = route.pattern
        self.targets = [(providers[choice.provider], choice.model) for choice in route.choices]
        sums = tuple(accumulate(choice.weight for choice in route.choices))
        self._sums = sums if len(sums) > 1 and sums[-1] > 0 else ()

    def candidates(self, model: str, random: Random) -> list[Target]:
        found = [Target(provider, name or model) for provider, name in self.targets]
        if self._sums:
            drawn = random.random() * self._sums[-1]
            # random() is below 1, so one of the sums is beyond what was drawn.
            first = next(index for index, total in enumerate(self._sums) if drawn < total)
            found.insert(0, found.pop(first))
        return found


class Router:
    """Resolves models. ``provider/model`` picks a provider by name before any glob is tried."""

    def __init__(
        self, routes: Sequence[Route], providers: Mapping[str, Provider], *, random: Random | None = None
    ) -> None:
        """``random`` draws among weighted targets."""
        self._routes = tuple(_Choices(route, providers) for route in routes)
        self.providers = providers
        self._random = random or Random()  # noqa: S311 - it shares out load, it keeps no secret

    def resolve(self, model: str) -> Target:
        """Where a single call for the model goes. Raises NoSuchModelError."""
        return self.candidates(model)[0]

    def candidates(self, model: str, fallbacks: Sequence[str] = ()) -> list[Target]:
        """The targets of a model in the order of trying, each once, at least one.

        ``fallbacks`` are models to be tried after it, resolved by the same rules. Raises NoSuchModelError
        where any of them leads nowhere.
        """
        found = self._candidates(model)
        if fallbacks:
            found += [target for name in fallbacks for target in self._candidates(name)]
        if len(found) == 1:
            return found
        once: dict[tuple[str, str], Target] = {}
        for target in found:
            once.setdefault(target.key, target)
        return list(once.values())

    def _candidates(self, model: str) -> list[Target]:
        name, slash, rest = model.partition("/")
        if slash and rest and name in self.providers:
            return [Target(self.providers[name], rest)]
        for choices in self._routes:
            if fnmatchcase(model, choices.pattern):
                return choices.candidates(model, self._random)
        raise NoSuchModelError(f"model: {model}")
