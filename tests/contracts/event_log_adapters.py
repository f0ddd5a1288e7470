"""The event logs there are. A new one is added with one line in ``ADAPTERS``."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from events.log.base import EventLog
from events.log.memory import MemoryLog
from events.log.sqlite import open_sqlite_log

OpenLog = Callable[[], AbstractAsyncContextManager[EventLog]]
TEST_TIMEOUT_S = 20


@asynccontextmanager
async def open_memory() -> AsyncIterator[EventLog]:
    async with aclosing(MemoryLog()) as log:
        yield log


@asynccontextmanager
async def open_sqlite() -> AsyncIterator[EventLog]:
    with TemporaryDirectory() as place:
        async with open_sqlite_log(Path(place) / "events.db") as log:
            yield log


ADAPTERS: dict[str, OpenLog] = {
    "memory": open_memory,
    "sqlite": open_sqlite,
}
