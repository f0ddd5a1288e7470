"""Lets so many work at once; the others wait their turn, first in first out."""

from collections.abc import Callable
from types import TracebackType

import trio


class Line:
    """Places for work, and two queues for them: who waits in the first goes before all of the second.

    Everything here is synchronous. Order is that of joining, whatever order the tasks run in.
    """

    def __init__(self, places: int) -> None:
        self._free = places
        self._taken = 0
        self._waiting: tuple[dict[Turn, None], dict[Turn, None]] = ({}, {})

    @property
    def taken(self) -> int:
        """Places at work."""
        return self._taken

    @property
    def waiting(self) -> int:
        """Turns that have not come yet."""
        return len(self._waiting[0]) + len(self._waiting[1])

    def try_enter(self) -> bool:
        """Take a place if one is free, which means that nobody waits. :meth:`leave` gives it back."""
        if self._free <= 0:
            return False
        self._free -= 1
        self._taken += 1
        return True

    def leave(self) -> None:
        """Give a place back, to whoever is next."""
        self._free += 1
        self._taken -= 1
        self._call()

    def join(self, *, later: bool = False, then: Callable[[], None] | None = None) -> "Turn":
        """The last turn in line; ``later``: behind those who did not say so (batches behind calls).

        ``then`` is called when it comes, in order. Whoever joins enters the turn, if only to be cancelled,
        or leaves it.
        """
        turn = Turn(self._give_up, then)
        self._waiting[later][turn] = None
        self._call()
        return turn

    def _call(self) -> None:
        while self._free > 0:
            queue = self._waiting[0] or self._waiting[1]
            if not queue:
                return
            turn = next(iter(queue))
            del queue[turn]
            self._free -= 1
            self._taken += 1
            turn.come()

    def _give_up(self, turn: "Turn") -> None:
        for queue in self._waiting:
            queue.pop(turn, None)
        if turn.came.is_set():
            self.leave()


class Turn:
    """A place in a :class:`Line`: entered once it has come, left when the work is over or cancelled."""

    def __init__(self, give_up: "Callable[[Turn], None]", then: Callable[[], None] | None) -> None:
        self._give_up = give_up
        self._then = then
        self._left = False
        self.came = trio.Event()

    def come(self) -> None:
        """The line's side: it has come."""
        self.came.set()
        if self._then is not None:
            self._then()

    def leave(self) -> None:
        """Give it back, whether it has come or not. Idempotent."""
        if not self._left:
            self._left = True
            self._give_up(self)

    async def __aenter__(self) -> None:
        try:
            await self.came.wait()
        except BaseException:
            self.leave()
            raise

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.leave()
