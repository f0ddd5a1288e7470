"""When Python's cycle collector has its turn."""

import gc
from collections.abc import Callable

import trio

YOUNG_OBJECTS = 50_000
"""New objects before the cycle collector looks at them, once: some milliseconds."""
OLDER_LOOKS = 1_000
"""Such looks before one at all that they left, should no full one have come before."""

COLLECT_EVERY_S = 60.0
"""A full collection when so much time has passed and little is under way."""
COLLECT_AT_LATEST_S = 900.0
"""A full collection in any case."""
CALM_JOBS = 200
"""With so few jobs in flight a full collection is a short pause."""
LOOK_EVERY_S = 1.0
"""How often it is seen whether one is due."""


def tune_collector() -> None:
    """Let the cycle collector look at what is new, once, and never at what was there at the start.

    A job's objects go by their reference counts; a third of the time of a burst went into looking for
    cycles among them, and with thousands of jobs in flight each look at all of them held everything up for
    hundreds of milliseconds. What forms cycles and lives long is left to :class:`Collector`. For the
    daemon's own process: it is a setting of the whole interpreter.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, OLDER_LOOKS, OLDER_LOOKS)


class Collector:
    """Collects cycles among what lives longer, at a moment when that is a short pause."""

    def __init__(self, *, in_flight: Callable[[], int]) -> None:
        """``in_flight`` counts the jobs under way."""
        self._in_flight = in_flight

    async def run(self) -> None:
        """Collect until cancelled."""
        last_at = trio.current_time()
        while True:
            await trio.sleep(LOOK_EVERY_S)
            waited_s = trio.current_time() - last_at
            calm = self._in_flight() <= CALM_JOBS
            if waited_s >= COLLECT_AT_LATEST_S or (waited_s >= COLLECT_EVERY_S and calm):
                gc.collect()
                last_at = trio.current_time()
