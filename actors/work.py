"""What an actor is given to do, and the stake a watcher has in it."""

from collections.abc import Callable
from dataclasses import dataclass

import orjson
import trio

from actors.providers.base import Provider, ProviderCall
from events.log.base import EventLog
from events.types import AttemptStarted, JobAccepted, Mode


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One job's work."""

    provider: Provider
    model: str
    """The provider's name for the model."""
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
    turn: "Turn | None" = None
    """Work begins when it comes; None: at once."""


def attempt_started(work: Work, *, attempt: int, at: float) -> AttemptStarted:
    """The event that says so."""
    return AttemptStarted(
        at=at,
        attempt=attempt,
        provider=work.provider.name,
        upstream_model=work.model,
        key_name=getattr(work.provider, "key_name", ""),
    )


class Line:
    """Lets so many work at once, in the order in which they joined, whatever order their tasks run in."""

    def __init__(self, places: int) -> None:
        self._free = places
        self._waiting: dict[Turn, None] = {}

    def join(self) -> "Turn":
        """The last turn in line. Synchronous. Whoever joins enters it, if only to be cancelled."""
        turn = Turn(self._leave)
        self._waiting[turn] = None
        self._call()
        return turn

    def _call(self) -> None:
        while self._free and self._waiting:
            turn = next(iter(self._waiting))
            del self._waiting[turn]
            self._free -= 1
            turn.came.set()

    def _leave(self, turn: "Turn") -> None:
        self._waiting.pop(turn, None)
        self._free += turn.came.is_set()
        self._call()


class Turn:
    """A place in a :class:`Line`: entered once it has come, left when the work is over or cancelled."""

    def __init__(self, leave: "Callable[[Turn], None]") -> None:
        self._leave = leave
        self.came = trio.Event()

    async def __aenter__(self) -> None:
        try:
            await self.came.wait()
        except BaseException:
            self._leave(self)
            raise

    async def __aexit__(self, *exc_info: object) -> None:
        self._leave(self)


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


def is_stream(mode: Mode, *, detached: bool, may_detach: bool) -> bool:
    """Whether a job's upstream is run as a stream: all but plain attached ones are."""
    return mode is not Mode.PLAIN or detached or may_detach


async def recall(log: EventLog, job_id: str, model: str) -> ProviderCall:
    """A job's call as it was accepted, for the provider's ``model``. Raises UnknownJobError."""
    accepted = (await log.read(job_id, 0, 1))[0].event
    if not isinstance(accepted, JobAccepted):
        raise TypeError("a job's first event is its acceptance")
    return ProviderCall(accepted.body, orjson.loads(accepted.body), model, accepted.headers)
