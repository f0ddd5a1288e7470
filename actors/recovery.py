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
from actors.resumption import wait_left_s
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


@dataclass(frozen=True, slots=True)
class Attempts:
    """What became of a job's attempts so far."""

    cut_off: int
    """By restarts, this one included."""
    failed: int
    """By themselves."""


async def attempts_of(log: EventLog, snapshot: JobSnapshot) -> Attempts:
    """Count them. The events are read only where the snapshot does not tell."""
    failed_last = snapshot.failure is not None
    if snapshot.attempt <= 1:
        return Attempts(0, snapshot.attempt) if failed_last else Attempts(snapshot.attempt, 0)
    failed = after = 0
    while events := await log.read(snapshot.job_id, after):
        failed += sum(
            isinstance(stored.event, AttemptFailed) and stored.event.failure != INTERRUPTED
            for stored in events
        )
        after = events[-1].seq
    return Attempts(snapshot.attempt - failed, failed)


def verdict_on(snapshot: JobSnapshot, *, max_attempts: int, cut_off: int | None = None) -> Verdict:
    """The decision, pure. A job that had no attempt yet costs nobody twice, and always runs.

    ``cut_off``: attempts that a restart cut off; None: all of them. Those that failed by themselves are
    bounded elsewhere (:mod:`actors.retry`).
    """
    if not snapshot.detached:
        return Verdict.INTERRUPTED
    if snapshot.attempt == 0:
        return Verdict.RESUME
    if not snapshot.may_rerun:
        return Verdict.RERUN_REFUSED
    if (snapshot.attempt if cut_off is None else cut_off) >= max_attempts:
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
        attempts = await attempts_of(log, snapshot)
        match verdict_on(snapshot, max_attempts=max_attempts, cut_off=attempts.cut_off):
            case Verdict.RESUME:
                try:
                    after_s = await wait_left_s(log, snapshot, clock.now())
                    supervisor.resume(snapshot, failed=attempts.failed, after_s=after_s)
                    resumed += 1
                except NoSuchModelError as error:
                    endings.append((snapshot, error.failure))
            case verdict:
                endings.append((snapshot, failure_by(verdict, snapshot, attempts)))
    for start in range(0, len(endings), ENDINGS_AT_ONCE):
        async with trio.open_nursery() as nursery:
            for snapshot, failure in endings[start : start + ENDINGS_AT_ONCE]:
                nursery.start_soon(end_interrupted, log, snapshot, failure, clock.now())
    report = RecoveryReport(resumed=resumed, ended=len(endings))
    if resumed or endings:
        logger.info("recovered", action="recovery.done", resumed=resumed, ended=len(endings))
    return report


def failure_by(verdict: Verdict, snapshot: JobSnapshot, attempts: Attempts) -> Failure:
    """The error of a job that is not run again."""
    match verdict:
        case Verdict.RERUN_REFUSED:
            return RERUN_REFUSED
        case Verdict.OUT_OF_ATTEMPTS:
            each = "each" if attempts.failed == 0 else f"{attempts.cut_off}"
            text = f"interrupted by a restart in {each} of its {snapshot.attempt} attempts"
            return Failure(500, "api_error", text)
        case _:
            return INTERRUPTED


async def end_interrupted(log: EventLog, snapshot: JobSnapshot, failure: Failure, at: float) -> None:
    """Record that a job without an actor failed, its last attempt cut off. Raises LogError."""
    events: list[Event] = [JobFailed(at=at, failure=failure)]
    if snapshot.attempt and snapshot.failure is None:
        events.insert(
            0,
            AttemptFailed(at=at, attempt=snapshot.attempt, failure=INTERRUPTED, next=NextStep.GIVE_UP),
        )
    await log.append(snapshot.job_id, events, snapshot.last_seq)
    if not snapshot.detached:
        await log.redact(snapshot.job_id)
