"""What can be asked of a running job: the messages of its actor's inbox, in the imperative.

:func:`ends_work` is the whole decision, pure and synchronous: state in, verdict out.
"""

from dataclasses import dataclass, field

import trio

from events.types import AttemptFailed, Failure, JobCancelled, JobFailed, NextStep, Terminal, Usage


@dataclass(frozen=True, slots=True)
class CancelJob:
    """Somebody with a right to it wants the job stopped."""

    by: str
    reason: str
    lapsed: bool = False
    """The time of its batch is up; nobody asked."""


@dataclass(frozen=True, slots=True)
class LastWatcherLeft:
    """Nobody watches any more. Stops an attached job; means nothing to a detached one."""


@dataclass(frozen=True, slots=True)
class StopForShutdown:
    """The daemon ends. ``leave_unfinished``: a durable log takes the job up again at the next start."""

    leave_unfinished: bool


@dataclass(frozen=True, slots=True)
class DetachJob:
    """Cut the job loose from its connection. ``done`` is set once that is committed, or moot."""

    result_ttl_s: float
    done: trio.Event = field(default_factory=trio.Event)


Command = CancelJob | LastWatcherLeft | StopForShutdown | DetachJob
Ending = CancelJob | LastWatcherLeft | StopForShutdown

INTERRUPTED = Failure(500, "api_error", "interrupted by a restart of the gateway")
SHUTDOWN_FAILURE = Failure(503, "api_error", "the job was interrupted by a shutdown of the gateway")
LEFT_FAILURE = Failure(503, "api_error", "the gateway is shutting down; the job goes on at its next start")
"""What a watcher is told; the job itself has not failed."""
CRASH_FAILURE = Failure(500, "api_error", "the gateway failed while it ran this job")
LOG_FAILURE = Failure(500, "api_error", "the gateway could not record this job's progress")
UNRECORDED_FAILURE = Failure(500, "api_error", "the gateway could not record how this job ended")


def ends_work(command: Command, *, detached: bool, watchers: int) -> bool:
    """Whether the command stops the work of a job that stands as described."""
    match command:
        case CancelJob() | StopForShutdown():
            return True
        case LastWatcherLeft():
            return not detached and watchers == 0
        case DetachJob():
            return False


def terminal_event(command: Ending, *, at: float, usage: Usage) -> Terminal | None:
    """The event that records an ending; None when the job is left for the next start."""
    match command:
        case CancelJob(by=by, reason=reason, lapsed=lapsed):
            return JobCancelled(at=at, by=by, reason=reason, usage=usage, lapsed=lapsed)
        case LastWatcherLeft():
            return JobCancelled(at=at, by="client", reason="its last watcher left", usage=usage)
        case StopForShutdown(leave_unfinished=True):
            return None
        case StopForShutdown():
            return JobFailed(at=at, failure=SHUTDOWN_FAILURE, usage=usage)


def interruption(attempt: int, *, at: float) -> AttemptFailed:
    """The event that a restart cut an attempt off, and another follows."""
    return AttemptFailed(at=at, attempt=attempt, failure=INTERRUPTED, next=NextStep.RETRY)
