"""Memory given back to the system after a burst.

CPython's own allocator returns an arena (1 MiB) only when every object in it is gone: after a burst of jobs a
few long-lived objects, made while it lasted, keep most of what it took. The system's allocator returns single
pages, so the daemon runs on it (:func:`prefer_system_allocator`), and asks for the pages back when a burst of
results has expired (:class:`BurstMemory`). It costs: nothing that could be told from noise on plain calls, 13
to 22% more CPU on floods of frames. ``PYTHONMALLOC=pymalloc`` in the environment chooses the other way.
"""

import ctypes
import gc
import os
import platform
import sys
from collections.abc import Callable, Mapping

BURST_RESULTS = 500
"""So many results expired since the last time make it worth the pause (some tens of milliseconds)."""

_ALLOCATOR = {"PYTHONMALLOC": "malloc", "MALLOC_ARENA_MAX": "1"}


def prefer_system_allocator(environ: Mapping[str, str]) -> None:
    """Start this program again, as the same process, on the system's allocator; or return.

    It returns where that is so already, where the operator has chosen an allocator (``PYTHONMALLOC``), and
    where the system's is not known to return pages (anything but glibc). Call it before anything else.
    """
    if "PYTHONMALLOC" in environ or platform.libc_ver()[0] != "glibc":
        return
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**environ, **_ALLOCATOR})  # noqa: S606 - ourselves


class BurstMemory:
    """Counts expired results, and gives memory back once a burst of them is over."""

    def __init__(self, *, quiet: Callable[[], bool]) -> None:
        """``quiet`` says whether the burst is over."""
        self._quiet = quiet
        self._expired = 0
        self._malloc_trim = _malloc_trim()

    def expired(self, count: int) -> None:
        """``count`` more results are gone (0: it was looked, and none was). Synchronous."""
        self._expired += count
        if self._expired >= BURST_RESULTS and self._quiet():
            self._expired = 0
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
