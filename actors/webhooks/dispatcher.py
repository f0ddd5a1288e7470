"""When which delivery is tried: a queue for each endpoint, and a task for each try.

A delivery that waits is an entry of its endpoint's queue (a moment and an id); only those at work have a
task, at most ``max_concurrency`` for each endpoint. So an endpoint that stalls holds up no other.
"""

from collections.abc import Mapping
from heapq import heappop, heappush
from itertools import count
from math import inf

import structlog
import trio

from actors.clock import Clock
from actors.webhooks.delivery import DeliveryActor
from actors.webhooks.endpoint import Endpoint
from actors.webhooks.store import DeliveryStore
from actors.webhooks.telemetry import WebhookTelemetry


class Lane:
    """One endpoint's queue, and its calls under way."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.in_flight = 0
        self._queue: list[tuple[float, int, str]] = []
        self._numbers = count()

    def put(self, delivery_id: str, due_at: float) -> None:
        """Queue a delivery for ``due_at`` (Unix seconds); of two for one moment the first comes first."""
        heappush(self._queue, (due_at, next(self._numbers), delivery_id))

    @property
    def has_room(self) -> bool:
        """Whether another call may be made now."""
        return self.in_flight < self.endpoint.options.max_concurrency

    @property
    def waiting(self) -> int:
        """Deliveries in the queue."""
        return len(self._queue)

    @property
    def next_at(self) -> float:
        """When the first in the queue is due; infinity without one."""
        return self._queue[0][0] if self._queue else inf

    def is_behind(self, now: float) -> bool:
        """Whether something is due."""
        return self.next_at <= now

    def take(self, now: float) -> str | None:
        """The next delivery that is due, if there is one and room for it. It counts as under way then."""
        if not (self.has_room and self.is_behind(now)):
            return None
        self.in_flight += 1
        return heappop(self._queue)[2]


class Dispatcher:
    """All queues, and the one task that starts what is due."""

    def __init__(
        self,
        endpoints: Mapping[str, Endpoint],
        *,
        store: DeliveryStore,
        clock: Clock,
        telemetry: WebhookTelemetry,
        logger: structlog.typing.FilteringBoundLogger,
    ) -> None:
        self.lanes = {name: Lane(endpoint) for name, endpoint in endpoints.items()}
        self._store = store
        self._clock = clock
        self._telemetry = telemetry
        self._logger = logger
        self._changed = trio.Event()

    @property
    def waiting(self) -> int:
        """Deliveries that are not closed: queued, or under way."""
        return sum(lane.waiting + lane.in_flight for lane in self.lanes.values())

    def put(self, delivery_id: str, endpoint: str, due_at: float) -> None:
        """Try a delivery at ``due_at`` (Unix seconds). Synchronous."""
        self.lanes[endpoint].put(delivery_id, due_at)
        self.changed()

    def changed(self) -> None:
        """Look again: something is queued, or a call is over."""
        self._changed.set()
        self._changed = trio.Event()

    async def run(self) -> None:
        """Start what is due, until cancelled; calls under way are cut off then. Never polls."""
        async with trio.open_nursery() as nursery:
            while True:
                changed = self._changed
                with trio.move_on_at(self._clock.trio_time(self._start_due(nursery))):
                    await changed.wait()

    def _start_due(self, nursery: trio.Nursery) -> float:
        """Start what is due and has room; when to look again, Unix seconds."""
        now = self._clock.now()
        for lane in self.lanes.values():
            while (delivery_id := lane.take(now)) is not None:
                nursery.start_soon(self._deliver, lane, delivery_id)
        return min((lane.next_at for lane in self.lanes.values() if lane.has_room), default=inf)

    async def _deliver(self, lane: Lane, delivery_id: str) -> None:
        actor = DeliveryActor(
            delivery_id,
            lane.endpoint,
            store=self._store,
            clock=self._clock,
            telemetry=self._telemetry,
            logger=self._logger,
        )
        try:
            next_at = await actor.run()
        finally:
            lane.in_flight -= 1
            self.changed()
        if next_at is not None:
            lane.put(delivery_id, next_at)

    async def settle(self) -> None:
        """Wait until nothing is under way, and nothing queued is due. What waits for a later try does."""
        while self._busy():
            await self._changed.wait()

    def _busy(self) -> bool:
        now = self._clock.now()
        return any(lane.in_flight or lane.is_behind(now) for lane in self.lanes.values())
