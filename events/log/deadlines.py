"""Moments that somebody waits for, earliest first."""

from heapq import heapify, heappop, heappush


class Deadlines:
    """Ids by a moment. An entry whose id has gone on to another moment, or is gone, is passed over."""

    SLACK = 64
    """Entries passed over that may stay, beside one for each that counts, before the heap is rebuilt."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, str]] = []
        self._at: dict[str, float] = {}

    def set(self, id_: str, at: float) -> None:
        """Put ``id_`` at a moment, wherever it was before."""
        self._at[id_] = at
        heappush(self._heap, (at, id_))
        self._shorten()

    def remove(self, id_: str) -> None:
        """Take it out. Idempotent."""
        self._at.pop(id_, None)
        self._shorten()

    def _shorten(self) -> None:
        if not self._at:
            self._heap.clear()
        elif len(self._heap) > 2 * len(self._at) + self.SLACK:
            self._heap = [(at, id_) for id_, at in self._at.items()]
            heapify(self._heap)

    def first(self) -> tuple[float, str] | None:
        """The earliest entry."""
        while self._heap and self._at.get(self._heap[0][1]) != self._heap[0][0]:
            heappop(self._heap)
        return self._heap[0] if self._heap else None

    def until(self, moment: float, limit: int) -> list[tuple[float, str]]:
        """Up to ``limit`` entries not later than ``moment``, earliest first. They stay."""
        # An id that came back to a moment it was at before is in the heap twice.
        found: dict[tuple[float, str], None] = {}
        while len(found) < limit and (entry := self.first()) is not None and entry[0] <= moment:
            found[heappop(self._heap)] = None
        for entry in found:
            heappush(self._heap, entry)
        return list(found)
