"""Deadlines that are moved far more often than they run out: one task for all of them.

A cancel scope around each wait costs more than the frame that is waited for. Here a deadline is a number;
moving it on is an assignment, and one task looks at it when it could first have run out.
"""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from heapq import heapify, heappop, heappush
from itertools import count
from math import inf

import trio


class Timer:
    """One deadline at a time, none at first. Made by :meth:`Timers.timer`; belongs to one task."""

    __slots__ = ("_expire", "_queued_at", "_timers", "at")

    def __init__(self, timers: "Timers", expire: Callable[[], None]) -> None:
        self._timers = timers
        self._expire: Callable[[], None] | None = expire
        self._queued_at = inf
        self.at = inf
        """When it runs out, by trio's clock; inf: it does not."""

    def set(self, at: float) -> None:
        """Run out at this moment, and at no other that was set before; one that has passed is now."""
        self.at = at
        if at < self._queued_at:
            self._queued_at = at
            self._timers.queue(self, at)

    def stop(self) -> None:
        """Never again. Idempotent, and safe from anywhere."""
        self.at = inf
        self._expire = None

    def waits_for(self, queued_at: float) -> bool:
        """For the task: whether anything may come of the entry for that moment."""
        return queued_at == self._queued_at and self._expire is not None

    def due(self, queued_at: float, now: float) -> None:
        """For the task: the moment it was queued for has come."""
        if queued_at != self._queued_at or self._expire is None:
            # It was queued again for an earlier one, or is over.
            return
        self._queued_at = inf
        if self.at <= now:
            self.at = inf
            self._expire()
        elif self.at < inf:
            self.set(self.at)


class Timers:
    """All timers, and the task that watches them, :meth:`run`. Without it none runs out."""

    SLACK = 256
    """Entries that may be left of what was stopped or set earlier, beside as many as there are of others."""

    def __init__(self) -> None:
        self._queue: list[tuple[float, int, Timer]] = []
        self._numbers = count()
        self._cleared_at_size = 0
        self._earlier = trio.Event()

    def __len__(self) -> int:
        """Entries held, those that nothing will come of and that were not cleared yet among them."""
        return len(self._queue)

    def timer(self, expire: Callable[[], None]) -> Timer:
        """A timer. ``expire`` is called when it runs out: it is synchronous and does not raise."""
        return Timer(self, expire)

    def queue(self, timer: Timer, at: float) -> None:
        """For a timer: have it looked at then."""
        if len(self._queue) > 2 * self._cleared_at_size + self.SLACK:
            self._clear()
        if not self._queue or at < self._queue[0][0]:
            self._earlier.set()
        heappush(self._queue, (at, next(self._numbers), timer))

    def _clear(self) -> None:
        self._queue = [entry for entry in self._queue if entry[2].waits_for(entry[0])]
        heapify(self._queue)
        self._cleared_at_size = len(self._queue)

    async def run(self) -> None:
        """Watch until cancelled."""
        while True:
            self._earlier = trio.Event()
            with trio.move_on_at(self._queue[0][0] if self._queue else inf):
                await self._earlier.wait()
            now = trio.current_time()
            while self._queue and self._queue[0][0] <= now:
                at, _, timer = heappop(self._queue)
                timer.due(at, now)


@asynccontextmanager
async def open_timers() -> AsyncIterator[Timers]:
    """Timers with their task, for whoever has no nursery at hand."""
    timers = Timers()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(timers.run)  # noqa: ASYNC113 - what is set before it begins is seen then
        yield timers
        nursery.cancel_scope.cancel()
