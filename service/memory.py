"""Memory given back to the system after a burst.

CPython's allocator returns an arena (1 MiB) only when every object in it is gone, so that one long-lived
object that happened to be made during a burst keeps a whole arena. What is left of a burst of jobs is just
such objects: numbers behind metrics, cancelled timers that trio drops lazily, free lists. Here they are made
anew, which moves them into the arenas that are fullest, and the empty ones go.
"""

import ctypes
import gc
import sys
from collections.abc import Callable

import trio

BURST_RESULTS = 500
"""So many results expired since the last time make it worth the pause (some tens of milliseconds)."""
_STALE_TIMERS = 1100  # trio prunes its heap of timers once a thousand of them are stale
_FAR_S = 86_400.0


class BurstMemory:
    """Counts expired results, and gives memory back once a burst of them is over."""

    def __init__(self, *, renew: Callable[[], None], quiet: Callable[[], bool]) -> None:
        """``renew`` makes long-lived small objects anew; ``quiet`` says whether the burst is over."""
        self._renew = renew
        self._quiet = quiet
        self._expired = 0
        self._malloc_trim = _malloc_trim()

    async def expired(self, count: int) -> None:
        """``count`` more results are gone."""
        self._expired += count
        if self._expired >= BURST_RESULTS and self._quiet():
            self._expired = 0
            await self.give_back()

    async def give_back(self) -> None:
        """Do it now. Cancelled in the middle, it leaves the rest for the next time."""
        for _ in range(_STALE_TIMERS):
            with trio.move_on_after(_FAR_S):  # noqa: ASYNC100 - only to be a stale timer
                pass
        # trio looks after its timers once a round.
        await trio.lowlevel.checkpoint()
        await trio.lowlevel.checkpoint()
        gc.collect()
        self._renew()
        gc.collect()
        self._malloc_trim(0)


def _malloc_trim() -> Callable[[int], object]:
    """glibc's, or nothing where there is none."""
    if sys.platform == "linux":
        try:
            trim: Callable[[int], object] = ctypes.CDLL(None).malloc_trim
        except (OSError, AttributeError):
            pass
        else:
            return trim
    return lambda _pad: None
