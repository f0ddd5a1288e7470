"""Appends that nobody waits for: readable at once, on disk with the next flush."""

from pathlib import Path
from typing import Any

import pytest
import trio

from events.errors import LogUnavailableError, SequenceConflict, UnknownJobError
from events.log.base import FrameCursor, JobFilter
from events.log.sqlite import SqliteLog, open_sqlite_log
from events.log.sqlite_file import SqliteOptions
from events.projections import project
from events.state import JobState
from events.types import JobDetached, JobExpired
from tests.faults.test_sqlite_faults import full_disk
from tests.unit.sqlite_files import STARTED, accepted, completed, flushes_every, rows, settle, stalled, until

# Nothing is flushed but on purpose: no test waits for a clock.
NO_FLUSH = flushes_every(3600.0)
ANYTHING = JobFilter()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "events.db"


async def run_attached(log: SqliteLog, job_id: str = "j") -> None:
    """A whole attached job: accepted, two frames, its end."""
    assert (
        await log.append(job_id, [accepted(detached=False, body=b"secret"), STARTED], 0, deferred=True) == 2
    )
    assert await log.append_frames(job_id, 1, [b"a", b"b"], 2, 2.5) == 3
    assert await log.append(job_id, [completed(b"")], 3, deferred=True) == 4


async def test_it_is_read_before_it_is_on_disk_and_on_disk_once_the_log_is_closed(path: Path) -> None:
    async with open_sqlite_log(path, options=NO_FLUSH) as log:
        await run_attached(log)
        assert rows(path, "SELECT count(*) FROM jobs") == [(0,)]
        before = await log.read("j")
        snapshot = await log.snapshot("j")
        assert snapshot == project("j", [stored.event for stored in before])
        assert (snapshot.state, snapshot.last_seq, snapshot.frames) == (JobState.COMPLETED, 4, 2)
        run = await log.read_frames("j", FrameCursor(1, 0))
        assert run is not None
        assert run.frames == (b"a", b"b")
        assert await log.unfinished() == []
    async with open_sqlite_log(path) as log:
        assert await log.read("j") == before
        assert await log.snapshot("j") == snapshot


async def test_nobody_waits_for_the_disk(path: Path) -> None:
    async with open_sqlite_log(path) as log:
        with stalled(path):
            await run_attached(log)
            assert (await log.snapshot("j")).ended


async def test_one_transaction_takes_all_that_waited(path: Path) -> None:
    async with open_sqlite_log(path, options=flushes_every(0.001)) as log:
        with stalled(path):
            await run_attached(log, "first")
            await settle()
            for number in range(50):
                await run_attached(log, f"job-{number}")
        await until(lambda: log.statistics.waiting_bytes == 0)
        assert log.statistics.commits <= 3
        assert rows(path, "SELECT count(*), sum(state = 'completed') FROM jobs") == [(51, 51)]
        assert (await log.snapshot("job-7")).last_seq == 4


async def test_frames_wait_longer_than_what_tells_of_a_job(path: Path) -> None:
    options = SqliteOptions(flush_interval_s=0.001, frames_interval_s=3600.0)
    async with open_sqlite_log(path, options=options) as log:
        await log.append("j", [accepted(detached=False), STARTED], 0, deferred=True)
        await until(lambda: log.statistics.waiting_bytes == 0)
        await log.append_frames("j", 1, [b"a"], 2, 2.5)
        await run_attached(log, "other")
        await until(lambda: log.statistics.commits == 2)
        assert rows(path, "SELECT job_id, last_seq FROM jobs ORDER BY id") == [("j", 2), ("other", 4)]
        # Those of a job that has something to tell go along.
        await log.append("j", [completed(b"")], 3, deferred=True)
        await until(lambda: log.statistics.waiting_bytes == 0)
        assert rows(path, "SELECT last_seq, frames FROM jobs WHERE job_id = 'j'") == [(4, 1)]


async def test_what_is_due_while_a_batch_is_at_the_writer_goes_with_the_next(path: Path) -> None:
    async with open_sqlite_log(path, options=NO_FLUSH) as log, trio.open_nursery() as nursery:
        with stalled(path):
            nursery.start_soon(log.append, "first", [accepted()], 0)
            await until(lambda: log._commit._sent is not None)
            await log.append("second", [accepted(detached=False), STARTED], 0, deferred=True)
            # Its alarm, which the writer had put into trio's queue before it took the batch.
            log._commit._send_deferred()
        await until(lambda: log.statistics.waiting_bytes == 0)
        assert rows(path, "SELECT job_id FROM jobs ORDER BY id") == [("first",), ("second",)]


async def test_frames_alone_reach_the_disk_too(path: Path) -> None:
    options = SqliteOptions(flush_interval_s=3600.0, frames_interval_s=0.001)
    async with open_sqlite_log(path, options=options) as log:
        seq = await log.append("j", [accepted(), STARTED], 0)
        await log.append_frames("j", 1, [b"a"], seq, 2.5)
        await until(lambda: log.statistics.waiting_bytes == 0)
        assert rows(path, "SELECT frames FROM jobs") == [(1,)]


async def test_what_is_redacted_before_it_is_flushed_never_reaches_the_disk(path: Path) -> None:
    async with open_sqlite_log(path, options=NO_FLUSH) as log:
        await run_attached(log)
        await log.redact("j")
        assert log.statistics.commits == 0
        assert (await log.read("j"))[0].event == accepted(detached=False, body=b"")
        assert await log.read_frames("j", FrameCursor(1, 0)) is None
    assert rows(path, "SELECT max(id), count(content) FROM events") == [(1 << 24 | 4, 0)]
    assert b"secret" not in await trio.Path(path).read_bytes()


async def test_what_was_flushed_meanwhile_is_redacted_on_disk(path: Path) -> None:
    async with open_sqlite_log(path, options=flushes_every(0.001)) as log:
        await log.append("j", [accepted(detached=False, body=b"secret"), STARTED], 0, deferred=True)
        await until(lambda: log.statistics.commits > 0)
        assert rows(path, "SELECT content FROM events WHERE content IS NOT NULL") == [(b"secret",)]
        await log.append("j", [completed(b"")], 2, deferred=True)
        await log.redact("j")
        assert rows(path, "SELECT count(content) FROM events") == [(0,)]
        assert (await log.snapshot("j")).ended


async def test_a_list_shows_jobs_that_wait(path: Path) -> None:
    async with open_sqlite_log(path, options=NO_FLUSH) as log:
        await run_attached(log, "ended")
        await log.append("running", [accepted(detached=False)], 0, deferred=True)
        page = await log.page(ANYTHING, limit=10)
        assert [(job.job_id, job.state) for job in page.jobs] == [
            ("running", JobState.PENDING),
            ("ended", JobState.COMPLETED),
        ]
        assert (await log.page(ANYTHING, limit=1, after_id="running")).jobs[0].job_id == "ended"


async def test_a_list_does_not_tell_what_is_not_on_disk_yet(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_sqlite_log(path, options=NO_FLUSH) as log:
        await log.append("j", [accepted(detached=False), STARTED], 0, deferred=True)
        read = log._readers.run

        async def end_meanwhile(query: Any) -> Any:
            found = await read(query)
            await log.append("j", [completed(b"")], 2, deferred=True)
            return found

        with monkeypatch.context() as meanwhile:
            meanwhile.setattr(log._readers, "run", end_meanwhile)
            assert (await log.page(ANYTHING, limit=10)).jobs[0].state is JobState.PROCESSING
        assert (await log.page(ANYTHING, limit=10)).jobs[0].state is JobState.COMPLETED


async def test_a_job_that_is_detached_is_on_disk_with_all_that_came_before(path: Path) -> None:
    async with open_sqlite_log(path, options=NO_FLUSH) as log:
        await log.append("j", [accepted(detached=False, body=b"body"), STARTED], 0, deferred=True)
        await log.append("j", [JobDetached(at=2.2, result_ttl_s=5.0)], 2)
        assert rows(path, "SELECT job_id, detached, last_seq FROM jobs") == [("j", 1, 3)]
        assert rows(path, "SELECT content FROM events WHERE content IS NOT NULL") == [(b"body",)]
        assert [job.job_id for job in await log.unfinished()] == ["j"]


async def test_a_job_that_was_flushed_while_its_next_append_waited_is_no_new_one(path: Path) -> None:
    async with open_sqlite_log(path, options=flushes_every(0.001)) as log:
        async with trio.open_nursery() as nursery:
            with stalled(path):
                await log.append("j", [accepted(detached=False), STARTED], 0, deferred=True)
                # Its flush is at the writer; the append waits for the next batch.
                await until(lambda: log._commit._sent is not None)
                nursery.start_soon(log.append, "j", [JobDetached(at=2.2, result_ttl_s=5.0)], 2)
                await settle()
        assert rows(path, "SELECT detached, last_seq FROM jobs") == [(1, 3)]


async def test_what_expires_drops_its_content_whether_it_was_flushed_or_not(path: Path) -> None:
    async with open_sqlite_log(path, options=NO_FLUSH) as log:
        await run_attached(log)
        await log.append("j", [JobExpired(at=9.0)], 4, deferred=True)
        assert rows(path, "SELECT count(*), count(content) FROM events") == [(4, 0)]
        assert (await log.snapshot("j")).state is JobState.EXPIRED


async def test_a_writer_that_missed_something_is_refused(path: Path) -> None:
    async with open_sqlite_log(path, options=NO_FLUSH) as log:
        await run_attached(log)
        for seq in (0, 3, 5):
            with pytest.raises(SequenceConflict):
                await log.append("j", [completed()], seq, deferred=True)
        with pytest.raises(SequenceConflict):
            await log.append("nobody", [completed()], 3, deferred=True)


async def test_a_forgotten_job_never_reaches_the_disk(path: Path) -> None:
    async with open_sqlite_log(path, options=NO_FLUSH) as log:
        await run_attached(log)
        await log.forget("j")
        with pytest.raises(UnknownJobError):
            await log.read("j")
        assert (await log.page(ANYTHING, limit=10)).jobs == []
    assert rows(path, "SELECT count(*) FROM jobs") == [(0,)]


async def test_a_disk_that_refuses_is_told_to_whoever_comes_next(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("events.log.sqlite_commit.RETRY_S", 0.001)
    big = b"x" * 100_000
    async with open_sqlite_log(path, options=flushes_every(0.001)) as log:
        await log.append("earlier", [accepted()], 0)
        with full_disk(log):
            await log.append("first", [accepted(detached=False, body=big)], 0, deferred=True)
            await until(lambda: log.statistics.failed_commits > 0)
            with pytest.raises(LogUnavailableError, match="full"):
                await log.append("second", [accepted(detached=False, body=big)], 0, deferred=True)
            # A list does not wait for it.
            assert [job.job_id for job in (await log.page(ANYTHING, limit=10)).jobs] == ["earlier"]
        await until(lambda: log.statistics.waiting_bytes == 0)
        assert await log.append("third", [accepted(detached=False, body=big)], 0, deferred=True) == 1
        assert (await log.page(ANYTHING, limit=10)).jobs[-1].job_id == "earlier"
    assert rows(path, "SELECT job_id FROM jobs ORDER BY id") == [("earlier",), ("first",), ("third",)]


async def test_what_waits_is_bounded(path: Path) -> None:
    async with open_sqlite_log(path, options=flushes_every(3600.0, max_unflushed_bytes=50_000)) as log:
        for number in range(100):
            body = b"x" * 5_000
            await log.append(f"job-{number}", [accepted(detached=False, body=body)], 0, deferred=True)
            assert log.statistics.waiting_bytes <= 60_000
        assert log.statistics.commits >= 8
