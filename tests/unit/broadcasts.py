"""What the tests of the broadcast share: an upstream that logs first, then publishes, and its readers."""

from collections.abc import Sequence

from actors.broadcast import Broadcast, Subscription
from events.log.base import FrameRun
from events.log.memory import MemoryLog
from events.types import AttemptFailed, AttemptStarted, Event, Failure, JobAccepted, Mode, NextStep
from tests.support.world import CountingTelemetry

JOB = "job"
ACCEPTED = JobAccepted(at=0, owner="", model="m", mode=Mode.STREAM, body=b"")


class Upstream:
    """What an actor does: log first, then publish."""

    def __init__(self, buffer_runs: int = 4) -> None:
        self.log = MemoryLog()
        self.telemetry = CountingTelemetry()
        self.broadcast = Broadcast(JOB, self.log, buffer_runs=buffer_runs, telemetry=self.telemetry)
        self._seq = 0
        self._frames = 0

    async def _append(self, event: Event) -> None:
        self._seq = await self.log.append(JOB, [event], self._seq)

    async def accept(self) -> None:
        await self._append(ACCEPTED)

    async def attempt(self) -> None:
        attempt = self.broadcast.attempt + 1
        await self._append(AttemptStarted(at=0, attempt=attempt, provider="p", upstream_model="m"))
        self.broadcast.attempt = attempt
        self._frames = 0

    async def give_up(self) -> None:
        failure = Failure(502, "api_error", "gone")
        await self._append(
            AttemptFailed(at=0, attempt=self.broadcast.attempt, failure=failure, next=NextStep.RETRY)
        )

    async def send(self, *frames: bytes) -> None:
        attempt = self.broadcast.attempt
        self._seq = await self.log.append_frames(JOB, attempt, frames, self._seq, 0)
        self.broadcast.publish(FrameRun(attempt, self._frames + 1, frames))
        self._frames += len(frames)


async def started(buffer_runs: int = 4) -> Upstream:
    upstream = Upstream(buffer_runs)
    await upstream.accept()
    await upstream.attempt()
    return upstream


async def watched(buffer_runs: int, watchers: int = 1) -> tuple[Upstream, list[Subscription]]:
    """With watchers that were there before the first attempt, and so have nothing to replay."""
    upstream = Upstream(buffer_runs)
    await upstream.accept()
    subscriptions = [upstream.broadcast.subscribe() for _ in range(watchers)]
    await upstream.attempt()
    return upstream, subscriptions


def frames_of(runs: Sequence[FrameRun]) -> list[bytes]:
    return [frame for run in runs for frame in run.frames]


async def rest(subscription: Subscription) -> list[bytes]:
    """Every frame to the end of the stream."""
    frames: list[bytes] = []
    while runs := await subscription.receive():
        frames += frames_of(runs)
    return frames
