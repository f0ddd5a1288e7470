"""The life of a job, as one table.

::

    (nothing) --JobAccepted--> pending --AttemptStarted--> processing --JobCompleted--> completed --+
                                  |                          |  ^                                   |
                                  |                          +--+ frames, failed attempts, retries  |
                                  +--JobFailed-------------->+--JobFailed----> failed --------------+
                                  +--JobCancelled----------->+--JobCancelled-> cancelled -----------+
                                                                                                    |
                                                                                 expired <-JobExpired

Nothing else changes a job's state: whoever wants to know it folds the events through
:func:`next_state`. An event that is not in the row of the current state raises
:class:`~events.errors.IllegalTransition` and changes nothing.

A job that was processing when its process died goes on with another ``AttemptStarted``: that is why
the event is allowed while processing, with or without an ``AttemptFailed`` before it.
"""

from collections.abc import Iterable, Mapping
from enum import StrEnum
from types import MappingProxyType

from events.errors import IllegalTransition
from events.types import (
    AttemptFailed,
    AttemptStarted,
    Event,
    FramesReceived,
    JobAccepted,
    JobCancelled,
    JobCompleted,
    JobDetached,
    JobExpired,
    JobFailed,
)


class JobState(StrEnum):
    """Where a job stands. The values are those of the wire (``x-bf-async-status``)."""

    # Accepted and committed; no upstream was called yet.
    PENDING = "pending"
    # At least one attempt was started.
    PROCESSING = "processing"
    # It has its Message.
    COMPLETED = "completed"
    # It ended with an error, which is its result.
    FAILED = "failed"
    # Somebody stopped it.
    CANCELLED = "cancelled"
    # Its result is gone. On the wire it no longer exists.
    EXPIRED = "expired"


_ENDED_ROW: Mapping[type[Event], JobState] = {JobExpired: JobState.EXPIRED}

TRANSITIONS: Mapping[JobState | None, Mapping[type[Event], JobState]] = MappingProxyType(
    {
        None: {JobAccepted: JobState.PENDING},
        JobState.PENDING: {
            JobDetached: JobState.PENDING,
            AttemptStarted: JobState.PROCESSING,
            JobFailed: JobState.FAILED,
            JobCancelled: JobState.CANCELLED,
        },
        JobState.PROCESSING: {
            JobDetached: JobState.PROCESSING,
            AttemptStarted: JobState.PROCESSING,
            FramesReceived: JobState.PROCESSING,
            AttemptFailed: JobState.PROCESSING,
            JobCompleted: JobState.COMPLETED,
            JobFailed: JobState.FAILED,
            JobCancelled: JobState.CANCELLED,
        },
        JobState.COMPLETED: _ENDED_ROW,
        JobState.FAILED: _ENDED_ROW,
        JobState.CANCELLED: _ENDED_ROW,
        JobState.EXPIRED: {},
    }
)

ENDED: frozenset[JobState] = frozenset(
    {JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED, JobState.EXPIRED}
)
"""The states from which no work follows."""


def next_state(state: JobState | None, event: Event) -> JobState:
    """The state after ``event``; ``None`` stands for a job that does not exist yet.

    Raises :class:`IllegalTransition` for a pair that is not in :data:`TRANSITIONS`.
    """
    try:
        return TRANSITIONS[state][type(event)]
    except KeyError:
        now = "nothing" if state is None else state.value
        raise IllegalTransition(f"{type(event).__name__} does not follow {now}") from None


def project_state(events: Iterable[Event]) -> JobState | None:
    """Fold a job's events into its state. Raises :class:`IllegalTransition` at the first bad step."""
    state: JobState | None = None
    for event in events:
        state = next_state(state, event)
    return state
