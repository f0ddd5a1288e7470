"""Results of ended jobs in memory, each until its deadline.

Over a log that keeps nothing beyond the process, this is where results live: bounded by admission, never by
eviction. Room is reserved when a job is accepted, and a full store refuses new reservations; what was
promised is kept even when results turn out larger than reserved.

Over a durable log it is a cache of what the log can always tell again (``evicts``): bounded by dropping what
was not read for longest.
"""

from heapq import heapify, heappop, heappush

from events.errors import EventsError
from events.projections import JobSnapshot

RESERVED_RESULT_BYTES = 4096
"""Room set aside for a result whose size is not known yet."""

STALE_DEADLINES = 64
"""Deadlines of removed snapshots tolerated before the heap is rebuilt, beside one for each kept."""


class SnapshotStoreFullError(EventsError):
    """No room for another result. Nothing was reserved."""


class SnapshotStore:
    """Snapshots of ended jobs by id, each with a deadline. Pure: the caller says what time it is."""

    def __init__(self, max_bytes: int, *, evicts: bool = False) -> None:
        self._max_bytes = max_bytes
        self._evicts = evicts
        self._kept: dict[str, tuple[JobSnapshot, int]] = {}
        self._reserved: dict[str, int] = {}
        self._deadlines: list[tuple[float, str]] = []
        self._bytes = 0

    @property
    def held_bytes(self) -> int:
        """Bytes kept and reserved."""
        return self._bytes

    def __len__(self) -> int:
        return len(self._kept)

    def reserve(self, job_id: str, size_bytes: int) -> None:
        """Set room aside for a job: its request (``size_bytes``) and a result of unknown size.

        Raises SnapshotStoreFullError when that would pass the bound.
        """
        size = size_bytes + RESERVED_RESULT_BYTES
        if self._bytes + size > self._max_bytes:
            raise SnapshotStoreFullError("the result store is full")
        self._reserved[job_id] = size
        self._bytes += size

    def release(self, job_id: str) -> None:
        """Give back what was reserved for a job that will keep nothing. Idempotent."""
        self._bytes -= self._reserved.pop(job_id, 0)

    def reserve_more(self, key: str, size_bytes: int) -> None:
        """Set more room aside for what is kept elsewhere (the items of a batch), until :meth:`release`.

        Raises SnapshotStoreFullError, and reserves nothing then, when that would pass the bound.
        """
        if self._bytes + size_bytes > self._max_bytes:
            raise SnapshotStoreFullError("the result store is full")
        self.correct(key, size_bytes)

    def correct(self, key: str, by_bytes: int) -> None:
        """What is kept under ``key`` turned out larger (smaller, when negative) than reserved."""
        self._reserved[key] = self._reserved.get(key, 0) + by_bytes
        self._bytes += by_bytes

    def put(self, snapshot: JobSnapshot, size_bytes: int) -> None:
        """Keep an ended job's snapshot until its ``expires_at``; replaces its reservation. Always succeeds.

        ``size_bytes`` is what the job holds in all: request, frames and result.
        """
        if snapshot.expires_at is None:
            raise ValueError("only an ended job is kept")
        self.release(snapshot.job_id)
        self.remove(snapshot.job_id)
        self._kept[snapshot.job_id] = (snapshot, size_bytes)
        self._bytes += size_bytes
        if self._evicts:
            while self._bytes > self._max_bytes and self._kept:
                self.remove(next(iter(self._kept)))
        heappush(self._deadlines, (snapshot.expires_at, snapshot.job_id))

    def get(self, job_id: str, now: float) -> JobSnapshot | None:
        """The snapshot, or None when there is none or its deadline has come."""
        kept = self._kept.get(job_id)
        if kept is None:
            return None
        if self._evicts:
            # Insertion order is the order of last use.
            self._kept[job_id] = self._kept.pop(job_id)
        expires_at = kept[0].expires_at
        return kept[0] if expires_at is not None and now < expires_at else None

    def cache(self, snapshot: JobSnapshot) -> None:
        """Put what was read back from the log. Only its result counts: the rest stays on disk."""
        self.put(snapshot, len(snapshot.message) + RESERVED_RESULT_BYTES)

    def remove(self, job_id: str) -> JobSnapshot | None:
        """Drop a snapshot before its deadline."""
        kept = self._kept.pop(job_id, None)
        if kept is None:
            return None
        self._bytes -= kept[1]
        if len(self._deadlines) > 2 * len(self._kept) + STALE_DEADLINES:
            self._deadlines = [
                (snapshot.expires_at, other)
                for other, (snapshot, _) in self._kept.items()
                if snapshot.expires_at is not None
            ]
            heapify(self._deadlines)
        return kept[0]

    def next_deadline(self) -> float | None:
        """The earliest deadline, Unix seconds; None when nothing is kept."""
        while self._deadlines:
            at, job_id = self._deadlines[0]
            kept = self._kept.get(job_id)
            if kept is not None and kept[0].expires_at == at:
                return at
            heappop(self._deadlines)
        return None

    def expire(self, now: float) -> list[JobSnapshot]:
        """Drop and return what is due at ``now``, earliest first."""
        due: list[JobSnapshot] = []
        while (at := self.next_deadline()) is not None and at <= now:
            _, job_id = heappop(self._deadlines)
            snapshot = self.remove(job_id)
            if snapshot is not None:
                due.append(snapshot)
        return due
