"""The items of batches: jobs that are accepted by the thousand, wait by the thousand, and end together.

They are jobs as any other: read, followed, listed, appended to and forgotten through the event log itself.
Here is what is asked of many of them at once. Guarantees every adapter gives
(``tests/contracts/test_items.py`` holds them to it):

* ``accept`` and one step of ``end_waiting`` are all or nothing, and durable when they return, as far as the
  log is durable at all.
* An item that waits is not held in memory by a log that has a disk.
* An item has a number, which grows in the order of acceptance: the cursor of what is read in pages.

Whoever ends waiting items writes to no one of them meanwhile.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple, Protocol

from events.batches import ItemCounts
from events.projections import JobSnapshot
from events.types import Event, JobCancelled, JobFailed


class NewItem(NamedTuple):
    """An item to be accepted."""

    job_id: str
    events: Sequence[Event]
    """A JobAccepted with the batch's id; what follows it ends an item that cannot be run."""


class Item(NamedTuple):
    """An item that is there."""

    number: int
    job: JobSnapshot


class ItemLog(Protocol):
    """What is asked of the items of a batch."""

    async def accept(self, items: Sequence[NewItem]) -> None:
        """Append the first events of new jobs, all of them or none.

        Raises SequenceConflict where one of the jobs is there already, IllegalTransition, and
        LogUnavailableError when they cannot be written; none is accepted then.
        """
        ...

    async def counts(self, batch_id: str) -> ItemCounts:
        """How the items of the batch stand."""
        ...

    async def waiting(self, batch_id: str, after: int, limit: int) -> list[Item]:
        """Up to ``limit`` items with ``number > after`` that no attempt was made at, in order."""
        ...

    async def begun(self, batch_id: str) -> list[JobSnapshot]:
        """The items with an attempt under way, or cut off, in order."""
        ...

    async def results(self, batch_id: str, after: int, *, limit: int, max_bytes: int) -> list[Item]:
        """Up to ``limit`` ended items with ``number > after``, in order, each with its Message.

        At least one when there is any; not many more bytes of Messages than ``max_bytes``.
        """
        ...

    async def end_waiting(
        self, batch_id: str, event: JobCancelled | JobFailed, *, but: Collection[str], limit: int
    ) -> int:
        """Append ``event`` to up to ``limit`` of the waiting items, ``but`` aside; return to how many.

        Fewer than ``limit`` means that no more wait. Raises LogUnavailableError, and ends none then.
        """
        ...

    async def forget(self, batch_id: str, limit: int) -> int:
        """Drop up to ``limit`` items and all about them; return how many. Fewer means that none is left.

        Done in steps too small to hold other writes up; a cancelled or failed call keeps those it made.
        Raises LogUnavailableError.
        """
        ...

    async def orphans(self) -> list[str]:
        """The ids of batches that have items, and no record."""
        ...
