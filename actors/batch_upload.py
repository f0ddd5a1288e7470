"""A batch being made: its items go to the log in chunks as they arrive, and count once it is committed."""

import secrets
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import trio

from actors.batch import record_of
from actors.clock import Clock
from actors.errors import ActorError, OverloadedError
from actors.job import COMMIT_TIMEOUT_S
from actors.submission import new_job_id
from events.batch_codec import encode_batch_event
from events.batches import BatchAccepted, BatchSnapshot, ItemCounts, apply_batch
from events.log.base import EventLog
from events.log.items import NewItem
from events.snapshots import RESERVED_RESULT_BYTES, SnapshotStore, SnapshotStoreFullError
from events.types import Event, Failure, Headers, JobAccepted, JobFailed, Mode

CHUNK_ITEMS = 128
"""Items that go to the log together."""
CHUNK_BYTES = 1 << 20
"""Of their bodies, about."""
ID_BYTES = 14
"""Random bytes of a batch's id, two characters each."""
CLOCK_SLACK_S = 3600.0
"""By how much an item's own time to live exceeds its batch's, so that it is never the first to go."""


class BatchTooLargeError(ActorError):
    """More items than a batch may have."""

    status = 400


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadTerms:
    """What all items of an upload have in common."""

    owner: str
    request_id: str
    headers: Headers = ()
    """``anthropic-*`` headers, forwarded upstream with every item."""
    may_rerun: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchItem:
    """One request of a batch."""

    custom_id: str
    body: bytes
    """The client's bytes."""
    model: str
    failure: Failure | None = None
    """Why it cannot be run; it ends with that at once."""


class Upload:
    """Takes items until it is committed. Made, and cleaned up after, by :class:`actors.batches.Batches`."""

    def __init__(
        self,
        terms: UploadTerms,
        *,
        log: EventLog,
        snapshots: SnapshotStore | None,
        clock: Clock,
        lifetime_s: float,
        result_ttl_s: float,
        max_requests: int,
        admit: Callable[[], None],
        on_commit: Callable[[BatchSnapshot, ItemCounts], None],
    ) -> None:
        """``snapshots`` bounds what a log in memory holds. ``admit`` raises where no batch is taken (now)."""
        self.batch_id = f"msgbatch_{secrets.token_hex(ID_BYTES)}"
        self.committed = False
        self._terms = terms
        self._log = log
        self._snapshots = snapshots
        self._clock = clock
        self._lifetime_s = lifetime_s
        self._result_ttl_s = result_ttl_s
        self._max_requests = max_requests
        self._admit = admit
        self._on_commit = on_commit
        self._chunk: list[NewItem] = []
        self._chunk_bytes = 0
        self._requests = 0
        self._errored = 0

    async def add(self, item: BatchItem) -> None:
        """Take an item. It is in the log, and counts for nothing, some time before the commit returns.

        Raises BatchTooLargeError, OverloadedError where memory has no room for it, and LogError.
        """
        if self._requests == self._max_requests:
            raise BatchTooLargeError(f"requests: more than {self._max_requests} are too many for one batch")
        self._reserve(len(item.body) + RESERVED_RESULT_BYTES)
        at = self._clock.now()
        events: list[Event] = [self._accepted(item, at)]
        if item.failure is not None:
            events.append(JobFailed(at=at, failure=item.failure))
            self._errored += 1
        self._requests += 1
        self._chunk.append(NewItem(new_job_id(), events))
        self._chunk_bytes += len(item.body)
        if len(self._chunk) == CHUNK_ITEMS or self._chunk_bytes >= CHUNK_BYTES:
            await self._flush()

    def _accepted(self, item: BatchItem, at: float) -> JobAccepted:
        return JobAccepted(
            at=at,
            owner=self._terms.owner,
            model=item.model,
            mode=Mode.BATCH,
            body=item.body,
            detached=True,
            result_ttl_s=self._lifetime_s + self._result_ttl_s + CLOCK_SLACK_S,
            headers=self._terms.headers,
            request_id=self._terms.request_id,
            may_rerun=self._terms.may_rerun,
            batch_id=self.batch_id,
            custom_id=item.custom_id,
        )

    def _reserve(self, size_bytes: int) -> None:
        if self._snapshots is None:
            return
        try:
            self._snapshots.reserve_more(self.batch_id, size_bytes)
        except SnapshotStoreFullError:
            raise OverloadedError("too many results are kept; try again later", retry_after_s=30) from None

    async def _flush(self) -> None:
        chunk, self._chunk, self._chunk_bytes = self._chunk, [], 0
        if chunk:
            await self._log.items.accept(chunk)

    async def commit(self) -> tuple[BatchSnapshot, ItemCounts]:
        """Have the batch accepted, with all that was added: it is in the log when this returns, and runs.

        At least one item was added. Cancelled while the acceptance is being committed, it first finishes.
        Raises OverloadedError, LogError, and trio.TooSlowError when the log does not answer in time; nothing
        was accepted then.
        """
        await self._flush()
        self._admit()
        at = self._clock.now()
        accepted = BatchAccepted(
            at=at,
            owner=self._terms.owner,
            requests=self._requests,
            expires_at=at + self._lifetime_s,
            result_ttl_s=self._result_ttl_s,
            request_id=self._terms.request_id,
        )
        batch = apply_batch(None, self.batch_id, accepted)
        counts = ItemCounts(processing=self._requests - self._errored, errored=self._errored)
        with trio.fail_after(COMMIT_TIMEOUT_S, shield=True) if self._log.durable else nullcontext():
            await self._log.records.append(record_of(batch), [encode_batch_event(accepted)], 0)
            self.committed = True
            self._on_commit(batch, counts)
        return batch, counts
