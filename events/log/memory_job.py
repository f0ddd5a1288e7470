"""One job in the memory log."""

from bisect import bisect_right
from dataclasses import replace

from events.log.base import FrameCursor, FrameRun
from events.log.content import content_bytes, without_content
from events.log.packed import PackedFrames
from events.projections import JobSnapshot
from events.types import Event, FramesReceived, StoredEvent


class MemoryJob:
    """Its events, and what they lead to. ``stated`` lags behind in what frames change."""

    __slots__ = ("_events", "_packed", "_runs", "frames", "job_id", "key", "seq", "stated")

    def __init__(self, job_id: str) -> None:
        self.job_id = job_id
        self.key: tuple[str, str] | None = None
        """Owner and idempotency key, while it holds one."""
        self.seq = 0
        """Of the last event."""
        self.frames = 0
        """Of the last attempt."""
        self.stated: JobSnapshot | None = None
        """The snapshot after the last event that is no frames."""
        self._events: list[StoredEvent] = []
        """All of them; without those that are packed."""
        self._runs: dict[int, list[FramesReceived]] = {}
        """By attempt; those that have their frames and are not packed."""
        self._packed: PackedFrames | None = None

    def current(self) -> JobSnapshot:
        """The snapshot after the last event."""
        snapshot = self.stated
        if snapshot is None:
            raise ValueError("a job has at least one event")
        if snapshot.last_seq != self.seq or snapshot.frames != self.frames:
            self.stated = snapshot = replace(snapshot, last_seq=self.seq, frames=self.frames)
        return snapshot

    def add(self, event: Event) -> None:
        """Take one more event."""
        self.seq += 1
        self._events.append(StoredEvent(self.job_id, self.seq, event))
        if isinstance(event, FramesReceived):
            self._runs.setdefault(event.attempt, []).append(event)

    def pack(self) -> None:
        """Have what is kept of an ended job take little room."""
        runs = [stored for stored in self._events if isinstance(stored.event, FramesReceived)]
        if runs and sum(map(len, self._runs.values())) == len(runs):
            self._packed = PackedFrames(runs)
            self._events = [stored for stored in self._events if not isinstance(stored.event, FramesReceived)]
            self._runs = {}

    def read(self, after: int, limit: int) -> list[StoredEvent]:
        """See :meth:`events.log.base.EventLog.read`."""
        if self._packed is None:
            return self._events[after : after + limit]
        found = [stored for stored in self._events if stored.seq > after]
        found += self._packed.events(after, limit)
        found.sort(key=lambda stored: stored.seq)
        return found[:limit]

    def read_frames(self, after: FrameCursor, max_bytes: int) -> FrameRun | None:
        """See :meth:`events.log.base.EventLog.read_frames`."""
        if self._packed is not None:
            return self._packed.read(after, max_bytes)
        runs = self._runs.get(after.attempt)
        if not runs or runs[-1].last <= after.frame:
            return None
        index = max(0, bisect_right(runs, after.frame + 1, key=lambda run: run.first) - 1)
        first = after.frame + 1
        if runs[index].first > first:
            # What lies between was redacted.
            return None
        found: list[bytes] = []
        size = 0
        while index < len(runs) and size < max_bytes:
            run = runs[index]
            fresh = run.frames[max(0, first - run.first) :]
            found.extend(fresh)
            size += sum(map(len, fresh))
            index += 1
        return FrameRun(after.attempt, first, tuple(found)) if found else None

    def content_bytes(self) -> int:
        """Bytes of its content."""
        packed = self._packed.content_bytes if self._packed is not None else 0
        return packed + sum(content_bytes(stored.event) for stored in self._events)

    def redact(self) -> None:
        """Drop its content."""
        self._events = [
            StoredEvent(self.job_id, stored.seq, without_content(stored.event)) for stored in self._events
        ]
        self._runs = {}
        if self._packed is not None:
            self._packed.redact()
        self.stated = replace(self.current(), message=b"")
