"""The keys of one provider: drawn by weight, and left alone for a while when the upstream does not take them.

A 401 is about the key, whatever the model; 403 and 429 may be about the key and one model, since permissions
and rate limits are counted so. Nothing here is ever shown: events, logs and metrics have names only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from random import Random

import trio

from actors.providers.options import KeyedOptions

MAX_COOLDOWN_S = 3600.0
"""However long the upstream asks for."""
MAX_COOLING = 1024
"""Pairs of key and model remembered; the oldest go first. Models are named by clients."""

ANY_MODEL = ""
"""Stands for every model."""


@dataclass(frozen=True, slots=True)
class Key:
    """One key, by its name."""

    name: str
    secret: str
    weight: float = 1.0

    def __repr__(self) -> str:
        return f"Key({self.name!r})"


class KeyRing:
    """The names of a provider's keys and which of them can be used. Synchronous; seconds are trio's."""

    def __init__(
        self, keys: Sequence[Key] = (), *, cooldown_s: float = 60.0, random: Random | None = None
    ) -> None:
        """``cooldown_s``: how long a key is left alone when the upstream does not say. ``random`` draws."""
        self._keys = tuple(keys)
        self._cooldown_s = cooldown_s
        self._random = random or Random()  # noqa: S311 - it shares out load, it keeps no secret
        self._until: dict[tuple[str, str], float] = {}

    def __len__(self) -> int:
        """How many keys there are."""
        return len(self._keys)

    def pick(self, model: str) -> str:
        """The name of the key to use; empty where there are none.

        Drawn by weight among those that are not cooling down. When all are, the one that is free first: an
        upstream's own answer says more than ours could.
        """
        if len(self._keys) < 2:
            return self._keys[0].name if self._keys else ""
        now = trio.current_time()
        ready = [key for key in self._keys if self._free_at(key.name, model) <= now]
        if not ready:
            return min(self._keys, key=lambda key: self._free_at(key.name, model)).name
        sums = list(accumulate(key.weight for key in ready))
        drawn = self._random.random() * sums[-1]
        return next(key.name for key, total in zip(ready, sums, strict=True) if drawn < total)

    def ready(self, model: str) -> bool:
        """Whether a key can be used now, or none is needed."""
        if not self._until:
            return True
        now = trio.current_time()
        return any(self._free_at(key.name, model) <= now for key in self._keys) or not self._keys

    def ready_in_s(self, model: str) -> float:
        """Seconds, to the microsecond, until a key can be used; 0: now."""
        if self.ready(model):
            return 0.0
        return round(min(self._free_at(key.name, model) for key in self._keys) - trio.current_time(), 6)

    def cool(self, name: str, model: str, asked_s: float | None) -> None:
        """Leave a key alone for ``asked_s`` (None: the default), for ``model`` or :data:`ANY_MODEL`."""
        if not any(key.name == name for key in self._keys):
            return
        seconds = min(self._cooldown_s if asked_s is None else asked_s, MAX_COOLDOWN_S)
        free_at = trio.current_time() + seconds
        before = self._until.pop((name, model), free_at)
        self._until[name, model] = max(before, free_at)
        if len(self._until) > MAX_COOLING:
            del self._until[next(iter(self._until))]

    def cooling(self) -> int:
        """How many keys are cooling down for some model."""
        now = trio.current_time()
        self._until = {pair: at for pair, at in self._until.items() if at > now}
        return len({name for name, _ in self._until})

    def _free_at(self, name: str, model: str) -> float:
        return max(self._until.get((name, ANY_MODEL), 0.0), self._until.get((name, model), 0.0))


def keys_of(options: KeyedOptions) -> tuple[Key, ...]:
    """The keys of a ``[[providers]]`` table, ``api_key`` first."""
    single = options.api_key.get_secret_value() if options.api_key else ""
    keys = [Key(options.key_name, single)] if single else []
    keys += [Key(key.name, key.key.get_secret_value(), key.weight) for key in options.api_keys]
    return tuple(keys)
