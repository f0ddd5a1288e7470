"""How far running jobs have come, told to the endpoints that want to know: as best it can be.

Nothing is recorded and nothing is tried again. Once a second, each job that has new frames is told of with
the cursor after which its stream can be resumed, if its endpoint has a call to spare and the call before is
over. The job's own work costs nothing for it: the ticker looks, nobody reports.
"""

from dataclasses import dataclass
from typing import Protocol

import structlog
import trio

from actors.clock import Clock
from actors.webhooks.client import Answered, NotReached, Outcome
from actors.webhooks.dispatcher import Dispatcher, Lane
from actors.webhooks.telemetry import WebhookTelemetry
from events.deliveries import progress_id, progress_payload
from events.log.base import FrameCursor

TICK_S = 1.0
"""Between two looks at the running jobs: a job is told of at most once in it."""


class Streaming(Protocol):
    """What is looked at of a running job: its actor has it."""

    job_id: str

    @property
    def stream_attempt(self) -> int:
        """The attempt whose frames can be watched; 0 while there was none."""
        ...

    @property
    def frames(self) -> int:
        """Frames received of it."""
        ...


@dataclass(slots=True)
class _Followed:
    """One job under way."""

    job: Streaming
    lane: Lane
    result_url: str
    told: FrameCursor | None = None
    calling: bool = False


class Progress:
    """The ticker and its calls."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        *,
        clock: Clock,
        telemetry: WebhookTelemetry,
        logger: structlog.typing.FilteringBoundLogger,
    ) -> None:
        self._dispatcher = dispatcher
        self._clock = clock
        self._telemetry = telemetry
        self._logger = logger
        self._jobs: dict[str, _Followed] = {}
        self._any = trio.Event()

    def follow(self, job: Streaming, endpoint: str, result_url: str) -> None:
        """Tell ``endpoint`` of a job that starts, if it wants to know. Synchronous."""
        lane = self._dispatcher.lanes.get(endpoint)
        if lane is not None and lane.endpoint.options.progress:
            self._jobs[job.job_id] = _Followed(job, lane, result_url)
            self._any.set()

    def leave(self, job_id: str) -> None:
        """The job is over. Idempotent."""
        self._jobs.pop(job_id, None)

    async def run(self) -> None:
        """Look at the jobs once a second while there are any, until cancelled."""
        async with trio.open_nursery() as nursery:
            while True:
                await self._any.wait()
                self._any = trio.Event()
                while self._jobs:
                    for followed in list(self._jobs.values()):
                        self._look(followed, nursery)
                    await trio.sleep(TICK_S)

    def _look(self, followed: _Followed, nursery: trio.Nursery) -> None:
        cursor = FrameCursor(followed.job.stream_attempt, followed.job.frames)
        # Deliveries come first: they are the ones that are promised.
        idle = (
            not followed.calling and followed.lane.has_room and not followed.lane.is_behind(self._clock.now())
        )
        if cursor.frame and cursor != followed.told and idle:
            followed.told = cursor
            followed.calling = True
            followed.lane.in_flight += 1
            nursery.start_soon(self._call, followed, cursor)

    async def _call(self, followed: _Followed, cursor: FrameCursor) -> None:
        job_id, endpoint, at = followed.job.job_id, followed.lane.endpoint, self._clock.now()
        body = progress_payload(at=at, job_id=job_id, result_url=followed.result_url, cursor=str(cursor))
        outcome: Outcome = NotReached("it crashed")
        try:
            outcome = await endpoint.post(progress_id(job_id, str(cursor)), body, at=at)
        except Exception:
            # The nursery is every job's: what left it here would end them all.
            self._logger.exception("progress crashed", action="webhook.crashed", job_id=job_id)
        finally:
            followed.calling = False
            followed.lane.in_flight -= 1
            self._dispatcher.changed()
        sent = isinstance(outcome, Answered) and 200 <= outcome.status <= 299
        self._telemetry.delivery_tried(endpoint.name, "progress_sent" if sent else "progress_failed")
        if not sent:
            self._logger.debug(
                "progress not told",
                action="webhook.progress_failed",
                job_id=job_id,
                endpoint=endpoint.name,
                status_code=outcome.status if isinstance(outcome, Answered) else None,
                error=None if isinstance(outcome, Answered) else outcome.reason,
            )
