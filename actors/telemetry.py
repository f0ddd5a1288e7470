"""What the actors tell about their work in numbers. The daemon's metrics implement it.

Every method is called on hot paths: it returns at once, does no I/O and never raises.
"""

from typing import Protocol

from structlog.typing import FilteringBoundLogger

from events.projections import JobSnapshot
from events.state import JobState
from events.types import AttemptFailed, Mode, NextStep, Usage


class Telemetry(Protocol):
    """The recording side of metrics. ``provider`` is always a configured name: labels stay bounded."""

    def job_accepted(self, mode: Mode) -> None:
        """A job was committed to the log."""
        ...

    def job_ended(self, mode: Mode, state: JobState, duration_s: float, usage: Usage) -> None:
        """A job has its terminal event, ``duration_s`` after it was accepted."""
        ...

    def items_ended(self, state: JobState, count: int) -> None:
        """``count`` items of a batch have their terminal events that no actor of this process had begun."""
        ...

    def first_frame(self, mode: Mode, provider: str, delay_s: float) -> None:
        """The first frame of a job came from upstream, ``delay_s`` after the job was accepted."""
        ...

    def frames(self, provider: str, count: int) -> None:
        """``count`` more frames came from upstream."""
        ...

    def subscribers(self, delta: int) -> None:
        """``delta`` watchers came (or left, when negative)."""
        ...

    def lagged(self) -> None:
        """A watcher fell behind its buffer and reads from the log now."""
        ...

    def attempt_failed(self, provider: str, next_step: NextStep) -> None:
        """An attempt at a provider failed, and this follows."""
        ...

    def circuit_opened(self, provider: str) -> None:
        """One of a provider's targets is left alone for a while."""
        ...


class NullTelemetry:
    """Records nothing."""

    def job_accepted(self, mode: Mode) -> None:
        """See :meth:`Telemetry.job_accepted`."""

    def job_ended(self, mode: Mode, state: JobState, duration_s: float, usage: Usage) -> None:
        """See :meth:`Telemetry.job_ended`."""

    def items_ended(self, state: JobState, count: int) -> None:
        """See :meth:`Telemetry.items_ended`."""

    def first_frame(self, mode: Mode, provider: str, delay_s: float) -> None:
        """See :meth:`Telemetry.first_frame`."""

    def frames(self, provider: str, count: int) -> None:
        """See :meth:`Telemetry.frames`."""

    def subscribers(self, delta: int) -> None:
        """See :meth:`Telemetry.subscribers`."""

    def lagged(self) -> None:
        """See :meth:`Telemetry.lagged`."""

    def attempt_failed(self, provider: str, next_step: NextStep) -> None:
        """See :meth:`Telemetry.attempt_failed`."""

    def circuit_opened(self, provider: str) -> None:
        """See :meth:`Telemetry.circuit_opened`."""


def log_attempt_failed(logger: FilteringBoundLogger, event: AttemptFailed, provider: str) -> None:
    """The log line that tells why an attempt failed, and what follows."""
    logger.info(
        "attempt failed",
        action="attempt.failed",
        attempt=event.attempt,
        provider=provider,
        status=event.failure.status,
        error=event.failure.message,
        next=event.next.value,
        retry_after_s=event.retry_after_s,
    )


def log_job_end(
    logger: FilteringBoundLogger, snapshot: JobSnapshot, *, frames: int, duration_s: float
) -> None:
    """The log line that tells how a job ended."""
    logger.info(
        "job ended",
        action="job.ended",
        status=snapshot.state.value,
        duration_s=round(duration_s, 3),
        attempts=snapshot.attempt,
        frames=frames,
        error=snapshot.failure.message if snapshot.failure else None,
    )
