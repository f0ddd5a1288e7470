"""What an actor is given to do, and the stake a watcher has in it."""

from collections.abc import Callable
from dataclasses import dataclass

import orjson
import trio

from actors.providers.base import ProviderCall
from actors.providers.fallbacks import own_fallbacks
from actors.resumption import Resumption
from actors.targets import Course
from events.errors import LogUnavailableError
from events.log.base import EventLog
from events.projections import JobSnapshot
from events.types import AttemptStarted, JobAccepted, Mode


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One job's work."""

    course: Course
    """Where its attempts go."""
    call: ProviderCall | None
    """None: read back from the log when its turn comes (a job taken up after a restart)."""
    as_stream: bool
    """Run the upstream as a stream (watched, detached and batched jobs), or plain."""
    keeps_result: bool
    """Fold the frames into a Message that outlives the watchers."""
    may_detach: bool = False
    """A DetachJob may come: the actor also listens to its inbox while it works."""
    begun: bool = False
    """The start of its first attempt was recorded together with its acceptance."""
    turn: Resumption | None = None
    """Work begins when it comes; None: at once. A job with a turn has no call yet."""

    def leave(self) -> None:
        """Give back every place and turn. Idempotent."""
        self.course.leave()
        if self.turn is not None:
            self.turn.leave()


def attempt_started(course: Course, *, attempt: int, at: float) -> AttemptStarted:
    """The event that says so."""
    provider, model = course.target.key
    return AttemptStarted(
        at=at, attempt=attempt, provider=provider, upstream_model=model, key_name=course.key_name
    )


class Watch:
    """A watcher's stake in a job. Leaving is synchronous and idempotent."""

    __slots__ = ("_left", "_unwatch")

    def __init__(self, unwatch: Callable[[], None]) -> None:
        self._unwatch = unwatch
        self._left = False

    def leave(self) -> None:
        """Give the stake back. The last one to leave an attached job stops it."""
        if not self._left:
            self._left = True
            self._unwatch()


class Watchers:
    """Who has a stake in a job."""

    __slots__ = ("_gone", "_last_left", "count")

    def __init__(self, last_left: Callable[[], None]) -> None:
        """``last_left`` is called whenever nobody is left, until the job has ended."""
        self._last_left: Callable[[], None] | None = last_left
        self._gone: trio.Event | None = None
        self.count = 0

    def watch(self) -> Watch:
        """One more."""
        self.count += 1
        return Watch(self._left)

    def _left(self) -> None:
        self.count -= 1
        if self.count == 0:
            if self._gone is not None:
                self._gone.set()
            if self._last_left is not None:
                self._last_left()

    def end(self) -> None:
        """The job has ended. It and its watchers no longer refer to each other."""
        self._last_left = None

    async def gone(self) -> None:
        """Wait until nobody is left."""
        if self.count:
            self._gone = trio.Event()
            await self._gone.wait()


def is_stream(mode: Mode, *, detached: bool, may_detach: bool) -> bool:
    """Whether a job's upstream is run as a stream: all but plain attached ones are."""
    return mode is not Mode.PLAIN or detached or may_detach


async def put_on_record(log: EventLog, job_id: str, *, within_s: float, frames: bool = False) -> None:
    """Have on disk what was deferred of a job, and its ``frames`` so far.

    Raises LogUnavailableError, also when it takes too long.
    """
    with trio.move_on_after(within_s):
        await log.settle(job_id, frames=frames)
        return
    raise LogUnavailableError("the event log's disk does not answer")


async def recall(work: Work, log: EventLog, snapshot: JobSnapshot) -> ProviderCall:
    """The job's call as it was accepted, read once its turn has come. Raises UnknownJobError.

    The fallbacks it names are added to its course.
    """
    if work.turn is not None:
        await work.turn.come()
    accepted = (await log.read(snapshot.job_id, 0, 1))[0].event
    if not isinstance(accepted, JobAccepted):
        raise TypeError("a job's first event is its acceptance")
    call = ProviderCall(accepted.body, orjson.loads(accepted.body), accepted.model, accepted.headers)
    work.course.also(snapshot.model, own_fallbacks(call.fields))
    return call
