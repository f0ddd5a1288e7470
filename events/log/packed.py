"""The frames of a job that gets no more of them, close together."""

from array import array
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

from events.log.base import FrameCursor, FrameRun
from events.types import FramesReceived, StoredEvent

_FIELDS = 4
_SEQ, _ATTEMPT, _FIRST, _BASE = range(_FIELDS)


class PackedFrames:
    """The runs of a job: all their frames joined, and numbers that tell where each begins.

    As they came, each frame and each run is an object of its own, which is nearly twice the memory. And what
    is allocated later lies spread over the gaps between so many small ones, which makes every request slower.
    """

    __slots__ = ("_ats", "_ends", "_job_id", "_runs", "_wire")

    def __init__(self, runs: Sequence[StoredEvent]) -> None:
        """``runs`` are one job's, in order, each a FramesReceived that has its frames."""
        self._job_id = runs[0].job_id
        self._ats = array("d")
        self._runs = array("Q")
        """Seq, attempt, number of the first frame, and how many frames of the job come before it."""
        frames: list[bytes] = []
        for stored in runs:
            run = stored.event
            if not isinstance(run, FramesReceived) or not run.frames:
                raise ValueError("only frames are packed")
            self._ats.append(run.at)
            self._runs.extend((stored.seq, run.attempt, run.first, len(frames)))
            frames += run.frames
        self._wire = b"".join(frames)
        self._ends = array("Q", accumulate(map(len, frames), initial=0))
        """Where each frame ends in ``_wire``, after a 0."""

    @property
    def content_bytes(self) -> int:
        """Bytes of all frames."""
        return len(self._wire)

    def redact(self) -> None:
        """Drop the frames; the runs stay."""
        self._wire = b""

    def events(self, after: int, limit: int) -> list[StoredEvent]:
        """Up to ``limit`` runs with ``seq > after``, in order."""
        index = self._index(_SEQ, after + 1)
        return [self._event(at) for at in range(index, min(len(self._ats), index + limit))]

    def read(self, after: FrameCursor, max_bytes: int) -> FrameRun | None:
        """See :meth:`events.log.base.EventLog.read_frames`."""
        index = self._index(_ATTEMPT, after.attempt)
        first = self._base(index)
        until = self._base(self._index(_ATTEMPT, after.attempt + 1))
        start = first + after.frame
        if not self._wire or start >= until:
            return None
        # At least one, and as many as begin before there are enough.
        end = bisect_left(self._ends, self._ends[start] + max_bytes, start + 1, until)
        return FrameRun(after.attempt, after.frame + 1, self._frames(start, end))

    def _index(self, field: int, value: int) -> int:
        """The first run whose ``field`` is at least ``value``; they grow from run to run."""
        return bisect_left(range(len(self._ats)), value, key=lambda at: self._runs[_FIELDS * at + field])

    def _base(self, index: int) -> int:
        """How many frames come before a run, or before the end."""
        if index == len(self._ats):
            return len(self._ends) - 1
        return self._runs[_FIELDS * index + _BASE]

    def _frames(self, start: int, end: int) -> tuple[bytes, ...]:
        ends, wire = self._ends, self._wire
        return tuple(wire[ends[at] : ends[at + 1]] for at in range(start, end))

    def _event(self, index: int) -> StoredEvent:
        seq, attempt, first, base = self._runs[_FIELDS * index : _FIELDS * (index + 1)]
        end = self._base(index + 1)
        frames = self._frames(base, end) if self._wire else ()
        run = FramesReceived(
            at=self._ats[index], attempt=attempt, first=first, frames=frames, count=end - base
        )
        return StoredEvent(self._job_id, seq, run)
