"""The items of batches in the memory log."""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Protocol

from events.batches import ItemCounts, result_of
from events.errors import LogError, UnknownRecordError
from events.log.items import Item, NewItem
from events.log.records import RecordLog
from events.projections import JobSnapshot
from events.state import JobState
from events.types import Event, JobAccepted, JobCancelled, JobFailed


class _Jobs(Protocol):
    """The memory log. Its methods have no checkpoints, so that several calls are one step."""

    records: RecordLog

    async def append(self, job_id: str, events: Sequence[Event], expected_seq: int) -> int: ...

    async def forget(self, job_id: str) -> None: ...


class MemoryItems:
    """:class:`~events.log.items.ItemLog` over the memory log. Nothing waits, nothing checkpoints."""

    def __init__(self, log: _Jobs, *, known: Callable[[str], JobSnapshot | None]) -> None:
        self._log = log
        self._known = known
        self._ids: dict[str, list[str]] = {}
        """By batch, in order: the number of an item is its place, from 1."""
        self._perhaps_waiting: dict[str, dict[str, None]] = {}

    async def accept(self, items: Sequence[NewItem]) -> None:
        """See the port."""
        accepted: list[str] = []
        try:
            for job_id, events in items:
                await self._log.append(job_id, events, 0)
                accepted.append(job_id)
        except LogError:
            for job_id in accepted:
                await self._log.forget(job_id)  # noqa: ASYNC120 - it has no checkpoint
            raise
        for job_id, events in items:
            first = events[0]
            if isinstance(first, JobAccepted) and first.batch_id is not None:
                self._ids.setdefault(first.batch_id, []).append(job_id)
                self._perhaps_waiting.setdefault(first.batch_id, {})[job_id] = None

    def _items(self, batch_id: str, after: int = 0) -> Iterator[Item]:
        ids = self._ids.get(batch_id, [])
        for index in range(after, len(ids)):
            job = self._known(ids[index])
            if job is not None:
                yield Item(index + 1, job)

    async def counts(self, batch_id: str) -> ItemCounts:
        """See the port."""
        counts = Counter(result_of(item.job).value for item in self._items(batch_id))
        return ItemCounts(**counts)

    async def waiting(self, batch_id: str, after: int, limit: int) -> list[Item]:
        """See the port."""
        found: list[Item] = []
        for item in self._items(batch_id, after):
            if len(found) == limit:
                break
            if item.job.state is JobState.PENDING:
                found.append(item)
        return found

    async def begun(self, batch_id: str) -> list[JobSnapshot]:
        """See the port."""
        return [item.job for item in self._items(batch_id) if item.job.state is JobState.PROCESSING]

    async def results(self, batch_id: str, after: int, *, limit: int, max_bytes: int) -> list[Item]:
        """See the port."""
        found: list[Item] = []
        size = 0
        for item in self._items(batch_id, after):
            if len(found) == limit or size >= max_bytes:
                break
            if item.job.ended:
                found.append(item)
                size += len(item.job.message)
        return found

    async def end_waiting(
        self, batch_id: str, event: JobCancelled | JobFailed, *, but: Collection[str], limit: int
    ) -> int:
        """See the port."""
        ended = 0
        perhaps = self._perhaps_waiting.get(batch_id, {})
        for job_id in list(perhaps):
            if ended == limit:
                break
            job = self._known(job_id)
            if job is None or job.state is not JobState.PENDING:
                del perhaps[job_id]
            elif job_id not in but:
                await self._log.append(job_id, [event], job.last_seq)
                del perhaps[job_id]
                ended += 1
        return ended

    async def forget(self, batch_id: str, limit: int) -> int:
        """See the port."""
        ids = self._ids.get(batch_id, [])
        forgotten = ids[-limit:]
        for job_id in forgotten:
            await self._log.forget(job_id)
        del ids[-limit:]
        if not ids:
            self._ids.pop(batch_id, None)
            self._perhaps_waiting.pop(batch_id, None)
        return len(forgotten)

    async def orphans(self) -> list[str]:
        """See the port."""
        found: list[str] = []
        for batch_id in self._ids:
            try:
                await self._log.records.get(batch_id)
            except UnknownRecordError:
                found.append(batch_id)
        return found
