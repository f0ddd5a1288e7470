"""Keys of a provider: drawn by weight, left alone where they are not taken, never shown."""

from collections import Counter
from random import Random

import pytest
import trio
from pydantic import SecretStr, ValidationError
from trio.testing import MockClock

from actors.providers.keys import ANY_MODEL, MAX_COOLDOWN_S, MAX_COOLING, Key, KeyRing, keys_of
from actors.providers.options import AnthropicOptions

THREE = [Key("a", "sk-a", 2), Key("b", "sk-b"), Key("c", "sk-c")]


def drawn(ring: KeyRing, times: int = 400, model: str = "m") -> Counter[str]:
    return Counter(ring.pick(model) for _ in range(times))


async def test_drawn_by_weight() -> None:
    counts = drawn(KeyRing(THREE, random=Random(1)), 1000)
    assert set(counts) == {"a", "b", "c"}
    assert 440 < counts["a"] < 560


async def test_left_alone_for_a_while(autojump_clock: MockClock) -> None:
    ring = KeyRing(THREE, cooldown_s=60, random=Random(1))
    ring.cool("a", ANY_MODEL, None)
    ring.cool("b", "m", 10)
    assert set(drawn(ring)) == {"c"}
    assert set(drawn(ring, model="other")) == {"b", "c"}
    assert ring.cooling() == 2
    await trio.sleep(10)
    assert set(drawn(ring)) == {"b", "c"}
    await trio.sleep(50)
    assert set(drawn(ring)) == {"a", "b", "c"}
    assert ring.cooling() == 0


async def test_when_all_cool_down_the_first_to_be_free_is_used(autojump_clock: MockClock) -> None:
    ring = KeyRing(THREE)
    for name, seconds in (("a", 30), ("b", 20), ("c", 40)):
        ring.cool(name, "m", seconds)
    assert not ring.ready("m")
    assert ring.ready("other")
    assert ring.pick("m") == "b"
    await trio.sleep(20)
    assert ring.ready("m")


async def test_a_shorter_rest_does_not_end_a_longer_one(autojump_clock: MockClock) -> None:
    ring = KeyRing(THREE[:1])
    ring.cool("a", "m", 100)
    ring.cool("a", "m", 1)
    await trio.sleep(50)
    assert not ring.ready("m")
    ring.cool("a", "m", 1e9)
    await trio.sleep(MAX_COOLDOWN_S)
    assert ring.ready("m")


async def test_no_key_and_one_key() -> None:
    assert KeyRing().pick("m") == ""
    assert KeyRing().ready("m")
    ring = KeyRing(THREE[:1])
    ring.cool("unknown", "m", 10)
    assert ring.ready("m")
    ring.cool("a", "m", 10)
    assert ring.pick("m") == "a"


async def test_memory_is_bounded() -> None:
    ring = KeyRing(THREE)
    for number in range(MAX_COOLING + 50):
        ring.cool("a", str(number), 60)
    assert len(ring._until) == MAX_COOLING


def test_a_table_may_have_one_key_and_several() -> None:
    options = AnthropicOptions.model_validate(
        {
            "name": "p",
            "api_key": "sk-1",
            "key_name": "old",
            "api_keys": [{"name": "new", "key": "sk-2", "weight": 3}],
        }
    )
    assert [(key.name, key.secret, key.weight) for key in keys_of(options)] == [
        ("old", "sk-1", 1),
        ("new", "sk-2", 3),
    ]
    assert "sk-2" not in repr(options) + repr(keys_of(options))
    assert keys_of(AnthropicOptions(name="p", api_key=SecretStr(""))) == ()


@pytest.mark.parametrize(
    "keys",
    [
        [{"name": "a", "key": "x"}] * 2,
        [{"name": "default", "key": "x"}],
        [{"name": "a", "key": "x", "weight": 0}],
    ],
)
def test_names_are_unique_and_weights_positive(keys: list[dict[str, object]]) -> None:
    with pytest.raises(ValidationError) as error:
        AnthropicOptions.model_validate({"name": "p", "api_key": "sk-secret", "api_keys": keys})
    assert "sk-secret" not in str(error.value.errors(include_input=False))
