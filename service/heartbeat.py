"""Who tells a stream that it has been silent: one task for all of them, with one timer each.

A deadline around every wait of every stream would cost more than the frame it waits for. Here a stream that
has sent something only notes when; its timer is looked at once an interval.
"""

from collections.abc import Callable
from heapq import heapify, heappop, heappush
from itertools import count

import trio


class Beat:
    """One stream's share. Its task alone touches it; :meth:`stop` may come from anywhere."""

    __slots__ = ("active_at", "interval_s", "nudge")

    def __init__(self, interval_s: float, nudge: Callable[[], None]) -> None:
        self.interval_s = interval_s
        self.active_at = trio.current_time()
        self.nudge: Callable[[], None] | None = nudge

    def sent(self) -> None:
        """Something left just now."""
        self.active_at = trio.current_time()

    def stop(self) -> None:
        """No more nudges. Idempotent."""
        self.nudge = None


class Heartbeat:
    """Nudges each stream when nothing has left it for ``interval_s`` seconds, and again after that."""

    SLACK = 256
    """Timers that may be left of streams that are over, beside one for each that is not."""

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._timers: list[tuple[float, int, Beat]] = []
        self._numbers = count()
        self._cleared_at_size = 0
        self._changed = trio.Event()

    @property
    def timers(self) -> int:
        """Timers held, those of streams that are over and not cleared yet among them."""
        return len(self._timers)

    def watch(self, nudge: Callable[[], None]) -> Beat:
        """Watch a stream, until its beat is stopped. ``nudge`` is synchronous and does not raise."""
        beat = Beat(self._interval_s, nudge)
        if len(self._timers) > 2 * self._cleared_at_size + self.SLACK:
            self._clear()
        if not self._timers:
            self._changed.set()
        heappush(self._timers, (beat.active_at + self._interval_s, next(self._numbers), beat))
        return beat

    def _clear(self) -> None:
        self._timers = [timer for timer in self._timers if timer[2].nudge is not None]
        heapify(self._timers)
        self._cleared_at_size = len(self._timers)

    async def run(self) -> None:
        """Nudge until cancelled."""
        while True:
            self._changed = trio.Event()
            if not self._timers:
                await self._changed.wait()
                continue
            await trio.sleep_until(self._timers[0][0])
            self._nudge_the_silent(trio.current_time())

    def _nudge_the_silent(self, now: float) -> None:
        while self._timers and self._timers[0][0] <= now:
            beat = heappop(self._timers)[2]
            if beat.nudge is None:
                continue
            due = beat.active_at + beat.interval_s
            if due <= now:
                beat.nudge()
                due = now + beat.interval_s
            heappush(self._timers, (due, next(self._numbers), beat))
