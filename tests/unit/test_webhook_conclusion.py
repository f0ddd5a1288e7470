"""What a try means for its delivery: the decision, pure."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.webhooks.client import Answered, NotCalled, NotReached, Outcome
from actors.webhooks.delivery import backoff_s, conclusion, may_retry
from actors.webhooks.options import WebhookOptions
from events.deliveries import (
    DeliveryAccepted,
    DeliveryAttemptFailed,
    DeliveryGivenUp,
    DeliverySnapshot,
    DeliverySucceeded,
    WebhookEvent,
    apply,
)
from tests.support.receiver import SECRET

NOW = 1_000.0
ACCEPTED = DeliveryAccepted(
    at=NOW,
    endpoint="hook",
    event=WebhookEvent.COMPLETED,
    job_id="job-1",
    owner="",
    status="completed",
    status_code=200,
    result_url="/",
    result_expires_at=NOW,
)
RETRIED = {408, 429, *range(500, 600)}


def options(**changes: float) -> WebhookOptions:
    return WebhookOptions.model_validate(
        {"name": "hook", "url": "https://hooks.test/", "secrets": [SECRET], **changes}
    )


def after(*outcomes: Outcome, made: WebhookOptions | None = None) -> list[object]:
    """What is concluded of one try after the other."""
    snapshot: DeliverySnapshot = apply(None, "whd_1", ACCEPTED)
    concluded: list[object] = []
    for outcome in outcomes:
        event = conclusion(snapshot, outcome, made or options(), at=NOW, duration_s=0.5)
        concluded.append(event)
        snapshot = apply(snapshot, "whd_1", event)
    return concluded


@given(st.integers(100, 999))
def test_every_status_has_its_meaning(status: int) -> None:
    (event,) = after(Answered(status))
    if 200 <= status <= 299:
        assert event == DeliverySucceeded(at=NOW, status_code=status, duration_s=0.5)
    elif status in RETRIED:
        assert event == DeliveryAttemptFailed(
            at=NOW,
            next_attempt_at=NOW + 30,
            error=f"it answered {status}",
            status_code=status,
            duration_s=0.5,
        )
    else:
        assert event == DeliveryGivenUp(
            at=NOW, error=f"it answered {status}", status_code=status, duration_s=0.5
        )


def test_no_answer_may_become_one_and_a_refused_address_does_not() -> None:
    assert may_retry(NotReached("no connection"))
    assert not may_retry(NotCalled("not public"))
    assert after(NotCalled("not public")) == [DeliveryGivenUp(at=NOW, error="not public", duration_s=0.5)]


def test_the_default_is_four_retries_from_thirty_seconds_on() -> None:
    events = after(*[NotReached("no connection")] * 5)
    pauses = [event.next_attempt_at - NOW for event in events if isinstance(event, DeliveryAttemptFailed)]
    assert pauses == [30, 60, 120, 240]
    assert isinstance(events[-1], DeliveryGivenUp)


def test_no_pause_is_longer_than_the_longest() -> None:
    made = options(max_retries=20, max_backoff_s=100)
    assert [backoff_s(retry, made) for retry in range(1, 6)] == [30, 60, 100, 100, 100]
    assert backoff_s(20, made) == 100


@pytest.mark.parametrize(("asked", "pause_s"), [("5", 30), ("100", 100), ("86400", 1800), ("soon", 30)])
def test_retry_after_counts_where_it_is_longer_up_to_the_longest(asked: str, pause_s: float) -> None:
    (event,) = after(Answered(503, asked))
    assert isinstance(event, DeliveryAttemptFailed)
    assert event.next_attempt_at == NOW + pause_s


def test_without_retries_the_first_try_is_the_last() -> None:
    (event,) = after(Answered(500), made=options(max_retries=0))
    assert isinstance(event, DeliveryGivenUp)
