"""Wall time that follows the trio clock."""

import time

import trio


class Clock:
    """Unix time, anchored once and moved on by ``trio.current_time()``.

    Under a ``MockClock`` it therefore jumps with the clock, so that deadlines kept as Unix seconds are as
    exact in tests as any trio timeout. Must be made inside a running trio program.
    """

    __slots__ = ("_offset_s",)

    def __init__(self, *, unix_at_start: float | None = None) -> None:
        start = time.time() if unix_at_start is None else unix_at_start
        self._offset_s = start - trio.current_time()

    def now(self) -> float:
        """Unix seconds."""
        return trio.current_time() + self._offset_s

    def trio_time(self, unix_at: float) -> float:
        """The trio clock's reading at a Unix moment."""
        return unix_at - self._offset_s
