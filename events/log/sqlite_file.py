"""The file of a SQLite log as it is opened."""

import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from events.errors import CodecError
from events.log import sqlite_reader as reader
from events.log.sqlite_schema import FileLock, Migration, open_database, open_error
from events.projections import JobSnapshot


class OpenedFile(NamedTuple):
    """An opened file, and what was found in it."""

    path: Path
    lock: FileLock
    connection: sqlite3.Connection
    unfinished: list[tuple[int, JobSnapshot]]
    last_number: int


def open_file(path: Path, migrations: Sequence[Migration]) -> OpenedFile:
    """Lock the file, open it, and read what is unfinished in it. Blocks. Raises LogOpenError."""
    path = path.absolute()
    try:
        lock = FileLock(path)
    except OSError as exc:
        raise open_error(path, exc) from exc
    try:
        connection = open_database(path, migrations=migrations)
        try:
            return OpenedFile(
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
