"""The life of a batch: its events, and their fold. Its items are jobs, and have events of their own.

::

    (nothing) --BatchAccepted--> in_progress --BatchCancelRequested--> canceling
                                     |                                     |
                                     +--BatchEnded--> ended <--BatchEnded--+

Names and states are those of the wire: https://docs.anthropic.com/en/api/creating-message-batches
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from types import MappingProxyType

from events.errors import IllegalTransition
from events.projections import JobSnapshot
from events.state import JobState


class ItemResult(StrEnum):
    """How an item stands, as ``request_counts`` has it."""

    # Not ended: it waits for its turn, or runs.
    PROCESSING = "processing"
    SUCCEEDED = "succeeded"
    ERRORED = "errored"
    CANCELED = "canceled"
    # The time of the batch was up before the item had ended.
    EXPIRED = "expired"


@dataclass(frozen=True, slots=True, kw_only=True)
class ItemCounts:
    """How many items stand how. Their sum is the number of the batch's requests."""

    processing: int = 0
    succeeded: int = 0
    errored: int = 0
    canceled: int = 0
    expired: int = 0

    def moved(self, to: ItemResult, count: int = 1) -> "ItemCounts":
        """The same after ``count`` items that were processing have ended."""
        counts = asdict(self)
        counts["processing"] -= count
        counts[to.value] += count
        return ItemCounts(**counts)


def item_result(state: JobState, *, lapsed: bool) -> ItemResult:
    """How the job of an item stands."""
    match state:
        case JobState.PENDING | JobState.PROCESSING:
            return ItemResult.PROCESSING
        case JobState.COMPLETED:
            return ItemResult.SUCCEEDED
        case JobState.FAILED:
            return ItemResult.ERRORED
        case JobState.CANCELLED:
            return ItemResult.EXPIRED if lapsed else ItemResult.CANCELED
        case JobState.EXPIRED:
            return ItemResult.EXPIRED


def result_of(item: JobSnapshot) -> ItemResult:
    """How an item stands."""
    return item_result(item.state, lapsed=item.lapsed)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchAccepted:
    """The batch and all of its items are in the log. Committed before the client hears of it."""

    at: float
    owner: str
    requests: int
    """How many items it has."""
    expires_at: float
    """Until when an item may end. Unix seconds."""
    result_ttl_s: float
    """How long results stay readable, from the end of the batch."""
    request_id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchCancelRequested:
    """Its owner wants it stopped: no further item is begun, and those that run are cancelled."""

    at: float
    by: str
    """Name of the principal (empty: anonymous)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchEnded:
    """Every item has ended. Terminal."""

    at: float
    counts: ItemCounts


BatchEvent = BatchAccepted | BatchCancelRequested | BatchEnded


class BatchState(StrEnum):
    """Where a batch stands: ``processing_status`` on the wire."""

    IN_PROGRESS = "in_progress"
    CANCELING = "canceling"
    ENDED = "ended"


BATCH_TRANSITIONS: Mapping[BatchState | None, Mapping[type[BatchEvent], BatchState]] = MappingProxyType(
    {
        None: {BatchAccepted: BatchState.IN_PROGRESS},
        BatchState.IN_PROGRESS: {
            BatchCancelRequested: BatchState.CANCELING,
            BatchEnded: BatchState.ENDED,
        },
        BatchState.CANCELING: {BatchEnded: BatchState.ENDED},
        BatchState.ENDED: {},
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSnapshot:
    """A batch as its events tell it. Moments are Unix seconds."""

    batch_id: str
    owner: str
    state: BatchState
    requests: int
    created_at: float
    expires_at: float
    result_ttl_s: float
    last_seq: int = 1
    cancel_initiated_at: float | None = None
    cancelled_by: str = ""
    ended_at: float | None = None
    counts: ItemCounts | None = None
    """How its items ended; None until all have."""
    request_id: str = ""

    @property
    def ended(self) -> bool:
        """Whether every item has ended."""
        return self.state is BatchState.ENDED

    @property
    def results_until(self) -> float | None:
        """When the batch may be forgotten; None while it has not ended."""
        return None if self.ended_at is None else self.ended_at + self.result_ttl_s


def apply_batch(batch: BatchSnapshot | None, batch_id: str, event: BatchEvent) -> BatchSnapshot:
    """One step of the fold. Raises IllegalTransition for an event out of turn."""
    before = batch.state if batch else None
    state = BATCH_TRANSITIONS[before].get(type(event))
    if state is None:
        raise IllegalTransition(f"{type(event).__name__} does not follow {before or 'nothing'}")
    if isinstance(event, BatchAccepted):
        return BatchSnapshot(
            batch_id=batch_id,
            owner=event.owner,
            state=state,
            requests=event.requests,
            created_at=event.at,
            expires_at=event.expires_at,
            result_ttl_s=event.result_ttl_s,
            request_id=event.request_id,
        )
    if batch is None:
        raise AssertionError("the table lets nothing but BatchAccepted come first")
    after = replace(batch, state=state, last_seq=batch.last_seq + 1)
    if isinstance(event, BatchCancelRequested):
        return replace(after, cancel_initiated_at=event.at, cancelled_by=event.by)
    return replace(after, ended_at=event.at, counts=event.counts)


def project_batch(batch_id: str, events: Iterable[BatchEvent]) -> BatchSnapshot:
    """Fold a batch's whole history. Raises ValueError for an empty one, IllegalTransition for a bad one."""
    batch: BatchSnapshot | None = None
    for event in events:
        batch = apply_batch(batch, batch_id, event)
    if batch is None:
        raise ValueError("a batch has at least one event")
    return batch
