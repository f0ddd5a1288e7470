"""What the SQLite log holds in memory: the unfinished jobs, and their events that are not yet on disk."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from events.log.base import FrameCursor, FrameRun
from events.log.content import content_bytes, without_content
from events.log.sqlite_rows import check_room
from events.projections import JobSnapshot
from events.types import Event, FramesReceived, StoredEvent

ENDING_EVENTS = 1024
"""Of the events a job can have, those that frames may not take: the job must end, and say how."""

EVENT_OVERHEAD_BYTES = 400
"""What a waiting event is counted with beside its content, so that empty ones are bounded, too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogStatistics:
    """What the log has done since it was opened, and what waits."""

    commits: int
    """Transactions that reached the disk."""
    failed_commits: int
    appends: int
    """Calls of ``append`` that reached the disk."""
    flushed: int
    """Events that waited, and reached the disk with a flush or with an append of their job."""
    largest_batch: int
    """The most appends one commit took."""
    waiting_bytes: int
    """Events, and appends, that wait for the disk now."""

    @property
    def appends_per_commit(self) -> float:
        """Appends that shared a commit, on average."""
        return self.appends / self.commits if self.commits else 0.0


class LiveJob:
    """A job as the log knows it without reading. Its snapshot lags behind in what frames change."""

    __slots__ = (
        "_snapshot",
        "content_stored",
        "deferred",
        "frames",
        "number",
        "pending",
        "pending_bytes",
        "seq",
        "stored",
    )

    def __init__(self, number: int, snapshot: JobSnapshot, *, stored: bool) -> None:
        self.number = number
        self.stored = stored
        """Whether the disk knows of it."""
        self.content_stored = stored
        """Whether the disk has, or is about to have, content of it."""
        self.deferred = False
        """Whether events other than frames are pending."""
        self.pending: list[StoredEvent] = []
        """Events not known to be on disk, without a gap up to the last one."""
        self.pending_bytes = 0
        self.settle(snapshot)

    def settle(self, snapshot: JobSnapshot) -> None:
        """Take on the state after an append."""
        self._snapshot = snapshot
        self.seq = snapshot.last_seq
        self.frames = snapshot.frames

    @property
    def stated(self) -> JobSnapshot:
        """The snapshot after the last append: right in all but ``last_seq`` and ``frames``."""
        return self._snapshot

    def current(self) -> JobSnapshot:
        """The snapshot after the last event."""
        if self._snapshot.last_seq != self.seq:
            self._snapshot = replace(self._snapshot, last_seq=self.seq, frames=self.frames)
        return self._snapshot

    def add(self, run: FramesReceived) -> int:
        """Take one more run; return its size in memory. Raises TooManyEventsError, and takes nothing then."""
        check_room(self.seq + 1, reserved=ENDING_EVENTS)
        self.seq += 1
        self.frames = run.last
        self.pending.append(StoredEvent(self._snapshot.job_id, self.seq, run))
        size = event_bytes(run)
        self.pending_bytes += size
        return size

    def defer(self, events: Sequence[Event], snapshot: JobSnapshot) -> int:
        """Take more events, which lead to ``snapshot``; return their size in memory.

        Raises TooManyEventsError, and takes nothing then.
        """
        check_room(snapshot.last_seq)
        size = 0
        for seq, event in enumerate(events, snapshot.last_seq - len(events) + 1):
            self.pending.append(StoredEvent(snapshot.job_id, seq, event))
            size += event_bytes(event)
        self.settle(snapshot)
        self.deferred = True
        self.pending_bytes += size
        return size

    def sending(self) -> list[Event]:
        """All that is pending, on its way to the disk."""
        self.content_stored = self.content_stored or self._has_content_pending
        return [stored.event for stored in self.pending]

    @property
    def _has_content_pending(self) -> bool:
        return self.pending_bytes > EVENT_OVERHEAD_BYTES * len(self.pending)

    def flushed(self, count: int) -> int:
        """The oldest ``count`` pending events are on disk; return what that frees."""
        self.stored = True
        size = sum(event_bytes(stored.event) for stored in self.pending[:count])
        del self.pending[:count]
        self.deferred = any(not isinstance(stored.event, FramesReceived) for stored in self.pending)
        self.pending_bytes -= size
        return size

    def redacted(self) -> int:
        """Drop the content of what is pending, none of which is on its way; return what that frees."""
        if not self._has_content_pending:
            return 0
        before = self.pending_bytes
        self.pending = [
            StoredEvent(stored.job_id, stored.seq, without_content(stored.event)) for stored in self.pending
        ]
        self.pending_bytes = EVENT_OVERHEAD_BYTES * len(self.pending)
        if self._snapshot.message:
            self._snapshot = replace(self._snapshot, message=b"")
        return before - self.pending_bytes

    def pending_after(self, after: int) -> list[StoredEvent] | None:
        """The events with ``seq > after`` where memory has them all, None where the disk must be read."""
        if after >= self.seq:
            return []
        if self.pending and after >= self.pending[0].seq - 1:
            return self.pending[after + 1 - self.pending[0].seq :]
        return None

    def pending_frames(self, after: FrameCursor, max_bytes: int) -> FrameRun | None:
        """The frames after the cursor where memory has the first of them."""
        found: list[bytes] = []
        size = 0
        for stored in self.pending:
            run = stored.event
            if not isinstance(run, FramesReceived) or run.attempt != after.attempt or run.last <= after.frame:
                continue
            if not found and run.first > after.frame + 1:
                return None
            fresh = run.frames[max(0, after.frame + 1 - run.first) :]
            found.extend(fresh)
            size += sum(map(len, fresh))
            if size >= max_bytes:
                break
        return FrameRun(after.attempt, after.frame + 1, tuple(found)) if found else None


def event_bytes(event: Event) -> int:
    """What a waiting event is counted with."""
    return EVENT_OVERHEAD_BYTES + content_bytes(event)
