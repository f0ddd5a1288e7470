"""What stands in the way of opening the SQLite log, and what its user is told."""

import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import trio

from events.errors import LogOpenError
from events.log.sqlite import open_sqlite_log
from events.log.sqlite_schema import PAGE_BYTES
from tests.unit.sqlite_files import STARTED, accepted, stalled

NOBODY = 65534
ROOT = Path(__file__).parents[2]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "events.db"


async def must_not_open(path: Path) -> LogOpenError:
    with pytest.raises(LogOpenError) as caught:
        async with open_sqlite_log(path):
            raise AssertionError("it opened")
    assert str(path) in str(caught.value)
    return caught.value


async def some_jobs(path: Path) -> None:
    async with open_sqlite_log(path) as log:
        for number in range(50):
            await log.append(f"job-{number}", [accepted(body=b"x" * 3000), STARTED], 0)


def overwrite(path: Path, offset: int, garbage: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(garbage)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def allow(path: Path, mode: int) -> None:
    path.chmod(mode)


async def test_a_truncated_file_is_told_at_start(path: Path) -> None:
    await some_jobs(path)
    truncate(path)
    error = await must_not_open(path)
    assert "damaged" in error.problem
    assert "backup" in error.remedy


async def test_a_damaged_page_is_told_at_start(path: Path) -> None:
    await some_jobs(path)
    overwrite(path, 6 * PAGE_BYTES, b"\xa5" * 4 * PAGE_BYTES)
    assert "damaged" in (await must_not_open(path)).problem


async def test_a_damaged_job_is_told_at_start(path: Path) -> None:
    await some_jobs(path)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("UPDATE jobs SET state = 'puzzled' WHERE id = 3")
    assert "a stored job is damaged" in str(await must_not_open(path))


async def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    error = await must_not_open(tmp_path / "absent" / "events.db")
    assert error.problem == "its directory does not exist"


async def test_a_directory_in_the_files_place(tmp_path: Path) -> None:
    assert "cannot be written" in (await must_not_open(tmp_path)).problem


@contextmanager
def as_nobody() -> Iterator[None]:
    """Root may write anywhere."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def open_to_all() -> Iterator[Path]:
    """A directory that any user may enter, unlike pytest's own."""
    directory = Path(tempfile.mkdtemp())
    directory.chmod(0o777)
    yield directory
    directory.chmod(0o700)
    shutil.rmtree(directory)


async def test_a_read_only_directory(open_to_all: Path) -> None:
    allow(open_to_all, 0o555)
    with as_nobody():
        error = await must_not_open(open_to_all / "events.db")
    assert "cannot be written (Permission denied)" in error.problem
    assert "right to write" in error.remedy


async def test_a_read_only_file(open_to_all: Path) -> None:
    path = open_to_all / "events.db"
    await some_jobs(path)
    allow(path, 0o444)
    allow(Path(f"{path}.lock"), 0o666)
    with as_nobody():
        assert "cannot be written" in (await must_not_open(path)).problem
    allow(path, 0o600)
    async with open_sqlite_log(path) as log:
        assert len(await log.unfinished()) == 50


async def test_a_file_that_another_program_has_locked(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("events.log.sqlite_schema.BUSY_TIMEOUT_S", 0.01)
    await some_jobs(path)
    with stalled(path):
        assert "another program has it locked" in (await must_not_open(path)).problem
    async with open_sqlite_log(path) as log:
        assert len(await log.unfinished()) == 50


HOLDER = """
import sys, trio
from events.log.sqlite import open_sqlite_log

async def main():
    async with open_sqlite_log(sys.argv[1]):
        print("open", flush=True)
        await trio.to_thread.run_sync(sys.stdin.read)

trio.run(main)
"""


async def test_a_file_that_another_daemon_uses(path: Path) -> None:
    with subprocess.Popen(  # noqa: ASYNC220 - it only starts; the waiting is for one line
        [sys.executable, "-c", HOLDER, path],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        assert await trio.to_thread.run_sync(holder.stdout.readline) == "open\n"
        error = await must_not_open(path)
        assert error.problem == f"another daemon uses it (process {holder.pid})"
        holder.kill()
        await trio.to_thread.run_sync(holder.wait)
    async with open_sqlite_log(path) as log:
        assert await log.append("j", [accepted()], 0) == 1
