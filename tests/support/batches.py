"""Batches below the wire: a world with them at work."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio

from actors.batch_upload import BatchItem, UploadTerms
from actors.batches import Batch, Batches, BatchLimits
from events.batches import BatchSnapshot
from events.projections import JobSnapshot
from events.types import Failure
from service.logs import make_logger
from service.settings_sections import LoggingSettings
from tests.support.providers import FakeProvider
from tests.support.world import World, open_world

HOUR_S = 3600.0
LIFETIME_S = 24 * HOUR_S
RESULT_TTL_S = 100 * HOUR_S
TERMS = UploadTerms(owner="me", request_id="req_1")
BODY = b'{"model": "m",  "messages": []}'


@dataclass
class BatchWorld:
    """A world with batches."""

    world: World
    batches: Batches

    async def make(self, *items: BatchItem, requests: int = 0, terms: UploadTerms = TERMS) -> str:
        """A batch of these items, or of so many."""
        made = items or [item(str(number)) for number in range(requests)]
        async with self.batches.open_upload(terms) as upload:
            for one in made:
                await upload.add(one)
            batch, _ = await upload.commit()
        return batch.batch_id

    async def look(self, batch_id: str) -> Batch:
        return await self.batches.describe(batch_id, "me")

    async def jobs(self, batch_id: str) -> list[JobSnapshot]:
        """Its items, in order, ended or not."""
        found = await self.world.log.items.results(batch_id, 0, limit=1000, max_bytes=1 << 20)
        found += await self.world.log.items.waiting(batch_id, 0, 1000)
        return [one.job for one in sorted(found)] + await self.world.log.items.begun(batch_id)

    async def until_ended(self, batch_id: str) -> BatchSnapshot:
        with trio.fail_after(LIFETIME_S + HOUR_S):
            while not (found := await self.look(batch_id)).batch.ended:  # noqa: ASYNC110 - a client would, too
                await trio.sleep(1)
        return found.batch


def item(custom_id: str, *, model: str = "m", failure: Failure | None = None) -> BatchItem:
    return BatchItem(custom_id=custom_id, body=BODY, model=model, failure=failure)


@asynccontextmanager
async def open_batches(
    provider: FakeProvider | None = None,
    *,
    others: Sequence[FakeProvider] = (),
    max_running: int = 8,
    per_batch: int = 4,
    max_open: int = 10,
    max_in_flight: int = 1000,
    max_bytes: int = 1 << 20,
) -> AsyncIterator[BatchWorld]:
    provider = provider or FakeProvider()
    async with (
        open_world(
            provider, others=others, max_in_flight=max_in_flight, max_snapshot_bytes=max_bytes
        ) as world,
        trio.open_nursery() as nursery,
    ):
        batches = Batches(
            nursery=nursery,
            log=world.log,
            snapshots=world.snapshots,
            supervisor=world.supervisor,
            clock=world.clock,
            telemetry=world.telemetry,
            logger=make_logger(LoggingSettings(level="debug", format="json"), world.lines),
            limits=BatchLimits(
                max_open=max_open,
                max_running=max_running,
                max_running_per_batch=per_batch,
                max_requests=300,
                max_attempts=3,
                lifetime_s=LIFETIME_S,
                result_ttl_s=RESULT_TTL_S,
            ),
        )
        nursery.start_soon(batches.forget_old)  # noqa: ASYNC113 - nothing here waits for it
        yield BatchWorld(world, batches)
        nursery.cancel_scope.cancel()


def custom_ids(jobs: Sequence[JobSnapshot]) -> list[str | None]:
    return [job.custom_id for job in jobs]
