from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import trio

from events.errors import (
    CodecError,
    DuplicateKeyError,
    LogOpenError,
    LogUnavailableError,
    SequenceConflict,
    UnknownJobError,
)
from events.log.base import FrameCursor
from events.log.sqlite import SqliteLog, open_sqlite_log
from events.log.sqlite_file import SqliteOptions
from events.log.sqlite_live import LiveJob
from events.log.sqlite_schema import FileLock
from events.log.sqlite_writer import Batch, JobWrite, write_batch
from events.projections import project
from events.types import Failure, FramesReceived, JobExpired, JobFailed
from tests.unit.sqlite_files import (
    STARTED,
    accepted,
    completed,
    flushes_every,
    rows,
    settle,
    stalled,
    start,
    until,
)

# Frames go to disk with their job's next append only: no test waits for a clock.
NO_FLUSH = flushes_every(3600.0)
FAILURE = Failure(500, "api_error", "no luck")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "events.db"


# -- group commit ----------------------------------------------------------------------------------


async def test_appends_that_arrive_during_a_commit_share_the_next(path: Path) -> None:
    async with open_sqlite_log(path) as log, trio.open_nursery() as nursery:
        with stalled(path):
            nursery.start_soon(log.append, "first", [accepted()], 0)
            await settle()
            for number in range(100):
                nursery.start_soon(log.append, f"job-{number}", [accepted()], 0)
            await settle()
            assert log.statistics.commits == 0
            assert rows(path, "SELECT * FROM jobs") == []
        await until(lambda: log.statistics.commits == 2)
        statistics = log.statistics
        assert (statistics.commits, statistics.appends, statistics.largest_batch) == (2, 101, 100)
        assert statistics.appends_per_commit == 50.5


async def test_a_caller_is_told_when_its_append_is_on_disk(path: Path) -> None:
    async with open_sqlite_log(path) as log:
        for number in range(5):
            assert await log.append(f"job-{number}", [accepted(body=b"b")], 0) == 1
            assert rows(path, "SELECT count(*), max(content) FROM events") == [(number + 1, b"b")]


async def test_two_writers_with_the_same_expected_seq_one_wins(path: Path) -> None:
    outcomes: list[object] = []

    async def write(log: SqliteLog) -> None:
        try:
            outcomes.append(await log.append("j", [STARTED], 1))
        except SequenceConflict as exc:
            outcomes.append(exc.actual)

    async with open_sqlite_log(path) as log:
        await log.append("j", [accepted()], 0)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(write, log)
            nursery.start_soon(write, log)
        assert outcomes == [2, 2]
        assert len(await log.read("j")) == 2


async def test_one_key_one_job_whether_in_one_batch_or_after_a_reopening(path: Path) -> None:
    outcomes: list[str] = []

    async def submit(log: SqliteLog, job_id: str) -> None:
        try:
            await log.append(job_id, [accepted(key="k")], 0)
            outcomes.append(job_id)
        except DuplicateKeyError as exc:
            outcomes.append(f"{job_id} is {exc.existing_job_id}")

    async with open_sqlite_log(path) as log:
        with stalled(path):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(log.append, "other", [accepted()], 0)
                await settle()
                for job_id in ("a", "b", "c"):
                    nursery.start_soon(submit, log, job_id)
                await settle()
                nursery.cancel_scope.cancel()
        async with trio.open_nursery() as nursery:
            for job_id in ("d", "e", "f"):
                nursery.start_soon(submit, log, job_id)
        (winner,) = [outcome for outcome in outcomes if " " not in outcome]
        assert sorted(outcomes) == sorted(
            winner if job_id == winner else f"{job_id} is {winner}" for job_id in ("d", "e", "f")
        )
    async with open_sqlite_log(path) as log:
        with pytest.raises(DuplicateKeyError) as caught:
            await log.append("g", [accepted(key="k")], 0)
        assert caught.value.existing_job_id == winner
        await log.append(winner, [JobFailed(at=2.0, failure=FAILURE)], 1)
        await log.append(winner, [JobExpired(at=3.0)], 2)
        assert await log.append("g", [accepted(key="k")], 0) == 1


# -- cancellation ----------------------------------------------------------------------------------


async def test_an_append_cancelled_in_the_queue_is_not_done_one_at_the_writer_is(path: Path) -> None:
    async with open_sqlite_log(path) as log:
        with stalled(path):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(log.append, "at the writer", [accepted()], 0)
                await settle()
                nursery.start_soon(log.append, "queued", [accepted()], 0)
                await settle()
                nursery.cancel_scope.cancel()
            assert log.held_bytes > 0
        assert await log.append("queued", [accepted()], 0) == 1
        assert [job.job_id for job in await log.unfinished()] == ["at the writer", "queued"]
        assert log.held_bytes == 0
        assert await log.append("at the writer", [STARTED], 1) == 2


async def test_one_cancelled_while_it_waits_for_another_of_its_job_changes_nothing(path: Path) -> None:
    async with open_sqlite_log(path) as log:
        await log.append("j", [accepted()], 0)
        async with trio.open_nursery() as nursery:
            with stalled(path):
                nursery.start_soon(log.append, "j", [STARTED], 1)
                await settle()
                with trio.CancelScope() as scope:
                    scope.cancel()
                    await log.append("j", [completed()], 2)
        assert scope.cancelled_caught
        assert (await log.snapshot("j")).last_seq == 2
        assert await log.append("j", [completed()], 2) == 3


async def test_an_append_that_cannot_be_stored_leaves_its_job_free(path: Path) -> None:
    async with open_sqlite_log(path) as log:
        seq = await start(log, "j")
        unstorable = completed()
        object.__setattr__(unstorable, "usage", {"x": object()})
        with pytest.raises(CodecError):
            await log.append("j", [unstorable], seq)
        assert await log.append("j", [completed()], seq) == seq + 1


# -- frames ----------------------------------------------------------------------------------------


async def test_frames_are_read_at_once_and_written_with_the_next_append_in_one_row(path: Path) -> None:
    async with open_sqlite_log(path, options=NO_FLUSH) as log:
        seq = await start(log, "j")
        for number in range(10):
            seq = await log.append_frames("j", 1, [b"a%d" % number, b"b"], seq, 2.5 + number)
        assert rows(path, "SELECT * FROM events WHERE attempt IS NOT NULL") == []
        events = await log.read("j")
        assert [stored.seq for stored in events] == list(range(1, 13))
        assert await log.read("j", 7, 2) == events[7:9]
        run = await log.read_frames("j", FrameCursor(1, 3))
        assert run is not None
        assert (run.first, len(run.frames), run.frames[0]) == (4, 17, b"b")
        assert await log.read_frames("j", FrameCursor(1, 20)) is None
        assert await log.snapshot("j") == project("j", [stored.event for stored in events])
        assert log.held_bytes > 30

        await log.append("j", [completed()], seq)
        on_disk = rows(path, "SELECT id, last_frame FROM events WHERE attempt IS NOT NULL")
        assert on_disk == [((1 << 24) + 12, 20)]
        assert (await log.read("j"))[:12] == events
        assert await log.read_frames("j", FrameCursor(1, 3)) == run
        assert log.held_bytes == 0
        assert log.statistics.flushed == 10


async def test_frames_go_to_disk_by_themselves_after_the_interval(path: Path) -> None:
    async with open_sqlite_log(path, options=flushes_every(0.001)) as log:
        seq = await start(log, "j")
        for round_number in (1, 2):
            seq = await log.append_frames("j", 1, [b"x"], seq, 2.0)
            await until(lambda: log.held_bytes == 0)
            assert rows(path, "SELECT max(last_frame) FROM events") == [(round_number,)]
        assert rows(path, "SELECT last_seq, frames FROM jobs") == [(4, 2)]


async def test_a_full_row_is_flushed_without_waiting_for_the_interval(path: Path) -> None:
    async with open_sqlite_log(path, options=NO_FLUSH) as log:
        seq = await start(log, "j")
        await log.append_frames("j", 1, [b"x" * (256 << 10)], seq, 2.0)
        await until(lambda: log.held_bytes == 0)


async def test_frames_beyond_the_bound_wait_for_the_disk(path: Path) -> None:
    options = flushes_every(3600.0, max_unflushed_bytes=2000)
    seqs: list[int] = []

    async def stream(log: SqliteLog, seq: int) -> None:
        for _ in range(9):
            seq = await log.append_frames("j", 1, [b"x" * 600], seq, 2.0)
            seqs.append(seq)

    async with open_sqlite_log(path, options=options) as log:
        seq = await start(log, "j")
        async with trio.open_nursery() as nursery:
            with stalled(path):
                nursery.start_soon(stream, log, seq)
                await settle()
                assert seqs == [3, 4]
                assert log.held_bytes <= 2000
        assert seqs == list(range(3, 12))
        assert [stored.seq for stored in await log.read("j")] == list(range(1, 12))


async def test_frames_that_arrive_during_their_jobs_flush_stay_in_order(path: Path) -> None:
    options = flushes_every(0.0)
    async with open_sqlite_log(path, options=options) as log:
        seq = await start(log, "j")
        with stalled(path):
            seq = await log.append_frames("j", 1, [b"1"], seq, 2.0)
            await settle()
            seq = await log.append_frames("j", 1, [b"2"], seq, 2.0)
        seq = await log.append("j", [completed()], seq)
        run = await log.read_frames("j", FrameCursor(1, 0))
        assert run is not None
        assert run.frames == (b"1", b"2")
        assert seq == 5


async def test_closing_writes_the_frames_that_wait(path: Path) -> None:
    async with open_sqlite_log(path, options=NO_FLUSH) as log:
        seq = await start(log, "j")
        await log.append_frames("j", 1, [b"a", b"b"], seq, 2.0)
    async with open_sqlite_log(path) as log:
        (stored,) = await log.read("j", 2)
        assert stored.event == FramesReceived(at=2.0, attempt=1, first=1, frames=(b"a", b"b"))
        (job,) = await log.unfinished()
        assert (job.frames, job.last_seq) == (2, 3)
        assert await log.append_frames("j", 1, [b"c"], 3, 2.5) == 4
        run = await log.read_frames("j", FrameCursor(1, 1))
        assert run is not None
        assert run.frames == (b"b",)


# -- bounds and the end ----------------------------------------------------------------------------


async def test_appends_beyond_the_queues_bound_are_refused_not_kept_waiting(path: Path) -> None:
    async with open_sqlite_log(path, options=SqliteOptions(max_queued_bytes=10_000)) as log:
        async with trio.open_nursery() as nursery:
            with stalled(path):
                nursery.start_soon(log.append, "at the writer", [accepted()], 0)
                await settle()
                nursery.start_soon(log.append, "queued", [accepted()], 0)
                await settle()
                with pytest.raises(LogUnavailableError, match="keep up"):
                    await log.append("too big", [accepted(body=b"x" * 9000)], 0)
        assert len(await log.unfinished()) == 2
        assert await log.append("too big", [accepted(body=b"x" * 9000)], 0) == 1


async def test_a_closed_log_takes_and_gives_nothing(path: Path) -> None:
    async with open_sqlite_log(path) as log:
        seq = await start(log, "j")
        await log.append("j", [completed()], seq)
        await log.aclose()
        await log.aclose()
        for call in (
            log.append("k", [accepted()], 0),
            log.append_frames("j", 1, [b"x"], 3, 1.0),
            log.redact("j"),
            log.forget("j"),
            log.purge(1.0, 1),
            log.snapshot("j"),
        ):
            with pytest.raises(LogUnavailableError, match="closed"):
                await call


async def test_an_append_that_was_checked_while_the_log_closed_is_refused(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_sqlite_log(path) as log, trio.open_nursery() as nursery:
        seq = await log.append("j", [accepted(), STARTED, completed()], 0)
        found, closed = await log._load("j"), trio.Event()

        async def load_slowly(job_id: str) -> LiveJob | None:
            await closed.wait()
            return found

        async def expire() -> None:
            with pytest.raises(LogUnavailableError, match="closed"):
                await log.append("j", [JobExpired(at=9.0)], seq)

        monkeypatch.setattr(log, "_load", load_slowly)
        nursery.start_soon(expire)
        await settle()
        await log.aclose()
        closed.set()


async def test_a_cancelled_program_still_closes_its_log(path: Path) -> None:
    with trio.CancelScope() as scope:
        async with open_sqlite_log(path, options=NO_FLUSH) as log:
            seq = await start(log, "j")
            await log.append_frames("j", 1, [b"x"], seq, 2.0)
            scope.cancel()
            await trio.lowlevel.checkpoint()
    async with open_sqlite_log(path) as log:
        assert (await log.snapshot("j")).frames == 1


async def test_closing_a_log_whose_disk_hangs_ends_and_says_so(path: Path) -> None:
    async with AsyncExitStack() as stack:
        log = await stack.enter_async_context(
            open_sqlite_log(path, options=SqliteOptions(close_timeout_s=0.05))
        )
        with stalled(path):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(log.append, "j", [accepted()], 0)
                await settle()
                nursery.cancel_scope.cancel()
            with pytest.raises(LogUnavailableError, match="does not answer"):
                await log.aclose()
            # The writer may still write, so nobody else may have the file.
            with pytest.raises(LogOpenError, match="another daemon"):
                FileLock(path)
        assert await trio.to_thread.run_sync(log._commit._writer.join, 10.0)
        FileLock(path).release()
        assert rows(path, "SELECT job_id FROM jobs") == [("j",)]


async def test_a_second_log_on_the_same_file_is_refused_until_the_first_is_closed(path: Path) -> None:
    async with open_sqlite_log(path) as log:
        await log.append("j", [accepted()], 0)
        with pytest.raises(LogOpenError, match="another daemon uses it"):
            async with open_sqlite_log(path):
                raise AssertionError("opened twice")
    async with open_sqlite_log(path) as log:
        assert len(await log.unfinished()) == 1


async def test_a_forgotten_job_takes_its_waiting_frames_along(path: Path) -> None:
    async with open_sqlite_log(path, options=NO_FLUSH) as log:
        seq = await start(log, "j")
        await log.append_frames("j", 1, [b"x"], seq, 2.0)
        await log.forget("j")
        assert log.held_bytes == 0
        with pytest.raises(UnknownJobError):
            await log.read("j")
        assert rows(path, "SELECT count(*) FROM events") == [(0,)]
        assert await start(log, "j") == 2


async def test_a_batch_that_breaks_writes_nothing_and_says_why(path: Path) -> None:
    async with open_sqlite_log(path) as log:
        connection = log._commit._writer._connection
        batch = Batch(jobs=[JobWrite(job_id="j", number=1, row=(1, "j"))])
        write_batch(connection, batch)
        assert batch.error is not None
        assert not connection.in_transaction
        assert await log.append("j", [accepted()], 0) == 1
