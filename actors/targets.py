"""What is known of the targets: circuits, keys, places. And the course of one job through them.

The decisions are pure (:mod:`actors.retry`, :mod:`actors.circuit`); here they meet what they are about. All
of it is synchronous but for waiting in line.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random

import structlog
import trio

from actors.circuit import CircuitPolicy, CircuitReport, Circuits, CircuitState
from actors.clock import Clock
from actors.errors import NoSuchModelError, NoTargetError, ProviderError, UnsupportedError
from actors.line import Line, Turn
from actors.providers.base import Provider, ProviderCall
from actors.providers.keys import ANY_MODEL, KeyRing
from actors.retry import KEY_FAILURES, UNHEALTHY, Decision, RetryPolicy, Standing, decide, retry_after_s
from actors.router import Router, Target
from actors.telemetry import Telemetry
from events.types import Failure, Mode, NextStep

DEFAULT_CONCURRENCY = 10_000
"""Jobs at work at a provider that does not say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProviderReport:
    """Where a provider stands."""

    provider: str
    working: int
    """Jobs that have a place."""
    waiting: int
    """Jobs that wait for one."""
    cooling_keys: int
    down: bool
    """None of its targets can be asked, as far as is known."""


class Targets:
    """The targets of all jobs. One per gateway."""

    def __init__(
        self,
        *,
        router: Router,
        clock: Clock,
        telemetry: Telemetry,
        logger: structlog.typing.FilteringBoundLogger,
        retries: RetryPolicy | None = None,
        circuits: CircuitPolicy | None = None,
        concurrency: Mapping[str, int] | None = None,
        random: Random | None = None,
    ) -> None:
        """``concurrency``: places by provider. ``random`` spreads the backoff."""
        self._router = router
        self._clock = clock
        self._telemetry = telemetry
        self._logger = logger
        self._policy = retries or RetryPolicy()
        self._circuits = Circuits(circuits or CircuitPolicy())
        self._random = random or Random()  # noqa: S311 - it spreads load, it keeps no secret
        places = concurrency or {}
        self._no_keys = KeyRing()
        self._lines = {name: Line(places.get(name, DEFAULT_CONCURRENCY)) for name in router.providers}

    def course(
        self,
        model: str,
        fallbacks: Sequence[str] = (),
        *,
        mode: Mode = Mode.PLAIN,
        patient: bool = False,
        may_retry: bool = True,
        failed: int = 0,
    ) -> "Course":
        """The course of a job; those of batches wait behind the others. Raises NoSuchModelError.

        ``patient``: where no target can be asked when its turn has come, or after a failure, it waits for
        one, within the bounds of the retries. ``may_retry`` False: nothing is tried after a failure.
        ``failed``: attempts that failed before a restart.
        """
        candidates = self._router.candidates(model, fallbacks)
        batch = mode is Mode.BATCH
        return Course(self, candidates, batch=batch, patient=patient, may_retry=may_retry, failed=failed)

    def more(self, model: str, fallbacks: Iterable[str]) -> Iterator[Target]:
        """The targets of those fallbacks that lead anywhere."""
        for name in fallbacks:
            try:
                yield from self._router.candidates(name)
            except NoSuchModelError:
                self._logger.warning("fallback unknown", action="target.unknown", model=model, fallback=name)

    # -- reports ---------------------------------------------------------------------------------

    def circuits(self) -> list[CircuitReport]:
        """The circuits that are not closed."""
        return list(self._circuits.reports(trio.current_time()))

    def providers(self) -> list[ProviderReport]:
        """Every provider, in the order of the configuration."""
        now = trio.current_time()
        return [
            ProviderReport(
                provider=name,
                working=self._lines[name].taken,
                waiting=self._lines[name].waiting,
                cooling_keys=self._ring(provider).cooling(),
                down=self._circuits.down(name, now),
            )
            for name, provider in self._router.providers.items()
        ]

    @property
    def patience_s(self) -> float:
        """How long a job may wait for a target that can be asked."""
        return self._policy.total_s

    # -- for courses -----------------------------------------------------------------------------

    def ring(self, target: Target) -> KeyRing:
        """The keys of the target's provider."""
        return self._ring(target.provider)

    def key_name(self, target: Target) -> str:
        """The key to use now, by name; empty where there is none."""
        return self.ring(target).pick(target.model)

    def _ring(self, provider: Provider) -> KeyRing:
        ring = getattr(provider, "keys", None)
        return ring if isinstance(ring, KeyRing) else self._no_keys

    def line(self, target: Target) -> Line:
        """Where the target's provider gives its places."""
        return self._lines[target.provider.name]

    @property
    def any_failed(self) -> bool:
        """Whether anything is to be known of circuits."""
        return len(self._circuits) > 0

    def open_s(self, target: Target) -> float:
        """Seconds until the target may be asked; 0: now."""
        return self._circuits.retry_in_s(target.key, trio.current_time()) if self.any_failed else 0.0

    def enter(self, target: Target) -> bool:
        """See :meth:`actors.circuit.Circuits.enter`; whether it is a probe."""
        state = self._circuits.enter(target.key, trio.current_time())
        return state is CircuitState.HALF_OPEN

    def answering(self, target: Target) -> None:
        """See :meth:`actors.circuit.Circuits.answering`."""
        self._circuits.answering(target.key)

    def said_nothing(self, target: Target, *, probe: bool) -> None:
        """See :meth:`actors.circuit.Circuits.said_nothing`."""
        self._circuits.said_nothing(target.key, probe=probe)

    def succeeded(self, target: Target) -> None:
        """The target answered to the end."""
        if self.any_failed:
            self._circuits.succeeded(target.key, trio.current_time())

    def failed(self, target: Target, key_name: str, failure: Failure, *, probe: bool) -> None:
        """Note what a failure says of the key and of the target."""
        if failure.status in KEY_FAILURES:
            asked_s = retry_after_s(failure, self._clock.now()) if failure.status == 429 else None
            model = ANY_MODEL if failure.status == 401 else target.model
            self.ring(target).cool(key_name, model, asked_s)
        if failure.status not in UNHEALTHY:
            self._circuits.said_nothing(target.key, probe=probe)
        elif self._circuits.failed(target.key, trio.current_time(), probe=probe):
            provider, model = target.key
            self._telemetry.circuit_opened(provider)
            self._logger.warning("circuit open", action="circuit.opened", provider=provider, model=model)

    def decide(self, target: Target, failure: Failure, standing: Standing) -> Decision:
        """What follows a failure of the target."""
        decision = decide(failure, standing, self._policy, self._random)
        self._telemetry.attempt_failed(target.provider.name, decision.next)
        return decision

    def unix_now(self) -> float:
        """Unix seconds."""
        return self._clock.now()


class Course:
    """One job's way through its targets. Whoever has begun it leaves it, whatever happens."""

    __slots__ = (
        "_batch",
        "_begun_at",
        "_candidates",
        "_failed",
        "_may_retry",
        "_patient",
        "_place",
        "_probe",
        "_targets",
        "_tries",
        "_turn",
        "key_name",
        "target",
    )

    def __init__(
        self,
        targets: Targets,
        candidates: list[Target],
        *,
        batch: bool,
        patient: bool,
        may_retry: bool,
        failed: int,
    ) -> None:
        self._targets = targets
        self._candidates = candidates
        self._batch = batch
        self._patient = patient
        self._may_retry = may_retry
        self._failed = failed
        self._tries: dict[tuple[str, str], int] | None = None
        self._begun_at: float | None = None
        self._turn: Turn | None = None
        self._place: Callable[[], None] | None = None
        self._probe = False
        self.target = candidates[0]
        """Where the present attempt goes."""
        self.key_name = ""
        """The provider's key it goes with."""

    # -- beginning an attempt --------------------------------------------------------------------

    @property
    def begun(self) -> bool:
        """Whether the attempt has its place."""
        return self._place is not None

    def begin_now(self) -> None:
        """Begin the attempt if there is a place for it; else join the line, and :meth:`begin` waits there.

        Synchronous. Raises NoTargetError when the circuits of all targets are open.
        """
        target = self.target
        if len(self._candidates) > 1 or self._targets.any_failed:
            usable = self._usable()
            if usable is None:
                raise self._no_target()
            self.target = target = usable
        line = self._targets.line(target)
        if line.try_enter():
            self._place = line.leave
            self._enter(target)
        else:
            self._turn = line.join(later=self._batch)

    def join(self) -> None:
        """Take the last turn in line, to begin when it comes. Synchronous, raises nothing."""
        self.target = self._usable() or self._candidates[0]
        self._turn = self._targets.line(self.target).join(later=self._batch)

    async def begin(self) -> None:
        """Wait for a place, then begin the attempt. Raises NoTargetError; cancelled, it leaves the line."""
        # Patience counts from the first attempt on.
        until = trio.current_time() - self._elapsed_s + (self._targets.patience_s if self._patient else 0.0)
        while True:
            if self._turn is None:
                self.join()
            assert self._turn is not None  # noqa: S101 - join has set it
            try:
                await self._turn.came.wait()
            except BaseException:
                self.leave()
                raise
            target = self._usable()
            if target is not None and target.provider.name == self.target.provider.name:
                self._place, self._turn = self._turn.leave, None
                self._enter(target)
                return
            # Circuits opened while the job was waiting.
            self.leave()
            if target is None:
                refusal = self._no_target()
                if trio.current_time() + refusal.retry_in_s > until:
                    raise refusal
                await trio.sleep(refusal.retry_in_s)

    @property
    def _elapsed_s(self) -> float:
        """Since the first attempt began; 0 before."""
        return 0.0 if self._begun_at is None else trio.current_time() - self._begun_at

    def _enter(self, target: Target) -> None:
        self.target = target
        self._probe = self._targets.any_failed and self._targets.enter(target)
        self.key_name = self._targets.key_name(target)
        if self._begun_at is None:
            self._begun_at = trio.current_time()

    def _usable(self) -> Target | None:
        """The first target that can be asked now, one with a key that can be used if there is one."""
        asked = [target for target in self._candidates if not self._targets.open_s(target)]
        with_key = (one for one in asked if self._targets.ring(one).ready(one.model))
        return next(with_key, asked[0] if asked else None)

    def _no_target(self) -> NoTargetError:
        return NoTargetError(min(map(self._targets.open_s, self._candidates)))

    def call(self, call: ProviderCall) -> ProviderCall:
        """The job's call as the present target gets it."""
        if call.model == self.target.model and call.key_name == self.key_name:
            return call
        return replace(call, model=self.target.model, key_name=self.key_name)

    def also(self, model: str, fallbacks: Sequence[str]) -> None:
        """Try these models, too, after all others: what a restart finds in the request."""
        known = {target.key for target in self._candidates}
        self._candidates += [one for one in self._targets.more(model, fallbacks) if one.key not in known]

    # -- ending it -------------------------------------------------------------------------------

    def leave(self) -> None:
        """Give the place, or the turn, back. Idempotent; the attempt, if it did not end, says nothing."""
        if self._probe:
            self._probe = False
            self._targets.said_nothing(self.target, probe=True)
        if self._place is not None:
            place, self._place = self._place, None
            place()
        if self._turn is not None:
            turn, self._turn = self._turn, None
            turn.leave()

    def answering(self) -> None:
        """Content has come."""
        if self._probe:
            self._probe = False
            self._targets.answering(self.target)

    def succeeded(self) -> None:
        """The attempt brought the answer."""
        self._probe = False
        self._targets.succeeded(self.target)

    def failed(self, error: ProviderError, *, shown: bool) -> Decision:
        """The attempt failed: note it and say what follows. ``shown``: a watcher has seen content of it."""
        target, targets, failure = self.target, self._targets, error.failure
        probe, self._probe = self._probe, False
        targets.failed(target, self.key_name, failure, probe=probe)
        self._failed += 1
        if self._tries is None:
            self._tries = {}
        tries = self._tries[target.key] = self._tries.get(target.key, 0) + 1
        ring = targets.ring(target)
        others = [one for one in self._candidates if one is not target and not targets.open_s(one)]
        rather_another = any(targets.ring(one).ready(one.model) for one in others)
        idle_s = 0.0
        if self._patient and not others:
            others, idle_s = self._later()
        decision = targets.decide(
            target,
            failure,
            Standing(
                attempts=self._failed,
                tries=tries,
                elapsed_s=self._elapsed_s,
                shown=shown or not self._may_retry,
                unsupported=isinstance(error, UnsupportedError),
                other_key=len(ring) > 1 and ring.ready(target.model),
                same_target=idle_s > 0 or not targets.open_s(target),
                idle_s=idle_s,
                other_targets=len(others),
                now=targets.unix_now(),
                passed_over_s=ring.ready_in_s(target.model) if rather_another else 0.0,
            ),
        )
        if decision.next is NextStep.FALL_BACK:
            self._candidates.remove(target)
        elif decision.next is NextStep.RETRY:
            # Also when others stood before it, whose circuits were open.
            self._candidates.remove(target)
            self._candidates.insert(0, target)
        return decision

    def _later(self) -> tuple[list[Target], float]:
        """The other targets that can be waited for, and for how long none at all can be asked."""
        left_s = self._targets.patience_s - self._elapsed_s
        open_s = {one.key: self._targets.open_s(one) for one in self._candidates}
        later = [one for one in self._candidates if one is not self.target and open_s[one.key] <= left_s]
        return later, min(open_s[one.key] for one in (self.target, *later))
