"""What the tests of the SQLite log share: jobs to write, and a hold on the file that stalls the writer."""

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import trio
from trio.testing import wait_all_tasks_blocked

from events.log.sqlite import SqliteLog
from events.log.sqlite_file import SqliteOptions
from events.types import AttemptStarted, JobAccepted, JobCompleted, Mode

STARTED = AttemptStarted(at=2.0, attempt=1, provider="p", upstream_model="u")


def accepted(*, key: str | None = None, body: bytes = b"{}", detached: bool = True) -> JobAccepted:
    return JobAccepted(
        at=1.0,
        owner="ci",
        model="m",
        mode=Mode.ASYNC,
        body=body,
        detached=detached,
        result_ttl_s=60.0,
        idempotency_key=key,
    )


def completed(message: bytes = b'{"id":"msg"}') -> JobCompleted:
    return JobCompleted(at=3.0, attempt=1, message=message, usage={"output_tokens": 1})


def flushes_every(seconds: float, **others: Any) -> SqliteOptions:
    """What waits for the disk, of either kind, goes there so often."""
    return SqliteOptions(flush_interval_s=seconds, frames_interval_s=seconds, **others)


async def start(log: SqliteLog, job_id: str) -> int:
    """A job that can take frames; its last seq."""
    return await log.append(job_id, [accepted(), STARTED], 0)


@contextmanager
def stalled(path: Path) -> Iterator[sqlite3.Connection]:
    """Hold SQLite's write lock: the log's writer waits for it until the block is left."""
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        try:
            yield other
        finally:
            other.execute("ROLLBACK")


def rows(path: Path, query: str) -> list[tuple[Any, ...]]:
    """What is on disk, committed."""
    with closing(sqlite3.connect(path)) as other:
        return other.execute(query).fetchall()


async def settle() -> None:
    """Until the log has sent what it has to send."""
    for _ in range(5):
        await wait_all_tasks_blocked()


async def until(condition: Callable[[], bool]) -> None:
    """Until the writer, a thread, has made it true; fails after ten seconds."""
    with trio.fail_after(10):
        while not condition():  # noqa: ASYNC110 - the log offers nothing to wait for, only counts
            await trio.lowlevel.checkpoint()
