"""Who tells a stream that it has been silent: one timer each."""

from collections.abc import Callable

import trio

from actors.timers import Timers


class Beat:
    """One stream's share. Its task alone touches it; :meth:`stop` may come from anywhere."""

    __slots__ = ("_interval_s", "_nudge", "_timer")

    def __init__(self, timers: Timers, interval_s: float, nudge: Callable[[], None]) -> None:
        self._interval_s = interval_s
        self._nudge = nudge
        self._timer = timers.timer(self._silent)
        self.sent()

    def sent(self) -> None:
        """Something left just now."""
        self._timer.set(trio.current_time() + self._interval_s)

    def _silent(self) -> None:
        self._nudge()
        self.sent()

    def stop(self) -> None:
        """No more nudges. Idempotent."""
        self._timer.stop()


class Heartbeat:
    """Nudges each stream when nothing has left it for ``interval_s`` seconds, and again after that."""

    def __init__(self, timers: Timers, interval_s: float) -> None:
        self._timers = timers
        self._interval_s = interval_s

    def watch(self, nudge: Callable[[], None]) -> Beat:
        """Watch a stream, until its beat is stopped. ``nudge`` is synchronous and does not raise."""
        return Beat(self._timers, self._interval_s, nudge)
