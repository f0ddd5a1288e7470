"""What follows a failed attempt: the rules, and the bounds that hold whatever fails."""

from datetime import UTC, datetime
from email.utils import format_datetime
from math import inf
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.retry import (
    RETRYABLE,
    Decision,
    RetryPolicy,
    Standing,
    backoff_window_s,
    decide,
    retry_after_s,
    should_retry,
    wait_s,
)
from events.types import Failure, NextStep

NOW = 1_900_000_000.0
POLICY = RetryPolicy()
FIRST: dict[str, Any] = {
    "attempts": 1,
    "tries": 1,
    "elapsed_s": 0.0,
    "shown": False,
    "other_key": False,
    "same_target": True,
    "other_targets": 0,
    "now": NOW,
}


def failure(status: int, **headers: str) -> Failure:
    named = tuple((name.replace("_", "-"), value) for name, value in headers.items())
    return Failure(status, "api_error", "no", named)


def next_step(failed: Failure, **standing: Any) -> NextStep:
    return decide(failed, Standing(**FIRST | standing), POLICY, Random(0)).next


standings = st.builds(
    Standing,
    attempts=st.integers(1, 10),
    tries=st.integers(1, 10),
    elapsed_s=st.floats(0, 1000),
    shown=st.booleans(),
    other_key=st.booleans(),
    same_target=st.booleans(),
    other_targets=st.integers(0, 9),
    now=st.just(NOW),
    idle_s=st.sampled_from([0.0, 5.0, 60.0]),
    unsupported=st.booleans(),
    passed_over_s=st.floats(0, 100),
)
values = st.sampled_from(["", "0", "1", "29.5", "31", "1e9", "-1", "nan", "inf", "soon", "true", "false"])
failures = st.builds(
    Failure,
    status=st.sampled_from([*RETRYABLE, 400, 401, 402, 403, 404, 413, 422, 501]),
    type=st.just("api_error"),
    message=st.just("no"),
    headers=st.lists(
        st.tuples(st.sampled_from(["retry-after", "retry-after-ms", "x-should-retry"]), values), max_size=3
    ).map(tuple),
)
policies = st.builds(
    RetryPolicy,
    max_attempts=st.integers(1, 8),
    max_retries=st.integers(0, 5),
    total_s=st.floats(0, 600),
    backoff_s=st.floats(0, 10),
    max_backoff_s=st.floats(0, 60),
    max_retry_after_s=st.floats(0, 60),
)


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, 504, 529])
def test_worth_another_try(status: int) -> None:
    assert next_step(failure(status)) is NextStep.RETRY
    assert next_step(failure(status), tries=3, other_targets=1) is NextStep.FALL_BACK
    assert next_step(failure(status), tries=3) is NextStep.GIVE_UP


@pytest.mark.parametrize("status", [400, 402, 404, 405, 413, 422, 501, 505])
def test_not_worth_one(status: int) -> None:
    assert next_step(failure(status), other_targets=1) is NextStep.GIVE_UP


def test_the_upstream_overrules_the_list() -> None:
    assert next_step(failure(400, x_should_retry="true")) is NextStep.RETRY
    assert next_step(failure(529, x_should_retry="false")) is NextStep.GIVE_UP
    # It speaks for itself, not for others.
    assert next_step(failure(529, x_should_retry="false"), other_targets=1) is NextStep.FALL_BACK
    assert next_step(failure(400, x_should_retry="false"), other_targets=1) is NextStep.GIVE_UP


@pytest.mark.parametrize("status", [401, 403])
def test_another_key_then_another_target(status: int) -> None:
    assert decide(failure(status), Standing(**FIRST | {"other_key": True}), POLICY, Random(0)) == Decision(
        NextStep.RETRY, 0.0
    )
    assert next_step(failure(status), other_targets=1) is NextStep.FALL_BACK
    assert next_step(failure(status)) is NextStep.GIVE_UP


def test_what_one_key_was_asked_to_wait_another_need_not() -> None:
    rate_limited = failure(429, retry_after="9999")
    assert decide(rate_limited, Standing(**FIRST | {"other_key": True}), POLICY, Random(0)).after_s == 0
    assert next_step(rate_limited, other_targets=1) is NextStep.FALL_BACK
    assert next_step(rate_limited) is NextStep.GIVE_UP


def test_a_target_that_is_passed_over_is_not_waited_for() -> None:
    limited = failure(429, retry_after="5")
    assert next_step(limited, other_targets=1, passed_over_s=5) is NextStep.RETRY
    assert next_step(limited, other_targets=1, passed_over_s=6) is NextStep.FALL_BACK


def test_an_attempt_is_kept_for_each_other_target() -> None:
    assert next_step(failure(500), attempts=4, other_targets=1) is NextStep.RETRY
    assert next_step(failure(500), attempts=4, other_targets=2) is NextStep.FALL_BACK
    assert next_step(failure(500), attempts=5) is NextStep.RETRY


def test_an_open_circuit_is_not_asked_again() -> None:
    assert next_step(failure(500), same_target=False) is NextStep.GIVE_UP
    assert next_step(failure(500), same_target=False, other_targets=1) is NextStep.FALL_BACK


def test_what_a_target_cannot_do_is_not_asked_of_it_again() -> None:
    assert next_step(failure(400), unsupported=True) is NextStep.GIVE_UP
    assert next_step(failure(400), unsupported=True, other_targets=1) is NextStep.FALL_BACK
    assert next_step(failure(400), unsupported=True, other_targets=1, shown=True) is NextStep.GIVE_UP
    assert next_step(failure(400), other_targets=1) is NextStep.GIVE_UP


def test_retry_after_is_honoured_up_to_its_bound() -> None:
    assert decide(failure(429, retry_after="30"), Standing(**FIRST), POLICY, Random(0)).after_s == 30
    assert next_step(failure(429, retry_after="30.5")) is NextStep.GIVE_UP
    assert next_step(failure(429, retry_after="30"), elapsed_s=271) is NextStep.GIVE_UP


def test_the_ways_to_spell_it() -> None:
    date = format_datetime(datetime.fromtimestamp(NOW + 12, UTC), usegmt=True)
    assert retry_after_s(failure(429, retry_after=date), NOW) == 12
    assert retry_after_s(failure(429, retry_after=date), NOW + 60) == 0
    assert retry_after_s(failure(429, retry_after="2"), NOW) == 2
    assert retry_after_s(failure(429, retry_after_ms="1500", retry_after="2"), NOW) == 1.5
    for nothing in ("soon", "", "-3", "nan", "inf"):
        assert retry_after_s(failure(429, retry_after=nothing), NOW) is None
    assert should_retry(failure(500, x_should_retry="TRUE")) is True
    assert should_retry(failure(500, x_should_retry="maybe")) is None


@given(failures, standings, policies, st.randoms(use_true_random=False))
def test_the_bounds_hold(failed: Failure, standing: Standing, policy: RetryPolicy, random: Random) -> None:
    decision = decide(failed, standing, policy, random)
    if standing.shown or standing.attempts >= policy.max_attempts or standing.elapsed_s >= policy.total_s:
        assert decision == Decision(NextStep.GIVE_UP)
    if decision.next is NextStep.RETRY:
        assert standing.same_target
        assert not standing.unsupported
        assert standing.tries <= policy.max_retries
        longest_s = max(policy.max_retry_after_s, policy.max_backoff_s, standing.idle_s)
        assert standing.idle_s <= decision.after_s <= longest_s
        assert standing.elapsed_s + decision.after_s <= policy.total_s
    else:
        assert decision.after_s == 0
    if decision.next is NextStep.FALL_BACK:
        assert standing.other_targets
    if should_retry(failed) is False and decision.next is NextStep.RETRY:
        assert standing.other_key


@given(st.integers(1, 2000), policies, st.randoms(use_true_random=False))
def test_full_jitter(tries: int, policy: RetryPolicy, random: Random) -> None:
    window_s = backoff_window_s(tries, policy)
    assert 0 <= window_s <= policy.max_backoff_s
    assert window_s <= backoff_window_s(tries + 1, policy)
    assert 0 <= wait_s(failure(500), tries, policy, random, now=NOW) <= window_s


def test_the_window_doubles_up_to_its_bound() -> None:
    assert [backoff_window_s(tries, POLICY) for tries in range(1, 8)] == [0.5, 1, 2, 4, 8, 8, 8]
    spread = {wait_s(failure(500), 5, POLICY, Random(seed), now=NOW) for seed in range(200)}
    assert min(spread) < 0.5
    assert max(spread) > 7.5
    assert wait_s(failure(429, retry_after="31"), 1, POLICY, Random(0), now=NOW) == inf
