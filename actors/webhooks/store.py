"""The deliveries in the log: records of the kind ``delivery``, about their jobs."""

from collections.abc import Sequence
from typing import NamedTuple

from events.deliveries import (
    DeliveryEvent,
    DeliverySnapshot,
    apply,
    decode_snapshot,
    encode,
    encode_snapshot,
)
from events.errors import UnknownRecordError
from events.log.records import Record, RecordLog

KIND = "delivery"


class DeliveryPage(NamedTuple):
    """A page of deliveries, newest first."""

    deliveries: list[DeliverySnapshot]
    has_more: bool


class DeliveryStore:
    """Reads and writes deliveries. A closed one has a moment from which it may be forgotten."""

    def __init__(self, records: RecordLog, *, history_s: float) -> None:
        """``history_s``: kept so long after its end, and after its job's result is gone."""
        self._records = records
        self._history_s = history_s

    async def append(
        self, snapshot: DeliverySnapshot | None, delivery_id: str, *events: DeliveryEvent
    ) -> DeliverySnapshot:
        """Append events to a delivery (``snapshot`` None: a new one); how it stands then.

        Raises IllegalTransition, SequenceConflict when it is not as ``snapshot`` says, LogUnavailableError.
        """
        seq = snapshot.last_seq if snapshot else 0
        for event in events:
            snapshot = apply(snapshot, delivery_id, event)
        if snapshot is None:
            raise ValueError("an append has at least one event")
        await self._records.append(self._record(snapshot), [encode(event) for event in events], seq)
        return snapshot

    def _record(self, snapshot: DeliverySnapshot) -> Record:
        # What is open is found by its openness; when its time comes is known to whoever delivers it.
        ended_at = snapshot.ended_at
        kept_until = None if ended_at is None else max(ended_at, snapshot.result_expires_at) + self._history_s
        return Record(
            record_id=snapshot.delivery_id,
            kind=KIND,
            owner=snapshot.owner,
            created_at=snapshot.created_at,
            last_seq=snapshot.last_seq,
            open=snapshot.pending,
            due_at=kept_until,
            state=encode_snapshot(snapshot),
            subject=snapshot.job_id,
        )

    async def get(self, delivery_id: str) -> DeliverySnapshot:
        """How it stands. Raises UnknownRecordError, also for a record of another kind."""
        record = await self._records.get(delivery_id)
        if record.kind != KIND:
            raise UnknownRecordError(f"no delivery {delivery_id}")
        return decode_snapshot(record.state)

    async def open(self) -> list[DeliverySnapshot]:
        """Those with work left, in the order they came."""
        return _decoded(await self._records.open(KIND))

    async def page(self, *, limit: int, after_id: str | None, before_id: str | None) -> DeliveryPage:
        """Newest first, everybody's. Raises UnknownRecordError for a cursor that is none."""
        page = await self._records.page(KIND, None, limit=limit, after_id=after_id, before_id=before_id)
        return DeliveryPage(_decoded(page.records), page.has_more)

    async def about(self, job_id: str) -> list[DeliverySnapshot]:
        """Those of a job."""
        return _decoded(await self._records.about(KIND, job_id))

    async def spent(self, now: float, limit: int) -> list[DeliverySnapshot]:
        """Up to ``limit`` closed ones that may be forgotten at ``now`` (Unix seconds), oldest first."""
        return _decoded(await self._records.due(KIND, now, limit))

    async def forget(self, delivery_id: str) -> None:
        """Drop it. Idempotent."""
        await self._records.forget(delivery_id)


def _decoded(records: Sequence[Record]) -> list[DeliverySnapshot]:
    return [decode_snapshot(record.state) for record in records]
