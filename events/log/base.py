"""The port of the event log: small enough for a dict, a file and a cluster.

Guarantees every adapter gives (``tests/contracts/test_event_log.py`` holds them to it):

* ``append`` is all or nothing, and durable when it returns, as far as the adapter is durable at all.
* A job's ``seq`` counts 1, 2, 3... without holes. A writer that has not seen the last event is refused.
* An illegal event (see :mod:`events.state`) is refused: the log never holds a history that does not fold.
* A job's idempotency key is its owner's alone from its acceptance until it expires or is forgotten.
* An expired job has no content: ``JobExpired`` drops it, as :meth:`EventLog.redact` does.
* Cancelling a write leaves it either done or not done, never half; the caller finds out with ``read``.
* An adapter that need not wait does not checkpoint.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from events.log.follow import Follower
from events.log.items import ItemLog
from events.log.records import RecordLog
from events.projections import JobSnapshot
from events.state import JobState
from events.types import Event, StoredEvent


class FrameCursor(NamedTuple):
    """A place in a job's stream: after frame ``frame`` of attempt ``attempt``. ``(n, 0)`` is its start."""

    attempt: int
    frame: int

    def __str__(self) -> str:
        return f"{self.attempt}-{self.frame}"


class FrameRun(NamedTuple):
    """Consecutive frames of one attempt."""

    attempt: int
    first: int
    frames: tuple[bytes, ...]

    @property
    def last(self) -> int:
        """Number of the last frame of the run."""
        return self.first + len(self.frames) - 1

    @property
    def cursor(self) -> FrameCursor:
        """The place after the last frame of the run."""
        return FrameCursor(self.attempt, self.last)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFilter:
    """Which jobs a page shows. ``None`` does not filter."""

    owner: str | None = None
    states: frozenset[JobState] | None = None
    model: str | None = None


class Page(NamedTuple):
    """A page of jobs, newest first."""

    jobs: list[JobSnapshot]
    has_more: bool


class EventLog(Protocol):
    """Where the facts are kept."""

    @property
    def durable(self) -> bool:
        """Whether what was appended outlives the process."""
        ...

    @property
    def held_bytes(self) -> int:
        """Memory held for bodies, frames and messages, as far as the adapter holds them in memory."""
        ...

    @property
    def records(self) -> RecordLog:
        """Streams of events about other things than jobs, in the same log."""
        ...

    @property
    def items(self) -> ItemLog:
        """The items of batches, many at once."""
        ...

    async def append(
        self, job_id: str, events: Sequence[Event], expected_seq: int, *, deferred: bool = False
    ) -> int:
        """Append ``events`` (at least one, frames among them or not); return the job's new last ``seq``.

        ``expected_seq`` is the last ``seq`` the writer knows of (0 for a new job). Raises SequenceConflict,
        IllegalTransition or DuplicateKeyError, TooManyEventsError where the adapter has a bound to a job's
        events, and appends nothing then; LogUnavailableError when it cannot be written.

        ``deferred``: readable at once, but on disk only as frames are, or with :meth:`settle`. For what
        nobody was told, as most of an attached job: it ends with its connection, and so with the process. A
        new job's id must be one that was never used.
        """
        ...

    async def settle(self, job_id: str, *, frames: bool = False) -> None:
        """Have on disk what was deferred of a job. Raises LogUnavailableError; unknown jobs are ignored.

        ``frames``: those appended so far, too.
        """
        ...

    async def append_frames(
        self, job_id: str, attempt: int, frames: Sequence[bytes], expected_seq: int, at: float
    ) -> int:
        """Append one FramesReceived, numbered on from the attempt's last frame; return the new last ``seq``.

        Readable at once; on disk no later than the job's next :meth:`append`. Waits while the adapter's
        write buffer is full, and raises LogUnavailableError (nothing was appended) if it cannot be emptied.
        Raises SequenceConflict, IllegalTransition and TooManyEventsError as :meth:`append` does; the last one
        while there are numbers left for the events that end the job.
        """
        ...

    async def read(self, job_id: str, after: int = 0, limit: int = 1000) -> list[StoredEvent]:
        """Up to ``limit`` events with ``seq > after``, in order. Raises UnknownJobError."""
        ...

    async def read_frames(self, job_id: str, after: FrameCursor, max_bytes: int = 1 << 18) -> FrameRun | None:
        """The frames of attempt ``after.attempt`` that follow ``after``, about ``max_bytes`` of them.

        At least one frame when there is any; None when there is none (yet). Raises UnknownJobError.
        """
        ...

    def follow(self, job_id: str, after: int = 0) -> AbstractContextManager[Follower]:
        """Replay the events with ``seq > after``, then go on live; ends after the terminal event.

        Slow readers hold nothing up and lose nothing.
        """
        ...

    async def snapshot(self, job_id: str) -> JobSnapshot:
        """The projection of the job's events. Raises UnknownJobError."""
        ...

    async def unfinished(self) -> list[JobSnapshot]:
        """Jobs without a terminal event, in the order they were accepted. :meth:`read` gives their bodies.

        Items of batches are not among them: their batches look after them.
        """
        ...

    async def page(
        self,
        where: JobFilter,
        *,
        limit: int,
        after_id: str | None = None,
        before_id: str | None = None,
    ) -> Page:
        """Jobs newest first: ``limit`` older than ``after_id``, or ``limit`` newer than ``before_id``.

        Expired jobs are not shown; ``message`` is empty (:meth:`snapshot` has it). Raises UnknownJobError
        when the cursor names no known job.
        """
        ...

    async def due(self, now: float, limit: int) -> list[JobSnapshot]:
        """Up to ``limit`` detached jobs whose result's time is up at ``now`` (Unix seconds), earliest first.

        Items of batches are not among them: their results go with their batch. The others stay due until a
        JobExpired is appended. ``message`` is empty.
        """
        ...

    async def next_deadline(self) -> float | None:
        """The earliest ``expires_at`` of a detached job that is not expired yet; None without one."""
        ...

    async def purge(self, before: float, limit: int) -> int:
        """Forget up to ``limit`` jobs without a result since before ``before`` (Unix seconds), oldest first.

        Those are the expired ones and the ended attached ones. Returns how many went; fewer than ``limit``
        means that no more were found. Done in steps too small to hold other writes up; a cancelled or
        failed purge keeps the steps it made. Raises LogUnavailableError.
        """
        ...

    async def redact(self, job_id: str) -> None:
        """Drop the content (body, frames, message), keep the events. Idempotent; unknown jobs are ignored."""
        ...

    async def forget(self, job_id: str) -> None:
        """Drop everything about the job. Idempotent; unknown jobs are ignored."""
        ...

    async def aclose(self) -> None:
        """Write what is buffered and release what is held. The log takes nothing afterwards."""
        ...
