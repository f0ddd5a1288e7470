"""What disks, other programs and sudden ends do to the SQLite log."""

import os
import resource
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import trio

from events.errors import LogUnavailableError
from events.log.base import FrameCursor
from events.log.sqlite import SqliteLog, open_sqlite_log
from tests.unit.sqlite_files import accepted, completed, flushes_every, rows, start, until

ROOT = Path(__file__).parents[2]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "events.db"


@contextmanager
def full_disk(log: SqliteLog) -> Iterator[None]:
    """SQLite's own bound on the file's pages: SQLITE_FULL, as a full disk gives it."""
    connection = log._commit._writer._connection
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    connection.execute(f"PRAGMA max_page_count = {pages}")
    yield
    connection.execute("PRAGMA max_page_count = 1000000000")


@contextmanager
def failing_writes(path: Path) -> Iterator[None]:
    """No file of this process may grow beyond what the write-ahead log has now: writes to it fail (EFBIG)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (Path(f"{path}-wal").stat().st_size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("fault", ["full", "failing"])
async def test_a_disk_that_refuses_writes_is_told_to_each_caller_and_recovered_from(
    path: Path, fault: str
) -> None:
    big = accepted(body=b"x" * 100_000, key="k")
    async with open_sqlite_log(path) as log:
        seq = await start(log, "j")
        seq = await log.append_frames("j", 1, [b"before"], seq, 2.0)
        with full_disk(log) if fault == "full" else failing_writes(path):
            refused: list[str] = []

            async def submit(job_id: str) -> None:
                with pytest.raises(LogUnavailableError, match="cannot be written"):
                    await log.append(job_id, [big], 0)
                refused.append(job_id)

            async with trio.open_nursery() as nursery:
                for number in range(10):
                    nursery.start_soon(submit, f"refused-{number}")
            assert len(refused) == 10
            # Frames are taken, and read, while memory has room for them; the end of a job is not.
            seq = await log.append_frames("j", 1, [b"during"], seq, 2.0)
            with pytest.raises(LogUnavailableError):
                await log.append("j", [completed(b"m" * 100_000)], seq)
            run = await log.read_frames("j", FrameCursor(1, 0))
            assert run is not None
            assert run.frames == (b"before", b"during")
            assert [job.job_id for job in await log.unfinished()] == ["j"]
            assert log.statistics.failed_commits >= 2
        assert await log.append("refused-3", [big], 0) == 1
        assert await log.append("j", [completed(b"m" * 100_000)], seq) == seq + 1
        run = await log.read_frames("j", FrameCursor(1, 0))
        assert run is not None
        assert run.frames == (b"before", b"during")
    async with open_sqlite_log(path) as log:
        assert [job.job_id for job in await log.unfinished()] == ["refused-3"]
        assert (await log.snapshot("j")).message == b"m" * 100_000


async def test_frames_beyond_memory_are_refused_while_the_disk_is_full_and_taken_afterwards(
    path: Path,
) -> None:
    options = flushes_every(3600.0, max_unflushed_bytes=100_000)
    async with open_sqlite_log(path, options=options) as log:
        seq = await start(log, "j")
        with full_disk(log):
            seq = await log.append_frames("j", 1, [b"x" * 90_000], seq, 2.0)
            with pytest.raises(LogUnavailableError, match="full"):
                await log.append_frames("j", 1, [b"y" * 90_000], seq, 2.0)
        seq = await log.append_frames("j", 1, [b"z" * 90_000], seq, 2.0)
        await log.append("j", [completed()], seq)
        assert rows(path, "SELECT sum(length(content)) FROM events WHERE attempt = 1") == [(180_000,)]


async def test_frames_that_could_not_be_flushed_are_tried_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("events.log.sqlite_commit.RETRY_S", 0.001)
    async with open_sqlite_log(path, options=flushes_every(0.001)) as log:
        seq = await start(log, "j")
        with full_disk(log):
            await log.append_frames("j", 1, [b"x" * 90_000], seq, 2.0)
            await until(lambda: log.statistics.failed_commits >= 3)
            assert log.held_bytes > 90_000
        await until(lambda: log.held_bytes == 0)


async def test_frames_lost_because_the_disk_stayed_full_are_told_when_closing(path: Path) -> None:
    async with open_sqlite_log(path, options=flushes_every(3600.0)) as log:
        seq = await start(log, "j")
        await log.append_frames("j", 1, [b"x" * 90_000], seq, 2.0)
        log._commit._writer._connection.execute("PRAGMA max_page_count = 1")
        with pytest.raises(LogUnavailableError, match="full"):
            await log.aclose()
    async with open_sqlite_log(path) as log:
        assert (await log.snapshot("j")).frames == 0


async def test_a_page_that_goes_bad_while_it_runs_is_told_to_its_reader_only(path: Path) -> None:
    async with open_sqlite_log(path) as log:
        seq = await start(log, "j")
        await log.append("j", [completed()], seq)
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("UPDATE events SET fact = CAST('garbage' AS BLOB) WHERE id & 0xFFFFFF = 2")
        with pytest.raises(LogUnavailableError, match="cannot be read"):
            await log.read("j")
        assert (await log.snapshot("j")).message == b'{"id":"msg"}'
        assert await log.append("k", [accepted()], 0) == 1


# A file system of its own size: what a full disk does, nothing simulated.
SMALL_DISK = """
import sys, trio
from events.errors import LogUnavailableError
from events.log.sqlite import open_sqlite_log
from tests.unit.sqlite_files import accepted
from pathlib import Path

async def main():
    ballast = [Path(sys.argv[1], name) for name in ("one", "two")]
    for file in ballast:
        file.write_bytes(bytes(1 << 20))
    async with open_sqlite_log(sys.argv[1] + "/events.db") as log:
        told, refused = [], 0
        for number in range(2000):
            try:
                await log.append(f"job-{number}", [accepted(body=b"x" * 20_000)], 0)
            except LogUnavailableError:
                refused += 1
                if refused == 5:
                    ballast.pop().unlink()
                if refused > 5:
                    break
            else:
                told.append(f"job-{number}")
        unfinished = [job.job_id for job in await log.unfinished()]
        assert unfinished == told, "in memory"
        ballast.pop().unlink()
    async with open_sqlite_log(sys.argv[1] + "/events.db") as log:
        assert [job.job_id for job in await log.unfinished()] == told, "on disk"
    print("refused", refused)

trio.run(main)
"""


async def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    unshare = shutil.which("unshare")
    script = tmp_path / "small_disk.py"
    script.write_text(SMALL_DISK)
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = 'mount -t tmpfs -o size=5m none "$1" || exit 77; exec "$2" "$3" "$1"'
    if unshare is None:
        pytest.skip("no unshare: cannot mount a small file system")
    done = await trio.run_process(
        [
            unshare,
            "--user",
            "--map-root-user",
            "--mount",
            "sh",
            "-c",
            mount,
            "sh",
            disk,
            sys.executable,
            script,
        ],
        capture_stdout=True,
        capture_stderr=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    if done.returncode == 77 or b"unshare:" in done.stderr:
        pytest.skip(f"cannot mount a small file system: {done.stderr.decode().strip()}")
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.startswith(b"refused 6")


# Every line is a promise: printed after the append returned.
PROMISES = """
import sys, trio
from events.log.sqlite import open_sqlite_log
from tests.unit.sqlite_files import STARTED, accepted, completed

async def job(log, name):
    number = 0
    while True:
        number += 1
        job_id = f"{name}-{number}"
        seq = await log.append(job_id, [accepted(), STARTED], 0)
        print(job_id, seq, flush=True)
        for frame in range(3):
            seq = await log.append_frames(job_id, 1, [b"frame"], seq, 2.0)
        seq = await log.append(job_id, [completed()], seq)
        print(job_id, seq, flush=True)

async def main():
    async with open_sqlite_log(sys.argv[1]) as log, trio.open_nursery() as nursery:
        for name in range(20):
            nursery.start_soon(job, log, name)

trio.run(main)
"""


async def test_what_was_promised_is_there_after_a_kill(path: Path) -> None:
    promised: dict[str, int] = {}
    for round_number in range(3):
        with subprocess.Popen(  # noqa: ASYNC220 - it only starts
            [sys.executable, "-c", PROMISES.replace('f"{name}', f'f"{round_number}-{{name}}'), path],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None
            lines = [await trio.to_thread.run_sync(process.stdout.readline) for _ in range(100)]
            process.kill()
            lines += (await trio.to_thread.run_sync(process.stdout.read)).splitlines(keepends=True)
        for line in lines:
            if line.endswith("\n"):
                job_id, last_seq = line.split()
                promised[job_id] = int(last_seq)
        async with open_sqlite_log(path) as log:
            for job_id, seq in promised.items():
                snapshot = await log.snapshot(job_id)
                assert snapshot.last_seq >= seq
                events = await log.read(job_id)
                assert [stored.seq for stored in events] == list(range(1, snapshot.last_seq + 1))
                assert seq < 6 or snapshot.message == b'{"id":"msg"}'
    assert len(promised) > 100
