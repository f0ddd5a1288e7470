"""How a reader of a log hears that there is more to read: a bell per follower, and the log itself.

A bell carries no data. Whoever hears it reads the log after its own cursor, so a slow follower holds
nothing up, loses nothing and needs no buffer.
"""

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import trio

from events.types import JobCancelled, JobCompleted, JobExpired, JobFailed, StoredEvent

_LAST_EVENTS = (JobCompleted, JobFailed, JobCancelled, JobExpired)


class Bells:
    """The bells of those who follow a job."""

    def __init__(self) -> None:
        self._by_job: dict[str, set[trio.MemorySendChannel[None]]] = {}

    def ring(self, job_id: str) -> None:
        """Wake the job's followers. A bell that is already ringing stays so."""
        for bell in self._by_job.get(job_id, ()):
            try:
                bell.send_nowait(None)
            except trio.WouldBlock:
                continue

    def ring_all(self) -> None:
        """Wake the followers of every job."""
        for job_id in self._by_job:
            self.ring(job_id)

    @contextmanager
    def hang(self, job_id: str) -> Iterator[trio.MemoryReceiveChannel[None]]:
        """A bell for one follower, taken down on leaving."""
        send, receive = trio.open_memory_channel[None](1)
        followers = self._by_job.setdefault(job_id, set())
        followers.add(send)
        try:
            yield receive
        finally:
            followers.discard(send)
            if not followers:
                self._by_job.pop(job_id, None)
            send.close()
            receive.close()


class Follower:
    """Reads a job's events as they come. One task receives; cancelling it loses nothing."""

    def __init__(
        self,
        read: Callable[[int], Awaitable[list[StoredEvent]]],
        ended: Callable[[], Awaitable[bool]],
        bell: trio.MemoryReceiveChannel[None],
        after: int,
    ) -> None:
        """``read(after)`` gives a page of events, ``ended`` answers for a cursor past the terminal event."""
        self._read = read
        self._ended = ended
        self._bell = bell
        self._after = after
        self._over = False

    async def receive(self) -> list[StoredEvent]:
        """The next events, at least one; an empty list after the job's last one, or once it is forgotten.

        Raises UnknownJobError at the first call for a job the log does not hold.
        """
        while not self._over:
            found = await self._read(self._after)
            if found:
                self._after = found[-1].seq
                self._over = isinstance(found[-1].event, _LAST_EVENTS)
                return found
            if await self._ended():
                # It may have ended since the log was read.
                found = await self._read(self._after)
                self._over = True
                self._after = found[-1].seq if found else self._after
                return found
            await self._bell.receive()
        return []
