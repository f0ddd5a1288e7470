"""Model names to targets."""

from collections import Counter
from collections.abc import Sequence
from random import Random

import pytest

from actors.errors import NoSuchModelError
from actors.router import Route, Router, RouteTarget
from tests.support.providers import FakeProvider

PROVIDERS = {name: FakeProvider(name=name) for name in ("big", "small", "claude-2")}


def resolved(routes: list[Route], model: str) -> tuple[str, str]:
    """Provider and model name of the target."""
    target = Router(routes, PROVIDERS).resolve(model)
    return target.provider.name, target.model


def test_the_first_match_wins() -> None:
    routes = [Route("claude-*", "big"), Route("claude-haiku", "small"), Route("*", "small")]
    assert resolved(routes, "claude-haiku") == ("big", "claude-haiku")
    assert resolved(routes, "other") == ("small", "other")


def test_a_route_may_rename() -> None:
    assert resolved([Route("fast", "small", "tiny-1")], "fast") == ("small", "tiny-1")


@pytest.mark.parametrize(
    ("pattern", "model", "matches"),
    [
        ("claude-?", "claude-3", True),
        ("claude-?", "claude-35", False),
        ("claude-[34]*", "claude-4-x", True),
        ("claude-*", "Claude-3", False),
        ("exact", "exactly", False),
        ("*", "with/slash", True),
    ],
)
def test_globs(pattern: str, model: str, matches: bool) -> None:
    router = Router([Route(pattern, "big")], PROVIDERS)
    if matches:
        assert router.resolve(model).provider.name == "big"
    else:
        with pytest.raises(NoSuchModelError):
            router.resolve(model)


def test_a_provider_can_be_named_whatever_the_routes_say() -> None:
    routes = [Route("*", "big", "renamed")]
    assert resolved(routes, "small/some-model") == ("small", "some-model")
    assert resolved([], "small/a/b") == ("small", "a/b")


@pytest.mark.parametrize("model", ["nobody/model", "small/", "/model", "small"])
def test_what_names_no_provider_goes_by_the_routes(model: str) -> None:
    assert resolved([Route("*", "big")], model) == ("big", model)
    with pytest.raises(NoSuchModelError) as error:
        Router([], PROVIDERS).resolve(model)
    assert error.value.failure.status == 404
    assert error.value.failure.type == "not_found_error"
    assert model in error.value.message


def test_a_provider_name_is_no_glob_and_no_prefix() -> None:
    assert resolved([Route("claude-*", "big")], "claude-2") == ("big", "claude-2")
    assert resolved([Route("claude-*", "big")], "claude-2/x") == ("claude-2", "x")


def tried(routes: list[Route], model: str, fallbacks: Sequence[str] = (), seed: int = 0) -> list[str]:
    """The targets in the order of trying, each as ``provider/model``."""
    router = Router(routes, PROVIDERS, random=Random(seed))
    return ["/".join(target.key) for target in router.candidates(model, fallbacks)]


def test_targets_are_tried_as_they_are_written() -> None:
    targets = (RouteTarget("small"), RouteTarget("big", "huge"), RouteTarget("claude-2"))
    route = Route("*", targets=targets, fallbacks=("big/spare", "claude-2", "small"))
    assert tried([route], "m") == ["small/m", "big/huge", "claude-2/m", "big/spare"]


def test_the_first_is_drawn_by_weight_and_the_others_follow_in_order() -> None:
    targets = (RouteTarget("small", weight=3), RouteTarget("big", weight=1), RouteTarget("claude-2"))
    orders = Counter(tuple(tried([Route("*", targets=targets)], "m", seed=seed)) for seed in range(1000))
    assert set(orders) == {("small/m", "big/m", "claude-2/m"), ("big/m", "small/m", "claude-2/m")}
    assert 700 < orders["small/m", "big/m", "claude-2/m"] < 800


def test_fallbacks_of_a_request_follow_by_the_same_rules() -> None:
    routes = [Route("fast", "small", "tiny"), Route("*", "big", fallbacks=("claude-2",))]
    assert tried(routes, "m", ["fast", "claude-2/x", "m"]) == [
        "big/m",
        "claude-2/m",
        "small/tiny",
        "claude-2/x",
    ]
    with pytest.raises(NoSuchModelError, match="nowhere"):
        Router(routes[:1], PROVIDERS).candidates("fast", ["nowhere"])


def test_the_named_provider_has_no_fallbacks_of_a_route() -> None:
    assert tried([Route("*", "big", fallbacks=("small",))], "big/m") == ["big/m"]
