"""Who follows a job's events loses none of them, whenever the wait is cancelled."""

import math

import trio

from events.log.follow import Bells, Follower
from events.types import Failure, JobFailed, StoredEvent

END = StoredEvent("j", 3, JobFailed(at=2.0, failure=Failure(500, "api_error", "broken")))


async def test_cancelled_while_it_reads_the_end_it_reads_it_again() -> None:
    waits = iter([math.inf])
    found: list[StoredEvent] = []

    async def read(after: int) -> list[StoredEvent]:
        if not found:
            return []
        await trio.sleep(next(waits, 0.0))
        return [stored for stored in found if stored.seq > after]

    async def ended() -> bool:
        """The job ends after the first look into the log."""
        found[:] = [END]
        return True

    with Bells().hang("j") as bell:
        follower = Follower(read, ended, bell, 2)
        with trio.move_on_after(0.0) as heartbeat:
            await follower.receive()
        assert heartbeat.cancelled_caught
        assert await follower.receive() == [END]
        assert await follower.receive() == []
