"""What follows a failed attempt: the same target again, the next one, or the end. Pure decisions.

Worth another try are failures that speak of the moment or of the target, not of the request: no connection,
a connection that broke, a time bound that ran out (502 and 504 here), and the statuses 408, 409, 429, 500,
502, 503, 504 and 529. An upstream's ``x-should-retry`` overrules that list for itself: ``true`` makes any
failure worth another try, ``false`` forbids to ask the same target again (others may be).
401 and 403 speak of our key: another key of the provider is tried, else another target. So it is with a 429
whose key is left alone for longer than the wait, unless no other target is left.
What a provider cannot do, and says before it calls its upstream, is for another target at once.

The backoff is exponential with full jitter:
https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
"""

from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from math import inf, isfinite
from random import Random

from tenacity import RetryCallState, Retrying
from tenacity.wait import wait_exponential

from events.types import Failure, NextStep

RETRYABLE = frozenset({408, 409, 429, 500, 502, 503, 504, 529})
KEY_TROUBLE = frozenset({401, 403})
"""The upstream does not take the key. It says nothing of the request, nor of the target's health."""
KEY_FAILURES = KEY_TROUBLE | {429}
"""After which a key is left alone for a while."""
UNHEALTHY = frozenset({500, 502, 503, 504, 529})
"""Failures that speak of the target's health."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """The bounds of trying again. Durations in seconds."""

    max_attempts: int = 6
    """At one job, over all its targets and restarts, that failed by themselves."""
    max_retries: int = 2
    """At one target, after the first try."""
    total_s: float = 300.0
    """No attempt begins later than this after the first."""
    backoff_s: float = 0.5
    """The widest first wait; each further one may be twice as long."""
    max_backoff_s: float = 8.0
    max_retry_after_s: float = 30.0
    """An upstream that asks for a longer wait is not waited for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Where a job stands when an attempt has failed."""

    attempts: int
    """Failed so far, this one included."""
    tries: int
    """At the present target, this one included."""
    elapsed_s: float
    """Since the first attempt began."""
    shown: bool
    """A watcher has seen content of this attempt: nothing else may follow it."""
    other_key: bool
    """The provider has another key that can be used now."""
    same_target: bool
    """The target may be asked again: its circuit is closed, or will be probed after ``idle_s``."""
    other_targets: int
    """How many others are left that can be used now, or waited for."""
    now: float
    """Unix seconds, for a ``retry-after`` that is a date."""
    idle_s: float = 0.0
    """For so long no target at all can be asked, and the job waits for one; else 0."""
    unsupported: bool = False
    """This target cannot do what is asked; its upstream was not called."""
    passed_over_s: float = 0.0
    """For so long all keys here cool down while another target has one that can be used; else 0."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What follows."""

    next: NextStep
    after_s: float = 0.0
    """The wait before a retry."""


_FALL_BACK = Decision(NextStep.FALL_BACK)
_GIVE_UP = Decision(NextStep.GIVE_UP)


def decide(failure: Failure, standing: Standing, policy: RetryPolicy, random: Random) -> Decision:
    """The next step. A retry comes before a fallback while attempts are left for it, a fallback at once.

    Nothing follows once content was shown, once ``max_attempts`` failed, and later than ``total_s``.
    """
    if standing.shown or standing.attempts >= policy.max_attempts or standing.elapsed_s >= policy.total_s:
        return _GIVE_UP
    if standing.unsupported:
        return _FALL_BACK if standing.other_targets else _GIVE_UP
    told = should_retry(failure)
    new_key = standing.other_key and failure.status in KEY_FAILURES
    if not (told or new_key or failure.status in RETRYABLE or failure.status in KEY_TROUBLE):
        return _GIVE_UP
    after_s = wait_s(failure, standing.tries, policy, random, now=standing.now)
    if new_key:
        # What the upstream asked for, it asked of the other key.
        again, after_s = standing.same_target, 0.0
    else:
        again = standing.same_target and told is not False and (told or failure.status not in KEY_TROUBLE)
        again = again and standing.passed_over_s <= after_s
    after_s = max(after_s, standing.idle_s)
    # An attempt is kept for each of the others: one of them may be sound.
    again = again and standing.attempts + standing.other_targets < policy.max_attempts
    if again and standing.tries <= policy.max_retries and standing.elapsed_s + after_s <= policy.total_s:
        return Decision(NextStep.RETRY, after_s)
    return _FALL_BACK if standing.other_targets else _GIVE_UP


def wait_s(failure: Failure, tries: int, policy: RetryPolicy, random: Random, *, now: float) -> float:
    """Seconds before the same target is asked again: what it asked for, or a backoff if that is longer.

    Infinite when it asks for more than ``max_retry_after_s``.
    """
    window_s = backoff_window_s(tries, policy)
    asked_s = retry_after_s(failure, now)
    if asked_s is not None and asked_s > policy.max_retry_after_s:
        return inf
    return max(asked_s or 0.0, random.uniform(0.0, window_s))


def backoff_window_s(tries: int, policy: RetryPolicy) -> float:
    """The longest backoff after so many tries at one target."""
    # tenacity's own full jitter draws from the interpreter's generator, which no test could hold still.
    wait = wait_exponential(multiplier=policy.backoff_s, max=policy.max_backoff_s)
    state = RetryCallState(Retrying(), None, (), {})
    state.attempt_number = tries
    return wait(state)


def should_retry(failure: Failure) -> bool | None:
    """The upstream's own word (``x-should-retry``); None where it said nothing that can be understood."""
    return {"true": True, "false": False}.get(_header(failure, "x-should-retry").lower())


def retry_after_s(failure: Failure, now: float) -> float | None:
    """What the upstream asks for in ``retry-after-ms`` or ``retry-after`` (RFC 9110, 10.2.3), in seconds.

    None for a missing or unreadable one.
    """
    for name, unit_s in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            seconds = float(_header(failure, name)) * unit_s
        except ValueError:
            continue
        if isfinite(seconds) and seconds >= 0:
            return seconds
    try:
        until = parsedate_to_datetime(_header(failure, "retry-after")).timestamp()
    except (TypeError, ValueError, OverflowError):
        return None
    return max(until - now, 0.0)


def _header(failure: Failure, wanted: str) -> str:
    return next((value.strip() for name, value in failure.headers if name == wanted), "")
