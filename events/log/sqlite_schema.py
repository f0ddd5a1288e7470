"""The file of the SQLite log: its tables, its versions, and the opening of it.

``PRAGMA user_version`` counts the migrations a file has seen; ``PRAGMA application_id`` says that it is one
of ours. Connections commit by themselves; whoever wants a transaction begins one.
"""

import fcntl
import os
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from events.errors import LogOpenError

APPLICATION_ID = 0x6D736764
"""``msgd``."""

BUSY_TIMEOUT_S = 2.0
"""How long a lock of some other program (a backup, an administrator's shell) is waited for."""

CHECKED_FILE_BYTES = 64 << 20
"""Files up to this size are checked page by page when opened; of larger ones, only what is read."""

PAGE_BYTES = 8192
"""Larger pages take large bodies faster, smaller ones small commits; this is the best of both as measured."""

WAL_BYTES = 32 << 20
"""What the write-ahead log is cut back to after it grew beyond this."""

OLDEST_SQLITE = (3, 35, 0)
"""What the SQL used here is tried on: upserts, partial indexes, JSON functions."""

SEQ_BITS = 24
"""The id of an event's row is its job's number and, in so many lower bits, its seq: the file's format."""

MAX_SEQ = (1 << SEQ_BITS) - 1
"""The most events a job can have."""

Migration = Sequence[str]
"""The statements that lead from one version to the next, one each."""

MIGRATIONS: Sequence[Migration] = (
    (
        # In the order of acceptance: the row number is the cursor of pages and part of every event's key.
        """
        CREATE TABLE jobs (
            id INTEGER PRIMARY KEY,
            job_id TEXT NOT NULL UNIQUE,
            owner TEXT NOT NULL,
            model TEXT NOT NULL,
            mode TEXT NOT NULL,
            created_at REAL NOT NULL,
            request_id TEXT NOT NULL,
            may_rerun INTEGER NOT NULL,
            batch_id TEXT,
            idempotency_key TEXT,
            state TEXT NOT NULL,
            detached INTEGER NOT NULL,
            result_ttl_s REAL NOT NULL,
            last_seq INTEGER NOT NULL,
            started_at REAL,
            ended_at REAL,
            expires_at REAL,
            attempt INTEGER NOT NULL,
            frames INTEGER NOT NULL,
            usage TEXT NOT NULL,
            failure TEXT,
            message_seq INTEGER
        )
        """,
        "CREATE UNIQUE INDEX jobs_key ON jobs (owner, idempotency_key) WHERE idempotency_key IS NOT NULL",
        "CREATE INDEX jobs_shown ON jobs (owner, id) WHERE state <> 'expired'",
        "CREATE INDEX jobs_unfinished ON jobs (id) WHERE ended_at IS NULL",
        """
        CREATE INDEX jobs_due ON jobs (expires_at)
            WHERE detached = 1 AND ended_at IS NOT NULL AND state <> 'expired'
        """,
        """
        CREATE INDEX jobs_spent ON jobs (expires_at)
            WHERE ended_at IS NOT NULL AND (detached = 0 OR state = 'expired')
        """,
        # seq is the last one of the row: a row of frames holds the FramesReceived of a whole flush.
        """
        CREATE TABLE events (
            job INTEGER NOT NULL,
            seq INTEGER NOT NULL,
            attempt INTEGER,
            last_frame INTEGER,
            fact BLOB NOT NULL,
            content BLOB,
            PRIMARY KEY (job, seq)
        ) WITHOUT ROWID
        """,
        "CREATE INDEX events_frames ON events (job, attempt, last_frame) WHERE attempt IS NOT NULL",
    ),
    (
        "ALTER TABLE jobs ADD COLUMN custom_id TEXT",
        "ALTER TABLE jobs ADD COLUMN webhook TEXT",
        "ALTER TABLE jobs ADD COLUMN lapsed INTEGER NOT NULL DEFAULT 0",
        # The items of a batch in their order, by how they stand, and without the others: a batch looks after
        # its own, so that they are neither taken up nor expired one by one.
        "CREATE INDEX jobs_items ON jobs (batch_id, id) WHERE batch_id IS NOT NULL",
        "CREATE INDEX jobs_item_states ON jobs (batch_id, state, lapsed) WHERE batch_id IS NOT NULL",
        "DROP INDEX jobs_unfinished",
        "CREATE INDEX jobs_unfinished ON jobs (id) WHERE ended_at IS NULL AND batch_id IS NULL",
        "DROP INDEX jobs_due",
        """
        CREATE INDEX jobs_due ON jobs (expires_at)
            WHERE detached = 1 AND ended_at IS NOT NULL AND state <> 'expired' AND batch_id IS NULL
        """,
        "CREATE INDEX jobs_webhook ON jobs (webhook, ended_at) WHERE webhook IS NOT NULL",
        """
        CREATE TABLE records (
            id INTEGER PRIMARY KEY,
            record_id TEXT NOT NULL UNIQUE,
            kind TEXT NOT NULL,
            owner TEXT NOT NULL,
            subject TEXT NOT NULL,
            created_at REAL NOT NULL,
            last_seq INTEGER NOT NULL,
            open INTEGER NOT NULL,
            due_at REAL,
            state BLOB NOT NULL
        )
        """,
        "CREATE INDEX records_shown ON records (kind, owner, id)",
        "CREATE INDEX records_in_order ON records (kind, id)",
        "CREATE INDEX records_open ON records (kind, id) WHERE open = 1",
        "CREATE INDEX records_due ON records (kind, due_at) WHERE due_at IS NOT NULL",
        "CREATE INDEX records_about ON records (kind, subject, id) WHERE subject <> ''",
        """
        CREATE TABLE record_events (
            record INTEGER NOT NULL,
            seq INTEGER NOT NULL,
            fact BLOB NOT NULL,
            PRIMARY KEY (record, seq)
        ) WITHOUT ROWID
        """,
    ),
    (
        # From here on a row of events may hold several facts, a line each. In a table by row number nearly a
        # page of a row stays where the row is; in one by another key it is a quarter, and the rest of every
        # body takes pages of its own.
        """
        CREATE TABLE events_by_id (
            id INTEGER PRIMARY KEY,
            attempt INTEGER,
            last_frame INTEGER,
            fact BLOB NOT NULL,
            content BLOB
        )
        """,
        f"""
        INSERT INTO events_by_id
            SELECT (job << {SEQ_BITS}) + seq, attempt, last_frame, fact, content FROM events ORDER BY job, seq
        """,  # noqa: S608 - a constant
        "DROP TABLE events",
        "ALTER TABLE events_by_id RENAME TO events",
        f"""
        CREATE INDEX events_frames ON events (id >> {SEQ_BITS}, attempt, last_frame)
            WHERE attempt IS NOT NULL
        """,
    ),
)


class FileLock:
    """The right to be the one process that uses a file. Ends with the process, however that ends."""

    def __init__(self, path: Path) -> None:
        """Raises LogOpenError when another process has it, OSError when the lock file cannot be made."""
        self._file: IO[str] = os.fdopen(_open_private(f"{path}.lock"), "r+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.seek(0)
            holder = self._file.read(20).strip() or "unknown"
            self._file.close()
            raise LogOpenError(
                str(path),
                f"another daemon uses it (process {holder})",
                "stop that one, or give each daemon a file of its own",
            ) from None
        self._file.truncate(0)
        self._file.write(f"{os.getpid()}\n")
        self._file.flush()

    def release(self) -> None:
        """Let others have the file. Idempotent. The lock file stays: removing it would let two in."""
        self._file.close()


def _open_private(path: str | Path) -> int:
    """The descriptor of a file that, where it is made, only its owner may read."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def open_database(
    path: Path,
    *,
    migrations: Sequence[Migration] = MIGRATIONS,
    on_migration: Callable[[int], None] | None = None,
) -> sqlite3.Connection:
    """The connection that writes, its file made or brought to the newest version. The caller has the lock.

    Before an older file, of so many bytes, is brought there, ``on_migration`` is told: it may take seconds
    a GB. Raises LogOpenError. The file is readable for its owner only.
    """
    if sqlite3.sqlite_version_info < OLDEST_SQLITE:
        raise LogOpenError(
            str(path),
            f"this Python has SQLite {sqlite3.sqlite_version}",
            "run the daemon on a Python with SQLite 3.35 or newer",
        )
    try:
        os.close(_open_private(path))
        connection = connect(path)
        try:
            _prepare(connection, path, migrations, on_migration)
        except BaseException:
            connection.close()
            raise
    except (OSError, sqlite3.Error) as exc:
        raise open_error(path, exc) from exc
    return connection


def connect(path: Path, *, read_only: bool = False) -> sqlite3.Connection:
    """A connection that any thread may use, one at a time."""
    connection = sqlite3.connect(
        path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False, cached_statements=64
    )
    if read_only:
        connection.execute("PRAGMA query_only = ON")
    return connection


def _prepare(
    connection: sqlite3.Connection,
    path: Path,
    migrations: Sequence[Migration],
    on_migration: Callable[[int], None] | None,
) -> None:
    version = _pragma(connection, "user_version")
    empty = connection.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,)
    if _pragma(connection, "application_id") != APPLICATION_ID and not empty:
        raise LogOpenError(str(path), "it is some other program's database", "choose another file")
    if version > len(migrations):
        raise LogOpenError(
            str(path),
            f"a newer messagesd wrote it (schema {version}; this release knows up to {len(migrations)})",
            "run that release, or choose another file",
        )
    # Before the first table and before WAL, or they are ignored.
    connection.execute(f"PRAGMA page_size = {PAGE_BYTES}")
    connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
    if connection.execute("PRAGMA journal_mode = WAL").fetchone() != ("wal",):
        raise LogOpenError(
            str(path),
            "its file system cannot hold a write-ahead log",
            "choose a file on a local disk",
        )
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute(f"PRAGMA journal_size_limit = {WAL_BYTES}")
    # Dropped content is overwritten where that costs no extra write.
    connection.execute("PRAGMA secure_delete = FAST")
    size = path.stat().st_size
    if size <= CHECKED_FILE_BYTES:
        found = connection.execute("PRAGMA quick_check(1)").fetchone()
        if found != ("ok",):
            raise sqlite3.DatabaseError(found[0])
    # Not without need: a full disk should not keep a log from being read.
    if version < len(migrations):
        if version > 0 and on_migration is not None:
            on_migration(size)
        migrate(connection, migrations)


def migrate(connection: sqlite3.Connection, migrations: Sequence[Migration]) -> None:
    """Bring the file from its version to the newest in one transaction: it succeeds or changes nothing."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        for migration in migrations[_pragma(connection, "user_version") :]:
            for statement in migration:
                connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {len(migrations)}")
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute("COMMIT")
    except BaseException:
        with suppress(sqlite3.Error):
            connection.execute("ROLLBACK")
        raise


def _pragma(connection: sqlite3.Connection, name: str) -> int:
    (value,) = connection.execute(f"PRAGMA {name}").fetchone()
    return int(value)


def open_error(path: Path, cause: Exception) -> LogOpenError:
    """What went wrong when the file was opened, by the code of the error, and what to do about it."""
    if isinstance(cause, OSError):
        if isinstance(cause, FileNotFoundError):
            return LogOpenError(str(path), "its directory does not exist", "make it, or choose another file")
        return LogOpenError(
            str(path),
            f"it cannot be written ({cause.strerror})",
            "give the daemon's user the right to write to the file and its directory",
        )
    # The lower byte is the kind of error, the upper ones its finer points; set by SQLite errors only.
    match getattr(cause, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF:
        case sqlite3.SQLITE_NOTADB:
            return LogOpenError(str(path), "it is no SQLite database", "choose another file")
        case sqlite3.SQLITE_CORRUPT:
            return LogOpenError(
                str(path),
                f"it is damaged ({cause})",
                "put a backup in its place, or move it away with its -wal and -shm to start anew",
            )
        case sqlite3.SQLITE_FULL:
            return LogOpenError(str(path), "the disk is full", "make room on it")
        case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
            return LogOpenError(str(path), "another program has it locked", "end that program")
        case sqlite3.SQLITE_READONLY | sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_PERM:
            return LogOpenError(
                str(path),
                f"it cannot be written ({cause})",
                "give the daemon's user the right to write to the file and its directory",
            )
        case _:
            return LogOpenError(str(path), f"{cause}", "check the disk")
