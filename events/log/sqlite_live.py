"""What the SQLite log holds in memory: the unfinished jobs, and their frames that are not yet on disk."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from events.log.base import FrameCursor, FrameRun
from events.projections import JobSnapshot
from events.types import FramesReceived, StoredEvent

RUN_OVERHEAD_BYTES = 400
"""What a waiting FramesReceived is counted with beside its frames, so that empty ones are bounded, too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogStatistics:
    """What the log has done since it was opened, and what waits."""

    commits: int
    """Transactions that reached the disk."""
    failed_commits: int
    appends: int
    """Calls of ``append`` that reached the disk."""
    flushed_runs: int
    """Events of frames that reached the disk."""
    largest_batch: int
    """The most appends one commit took."""
    waiting_bytes: int
    """Frames, and appends, that wait for the disk now."""

    @property
    def appends_per_commit(self) -> float:
        """Appends that shared a commit, on average."""
        return self.appends / self.commits if self.commits else 0.0


class LiveJob:
    """A job as the log knows it without reading. Its snapshot lags behind in what frames change."""

    __slots__ = ("_snapshot", "frames", "number", "pending", "pending_bytes", "seq")

    def __init__(self, number: int, snapshot: JobSnapshot) -> None:
        self.number = number
        self.pending: list[StoredEvent] = []
        """FramesReceived not known to be on disk, without a gap up to the last event."""
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
        """Take one more run; return its size in memory."""
        self.seq += 1
        self.frames = run.last
        self.pending.append(StoredEvent(self._snapshot.job_id, self.seq, run))
        size = run_bytes(run.frames)
        self.pending_bytes += size
        return size

    def flushed(self, runs: int) -> int:
        """The oldest ``runs`` pending runs are on disk; return what that frees."""
        size = sum(
            run_bytes(stored.event.frames)
            for stored in self.pending[:runs]
            if isinstance(stored.event, FramesReceived)
        )
        del self.pending[:runs]
        self.pending_bytes -= size
        return size

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


def run_bytes(frames: Sequence[bytes]) -> int:
    """What a run of frames is counted with."""
    return RUN_OVERHEAD_BYTES + sum(map(len, frames))
