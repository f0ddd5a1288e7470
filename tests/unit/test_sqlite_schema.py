import os
import sqlite3
import stat
from contextlib import closing
from pathlib import Path

import pytest

from events.errors import LogOpenError
from events.log.sqlite_reader import EVENTS, FRAMES, unfinished_jobs
from events.log.sqlite_records import UNANNOUNCED
from events.log.sqlite_rows import EVENTS_DELETE, EVENTS_REDACT, MESSAGE
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


OLD_EVENTS = (
    (1, 2, None, None, b"accepted\nstarted", b"body of 1" * 1000),
    (1, 4, 1, 7, b"frames", b"ab"),
    (1, 5, None, None, b"completed", b"message of 1"),
    (2, 1, None, None, b"accepted", b"body of 2"),
    (70_000, 16_777_215, None, None, b"expired", None),
)
"""Job, seq, attempt, last frame, fact, content."""


def test_events_of_the_second_version_keep_job_seq_and_content_in_the_third(tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    with closing(open_database(path, migrations=MIGRATIONS[:2])) as connection:
        connection.executemany("INSERT INTO events VALUES (?, ?, ?, ?, ?, ?)", reversed(OLD_EVENTS))
    told: list[int] = []
    with closing(open_database(path, migrations=MIGRATIONS[:3], on_migration=told.append)) as connection:
        kept = "SELECT id >> 24, id & 0xFFFFFF, attempt, last_frame, fact, content FROM events ORDER BY id"
        assert connection.execute(kept).fetchall() == list(OLD_EVENTS)
        assert connection.execute(FRAMES, (1, 1, 6)).fetchall() == [(4, 1, 7, b"frames", b"ab")]
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    for file in (path, tmp_path / "new.db"):
        open_database(file, migrations=MIGRATIONS[:3], on_migration=told.append).close()
    assert len(told) == 1
    assert told[0] > 0


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        (EVENTS, ["events USING INTEGER PRIMARY KEY (rowid>? AND rowid<?)"]),
        (FRAMES, ["events USING INDEX events_frames (<expr>=? AND attempt=? AND last_frame>?)"]),
        (
            f"SELECT job_id, {MESSAGE} FROM jobs WHERE job_id = 'j'",  # noqa: S608 - constants
            [
                "jobs USING INDEX sqlite_autoindex_jobs_1 (job_id=?)",
                "events USING INTEGER PRIMARY KEY (rowid=?)",
            ],
        ),
        (
            f"SELECT {MESSAGE} FROM jobs WHERE batch_id = 'b' AND id > 7 ORDER BY id LIMIT 9",  # noqa: S608 - same
            [
                "jobs USING INDEX jobs_items (batch_id=? AND id>?)",
                "events USING INTEGER PRIMARY KEY (rowid=?)",
            ],
        ),
        (
            EVENTS_REDACT,
            [
                "events USING INTEGER PRIMARY KEY (rowid=?)",
                "jobs USING COVERING INDEX sqlite_autoindex_jobs_1 (job_id=?)",
                "events USING INTEGER PRIMARY KEY (rowid>? AND rowid<?)",
            ],
        ),
        (
            EVENTS_DELETE,
            [
                "events USING INTEGER PRIMARY KEY (rowid=?)",
                "jobs USING INTEGER PRIMARY KEY (rowid=?)",
                "events USING INTEGER PRIMARY KEY (rowid>? AND rowid<?)",
            ],
        ),
    ],
)
def test_what_is_asked_of_events_goes_to_its_rows(tmp_path: Path, query: str, expected: list[str]) -> None:
    with closing(open_database(tmp_path / "events.db")) as connection:
        values = (None,) * query.count("?")
        plan = [row[-1] for row in connection.execute(f"EXPLAIN QUERY PLAN {query}", values)]
    # All but the array that lists the jobs.
    assert [step.removeprefix("SEARCH ") for step in plan if step.startswith("SEARCH ")] == expected
    assert [step for step in plan if step.startswith("SCAN ") and "wanted VIRTUAL TABLE" not in step] == []
    assert not any("TEMP B-TREE" in step for step in plan)


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
