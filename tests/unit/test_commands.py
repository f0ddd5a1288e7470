"""Which commands end the work of a job, and how that is recorded: every case of the table."""

import pytest

from actors.commands import (
    SHUTDOWN_FAILURE,
    CancelJob,
    Command,
    DetachJob,
    Ending,
    LastWatcherLeft,
    StopForShutdown,
    ends_work,
    terminal_event,
)
from events.types import JobCancelled, JobFailed

USAGE = {"input_tokens": 7}


@pytest.mark.parametrize("detached", [False, True])
@pytest.mark.parametrize("watchers", [0, 1, 200])
@pytest.mark.parametrize(
    "command", [CancelJob("me", "enough"), StopForShutdown(False), StopForShutdown(True)]
)
def test_whoever_watches_these_end_it(command: Command, detached: bool, watchers: int) -> None:
    assert ends_work(command, detached=detached, watchers=watchers)


@pytest.mark.parametrize(
    ("detached", "watchers", "ends"),
    [(False, 0, True), (False, 1, False), (True, 0, False), (True, 1, False)],
)
def test_the_last_watcher_ends_attached_work_only(detached: bool, watchers: int, ends: bool) -> None:
    assert ends_work(LastWatcherLeft(), detached=detached, watchers=watchers) is ends


async def test_detaching_ends_nothing() -> None:
    assert not ends_work(DetachJob(60.0), detached=False, watchers=0)
    assert not ends_work(DetachJob(60.0), detached=True, watchers=1)


def test_a_cancellation_says_by_whom() -> None:
    event = terminal_event(CancelJob("ci", "enough"), at=5.0, usage=USAGE)
    assert event == JobCancelled(at=5.0, by="ci", reason="enough", usage=USAGE)


def test_a_client_that_left_is_called_client() -> None:
    event = terminal_event(LastWatcherLeft(), at=5.0, usage=USAGE)
    assert isinstance(event, JobCancelled)
    assert (event.at, event.by, event.usage) == (5.0, "client", USAGE)


def test_a_shutdown_is_a_failure_that_may_be_tried_again() -> None:
    event = terminal_event(StopForShutdown(leave_unfinished=False), at=5.0, usage=USAGE)
    assert event == JobFailed(at=5.0, failure=SHUTDOWN_FAILURE, usage=USAGE)
    assert (SHUTDOWN_FAILURE.status, SHUTDOWN_FAILURE.type) == (503, "api_error")


def test_a_job_left_for_the_next_start_has_not_ended() -> None:
    assert terminal_event(StopForShutdown(leave_unfinished=True), at=5.0, usage=USAGE) is None


@pytest.mark.parametrize("command", [CancelJob("", "x"), LastWatcherLeft(), StopForShutdown(False)])
def test_the_usage_known_so_far_is_kept(command: Ending) -> None:
    event = terminal_event(command, at=1.0, usage=USAGE)
    assert event is not None
    assert event.usage == USAGE
