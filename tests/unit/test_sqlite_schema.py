import os
import sqlite3
import stat
from pathlib import Path

import pytest

from events.errors import LogOpenError
from events.log.sqlite_reader import unfinished_jobs
from events.log.sqlite_records import UNANNOUNCED
from events.log.sqlite_schema import (
    APPLICATION_ID,
    MIGRATIONS,
    FileLock,
    Migration,
    connect,
    migrate,
    open_database,
)

FUTURE: tuple[Migration, ...] = (
    *MIGRATIONS,
    ("ALTER TABLE jobs ADD COLUMN colour TEXT", "UPDATE jobs SET colour = 'grey'"),
    ("CREATE TABLE paints (colour TEXT)", "INSERT INTO paints SELECT DISTINCT colour FROM jobs"),
)

INSERT_JOB = (
    "INSERT INTO jobs (id, job_id, owner, model, mode, created_at, request_id, may_rerun, state, detached,"
    " result_ttl_s, last_seq, attempt, frames, usage)"
    " VALUES (1, 'j', '', 'm', 'async', 0, '', 1, 'pending', 1, 60, 1, 0, 0, '{}')"
)


def version_of(path: Path) -> int:
    connection = sqlite3.connect(path)
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    connection.close()
    return int(version)


def test_a_new_file_is_private_durable_and_of_the_newest_version(tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    connection = open_database(path)
    pragmas = {
        name: connection.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("journal_mode", "synchronous", "auto_vacuum", "application_id", "user_version")
    }
    assert pragmas == {
        "journal_mode": "wal",
        "synchronous": 2,
        "auto_vacuum": 2,
        "application_id": APPLICATION_ID,
        "user_version": len(MIGRATIONS),
    }
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    connection.execute("BEGIN IMMEDIATE")
    assert stat.S_IMODE(Path(f"{path}-wal").stat().st_mode) == 0o600
    connection.close()


@pytest.mark.parametrize("start", range(1, len(FUTURE) + 1))
def test_a_file_of_every_older_version_is_brought_up_and_keeps_its_jobs(tmp_path: Path, start: int) -> None:
    path = tmp_path / "events.db"
    connection = open_database(path, migrations=FUTURE[:start])
    connection.execute(INSERT_JOB)
    connection.close()
    connection = open_database(path, migrations=FUTURE)
    assert connection.execute("SELECT job_id FROM jobs").fetchall() == [("j",)]
    connection.execute("SELECT colour FROM paints")
    connection.close()
    assert version_of(path) == len(FUTURE)


def test_a_migration_that_fails_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    open_database(path, migrations=FUTURE[:1]).close()
    broken = (*FUTURE[:2], ("CREATE TABLE half (a)", "CREATE TABLE half (a)"))
    with pytest.raises(LogOpenError, match="already exists"):
        open_database(path, migrations=broken)
    assert version_of(path) == 1
    connection = connect(path)
    names = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
    assert "half" not in names
    migrate(connection, FUTURE)
    connection.close()
    assert version_of(path) == len(FUTURE)


def test_a_newer_file_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    open_database(path, migrations=FUTURE).close()
    before = path.read_bytes()
    with pytest.raises(
        LogOpenError, match=r"newer messagesd wrote it \(schema 5; this release knows up to 3\)"
    ):
        open_database(path)
    assert path.read_bytes() == before


def test_another_programs_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.db"
    other = sqlite3.connect(path)
    other.execute("CREATE TABLE notes (text)")
    other.commit()
    other.close()
    before = path.read_bytes()
    with pytest.raises(LogOpenError, match="some other program's database; choose another file"):
        open_database(path)
    assert path.read_bytes() == before


def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "letter.txt"
    path.write_bytes(b"Dear Sir or Madam, " * 100)
    before = path.read_bytes()
    with pytest.raises(LogOpenError, match="no SQLite database"):
        open_database(path)
    assert path.read_bytes() == before


def test_the_lock_names_its_holder_and_ends_with_release(tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    lock = FileLock(path)
    with pytest.raises(
        LogOpenError, match=f"another daemon uses it \\(process {os.getpid()}\\); stop that one"
    ):
        FileLock(path)
    lock.release()
    FileLock(path).release()


def test_jobs_of_the_first_version_read_on_in_the_second(tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    connection = open_database(path, migrations=MIGRATIONS[:1])
    connection.execute(INSERT_JOB)
    connection.close()
    connection = open_database(path, migrations=MIGRATIONS[:2])
    ((_, job),) = unfinished_jobs(connection)
    assert (job.job_id, job.batch_id, job.custom_id, job.webhook, job.lapsed) == (
        "j",
        None,
        None,
        None,
        False,
    )
    plans = {
        "jobs_unfinished": "SELECT id FROM jobs WHERE ended_at IS NULL AND batch_id IS NULL ORDER BY id",
        "jobs_item_states": "SELECT state, lapsed, count(*) FROM jobs WHERE batch_id = 'b' GROUP BY 1, 2",
        "jobs_items": "SELECT job_id FROM jobs WHERE batch_id = 'b' AND id > 7 ORDER BY id LIMIT 9",
        "records_shown": "SELECT state FROM records WHERE kind = 'k' AND owner = 'o' ORDER BY id DESC",
        "records_in_order": "SELECT state FROM records WHERE kind = 'k' ORDER BY id DESC LIMIT 9",
        "records_open": "SELECT state FROM records WHERE kind = 'k' AND open = 1 ORDER BY id",
        "records_due": "SELECT state FROM records WHERE kind = 'k' AND due_at <= 9 ORDER BY due_at",
        "records_about": "SELECT state FROM records WHERE kind = 'k' AND subject = 's' AND subject <> ''",
    }
    for index, query in plans.items():
        plan = " ".join(row[-1] for row in connection.execute(f"EXPLAIN QUERY PLAN {query}"))
        assert index in plan
        assert "TEMP B-TREE" not in plan
    plan = " ".join(row[-1] for row in connection.execute(f"EXPLAIN QUERY PLAN {UNANNOUNCED}", ("k", 9)))
    # Every start asks it of a file that may hold a million jobs.
    assert "jobs_webhook" in plan
    assert "SCAN" not in plan
    connection.close()
