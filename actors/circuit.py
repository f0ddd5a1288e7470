"""Targets that keep failing are left alone for a while. Pure: ``now`` is a parameter, in trio's seconds.

::

    closed --failures in a row--> open --open_s--> half open --the probe succeeds--> closed
                                    ^                  |
                                    +--the probe fails-+

A closed circuit lets everything through, an open one nothing, a half-open one a single probe; while that is
out nobody else passes. Only failures that speak of the target's health count
(:data:`actors.retry.UNHEALTHY`); what is cancelled, or refused for the request's sake, says nothing.

Only targets that have failed are remembered, at most ``MAX_TARGETS`` of them: models are named by clients.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from math import inf

MAX_TARGETS = 1024
"""Circuits remembered; the one whose last failure is the oldest is forgotten first."""

TargetKey = tuple[str, str]
"""Names of the provider and of the model there."""


class CircuitState(StrEnum):
    """What a circuit lets through."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


@dataclass(frozen=True, slots=True, kw_only=True)
class CircuitPolicy:
    """When a circuit opens, and for how long. Seconds."""

    failures: int = 10
    """In a row."""
    open_s: float = 30.0


@dataclass(slots=True)
class _Circuit:
    failures: int = 0
    opened_at: float | None = None
    """None: closed."""
    probing: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CircuitReport:
    """A circuit that is not closed, for people."""

    provider: str
    model: str
    state: CircuitState
    retry_in_s: float
    """Until it is half open; 0 once it is."""


class Circuits:
    """The circuits of all targets. Synchronous."""

    def __init__(self, policy: CircuitPolicy) -> None:
        self._policy = policy
        # In the order of their last failure.
        self._circuits: dict[TargetKey, _Circuit] = {}
        self._served_at: dict[str, float] = {}

    def __len__(self) -> int:
        """How many targets are remembered."""
        return len(self._circuits)

    def state(self, key: TargetKey, now: float) -> CircuitState:
        """What the target's circuit lets through at ``now``."""
        circuit = self._circuits.get(key)
        if circuit is None or circuit.opened_at is None:
            return CircuitState.CLOSED
        return CircuitState.OPEN if now < circuit.opened_at + self._policy.open_s else CircuitState.HALF_OPEN

    def retry_in_s(self, key: TargetKey, now: float) -> float:
        """Seconds until the target may be asked again; 0 where it may be now, also as a probe.

        While a probe is out it counts as if that failed at once.
        """
        circuit = self._circuits.get(key)
        if circuit is None or circuit.opened_at is None:
            return 0.0
        left_s = circuit.opened_at + self._policy.open_s - now
        if left_s > 0:
            return left_s
        return self._policy.open_s if circuit.probing else 0.0

    def enter(self, key: TargetKey, now: float) -> CircuitState:
        """Ask for leave to ask the target. OPEN: refused.

        Otherwise one of those below follows, whatever happens, and is told whether this was a probe
        (HALF_OPEN).
        """
        circuit = self._circuits.get(key)
        if circuit is None or circuit.opened_at is None:
            return CircuitState.CLOSED
        if self.retry_in_s(key, now) > 0:
            return CircuitState.OPEN
        circuit.probing = True
        return CircuitState.HALF_OPEN

    def answering(self, key: TargetKey) -> None:
        """A probe is being answered, which may take long: others may pass, and one failure opens it again."""
        circuit = self._circuits.get(key)
        if circuit is not None:
            circuit.opened_at, circuit.probing = None, False
            circuit.failures = self._policy.failures - 1

    def succeeded(self, key: TargetKey, now: float) -> None:
        """The target answered to the end."""
        if self._circuits:
            self._served_at[key[0]] = now
            if self._circuits.pop(key, None) is not None and not self._circuits:
                self._served_at.clear()

    def failed(self, key: TargetKey, now: float, *, probe: bool) -> bool:
        """The target failed in a way that speaks of its health; whether its circuit opened by that."""
        circuit = self._circuits.pop(key, None) or _Circuit()
        self._circuits[key] = circuit
        if len(self._circuits) > MAX_TARGETS:
            del self._circuits[next(iter(self._circuits))]
        circuit.failures += 1
        if probe:
            circuit.probing = False
        elif circuit.opened_at is not None:
            # It was asked before the circuit opened.
            return False
        if not probe and circuit.failures < self._policy.failures:
            return False
        circuit.opened_at = now
        return True

    def said_nothing(self, key: TargetKey, *, probe: bool) -> None:
        """The call ended without telling anything of the target: a probe that does so may be repeated."""
        circuit = self._circuits.get(key)
        if probe and circuit is not None:
            circuit.probing = False

    def reports(self, now: float) -> Iterator[CircuitReport]:
        """Every circuit that is not closed, the one that failed last at the end."""
        for key, circuit in self._circuits.items():
            if circuit.opened_at is not None:
                left_s = max(circuit.opened_at + self._policy.open_s - now, 0.0)
                yield CircuitReport(
                    provider=key[0], model=key[1], state=self.state(key, now), retry_in_s=left_s
                )

    def down(self, provider: str, now: float) -> bool:
        """Whether none of the provider's targets can be asked, as far as is known.

        So it is while one of its circuits is open and no target of it has answered since that opened. A
        half-open one can be asked.
        """
        opened = [
            circuit.opened_at
            for key, circuit in self._circuits.items()
            if key[0] == provider and circuit.opened_at is not None
        ]
        still_open = [at for at in opened if now < at + self._policy.open_s]
        return (
            bool(opened)
            and len(still_open) == len(opened)
            and self._served_at.get(provider, -inf) < min(opened)
        )
