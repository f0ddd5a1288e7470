"""The file of the SQLite log, opened; what was found in it, and the bounds of its use."""

import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from events.errors import CodecError
from events.log import sqlite_reader as reader
from events.log.sqlite_schema import FileLock, Migration, open_database, open_error
from events.projections import JobSnapshot

READERS = 4
"""Connections that read, each in a worker thread."""

FLUSH_INTERVAL_S = 0.25
"""How long what is deferred waits for the disk, in real time."""

FRAMES_INTERVAL_S = 1.0
"""How long frames wait for it: what a power cut may take of a stream. Nothing that was promised hangs on
them: after a restart a job's frames come anew, or it has failed."""

MAX_UNFLUSHED_BYTES = 64 << 20
"""Frames that wait for the disk; beyond, `append_frames` waits."""

MAX_QUEUED_BYTES = 256 << 20
"""Appends that wait for the disk; beyond, `append` is refused: the disk does not keep up."""

CLOSE_TIMEOUT_S = 10.0
"""How long, in real time, closing waits for the writer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SqliteOptions:
    """Bounds of a :class:`SqliteLog`; each is explained where its default is defined."""

    readers: int = READERS
    flush_interval_s: float = FLUSH_INTERVAL_S
    frames_interval_s: float = FRAMES_INTERVAL_S
    max_unflushed_bytes: int = MAX_UNFLUSHED_BYTES
    max_queued_bytes: int = MAX_QUEUED_BYTES
    close_timeout_s: float = CLOSE_TIMEOUT_S


class LogFile(NamedTuple):
    """An opened file, and what was found in it."""

    path: Path
    lock: FileLock
    connection: sqlite3.Connection
    unfinished: list[tuple[int, JobSnapshot]]
    last_number: int


def open_file(
    path: Path, migrations: Sequence[Migration], on_migration: Callable[[int], None] | None
) -> LogFile:
    """Lock and open it; the caller has both then. Blocks. Raises LogOpenError, and holds nothing then."""
    path = path.absolute()
    try:
        lock = FileLock(path)
    except OSError as exc:
        raise open_error(path, exc) from exc
    try:
        connection = open_database(path, migrations=migrations, on_migration=on_migration)
        try:
            return LogFile(
                path, lock, connection, reader.unfinished_jobs(connection), reader.last_number(connection)
            )
        except BaseException:
            connection.close()
            raise
    except (CodecError, sqlite3.Error) as exc:
        lock.release()
        raise open_error(path, exc) from exc
    except BaseException:
        lock.release()
        raise
