"""What a start does with the jobs an earlier process left unfinished.

Detached jobs (async, batched, detached, or with an idempotency key) run again as their next attempt; what
was received of the interrupted one is void. Attached jobs fail: their connections are gone. Every decision
is in the job's events.
"""

from dataclasses import dataclass
from enum import Enum, auto

import structlog
import trio

from actors.clock import Clock
from actors.commands import INTERRUPTED
from actors.errors import NoSuchModelError
from actors.supervisor import Supervisor
from events.log.base import EventLog
from events.projections import JobSnapshot
from events.types import AttemptFailed, Event, Failure, JobFailed, NextStep

RERUN_REFUSED = Failure(
    500,
    "api_error",
    "interrupted by a restart of the gateway, and not run again: x-bf-async-retry was never",
)
ENDINGS_AT_ONCE = 256
"""Jobs ended concurrently, so that a log that commits in groups can."""


class Verdict(Enum):
    """What becomes of an unfinished job."""

    RESUME = auto()
    INTERRUPTED = auto()
    RERUN_REFUSED = auto()
    OUT_OF_ATTEMPTS = auto()


def verdict_on(snapshot: JobSnapshot, *, max_attempts: int) -> Verdict:
    """The decision, pure. A job that had no attempt yet costs nobody twice, and always runs."""
    if not snapshot.detached:
        return Verdict.INTERRUPTED
    if snapshot.attempt == 0:
        return Verdict.RESUME
    if not snapshot.may_rerun:
        return Verdict.RERUN_REFUSED
    if snapshot.attempt >= max_attempts:
        return Verdict.OUT_OF_ATTEMPTS
    return Verdict.RESUME


@dataclass(frozen=True, slots=True)
class RecoveryReport:
    """How many jobs were found, by what became of them."""

    resumed: int
    ended: int


async def recover(
    supervisor: Supervisor,
    *,
    log: EventLog,
    clock: Clock,
    logger: structlog.typing.FilteringBoundLogger,
    max_attempts: int,
) -> RecoveryReport:
    """Take up what is unfinished, in the order it was accepted. Call it before the server accepts.

    Returns once every such job either has its terminal event or has its actor, which may still wait for its
    turn. Raises LogUnavailableError when the log takes no events.
    """
    resumed = 0
    endings: list[tuple[JobSnapshot, Failure]] = []
    for snapshot in await log.unfinished():
        match verdict_on(snapshot, max_attempts=max_attempts):
            case Verdict.RESUME:
                try:
                    supervisor.resume(snapshot)
                    resumed += 1
                except NoSuchModelError as error:
                    endings.append((snapshot, error.failure))
            case verdict:
                endings.append((snapshot, failure_by(verdict, snapshot)))
    for start in range(0, len(endings), ENDINGS_AT_ONCE):
        async with trio.open_nursery() as nursery:
            for snapshot, failure in endings[start : start + ENDINGS_AT_ONCE]:
                nursery.start_soon(end_interrupted, log, snapshot, failure, clock.now())
    report = RecoveryReport(resumed=resumed, ended=len(endings))
    if resumed or endings:
        logger.info("recovered", action="recovery.done", resumed=resumed, ended=len(endings))
    return report


def failure_by(verdict: Verdict, snapshot: JobSnapshot) -> Failure:
    """The error of a job that is not run again."""
    match verdict:
        case Verdict.RERUN_REFUSED:
            return RERUN_REFUSED
        case Verdict.OUT_OF_ATTEMPTS:
            text = f"interrupted by a restart in each of its {snapshot.attempt} attempts"
            return Failure(500, "api_error", text)
        case _:
            return INTERRUPTED


async def end_interrupted(log: EventLog, snapshot: JobSnapshot, failure: Failure, at: float) -> None:
    """Record that a job without an actor failed, its last attempt cut off. Raises LogError."""
    events: list[Event] = [JobFailed(at=at, failure=failure)]
    if snapshot.attempt:
        events.insert(
            0,
            AttemptFailed(at=at, attempt=snapshot.attempt, failure=INTERRUPTED, next=NextStep.GIVE_UP),
        )
    await log.append(snapshot.job_id, events, snapshot.last_seq)
    if not snapshot.detached:
        await log.redact(snapshot.job_id)
