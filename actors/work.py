"""What an actor is given to do, and the stake a watcher has in it."""

from collections.abc import Callable
from dataclasses import dataclass

import trio

from actors.providers.base import Provider, ProviderCall
from events.types import Mode


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
    turn: trio.Semaphore | None = None
    """Work begins when this gives way, first in first out; None: at once."""


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
