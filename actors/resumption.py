"""When a job that an earlier process left may go on: after what is left of its wait, and in its turn."""

from collections.abc import Callable

import trio

from actors.line import Turn
from events.log.base import EventLog
from events.projections import JobSnapshot
from events.types import AttemptFailed

LAST_EVENTS = 2
"""Read of a job that waits: why its attempt failed, and perhaps that it was detached meanwhile."""


async def wait_left_s(log: EventLog, snapshot: JobSnapshot, now: float) -> float:
    """Seconds until the job's next attempt is due, by what was recorded when the last one failed.

    At most the wait that was recorded, also where the clock was set back since; 0 for one that did not wait.
    ``now`` is in Unix seconds. Raises LogUnavailableError.
    """
    if snapshot.failure is None:
        return 0.0
    for stored in await log.read(snapshot.job_id, max(snapshot.last_seq - LAST_EVENTS, 0)):
        match stored.event:
            case AttemptFailed(attempt=snapshot.attempt, at=at, retry_after_s=float(asked_s)):
                return min(max(at + asked_s - now, 0.0), asked_s)
    return 0.0


class Resumption:
    """The turn of such a job. While it waits for the time it was to wait for, it holds no place."""

    def __init__(self, join: Callable[[], Turn] | None, *, after_s: float) -> None:
        """``join`` takes the last turn in line, at once unless there is a wait; None: none is needed."""
        self._join = join
        self._due_at = trio.current_time() + after_s
        self._turn = join() if join is not None and after_s <= 0 else None
        self._waits = after_s > 0

    async def come(self) -> None:
        """Return once it has come. Cancelled, it is left by :meth:`leave`, as always."""
        if self._waits:
            await trio.sleep_until(self._due_at)
            self._waits = False
            self._turn = self._join() if self._join is not None else None
        if self._turn is not None:
            await self._turn.came.wait()

    def leave(self) -> None:
        """Give it back, whether it has come or not. Idempotent."""
        if self._turn is not None:
            self._turn.leave()
