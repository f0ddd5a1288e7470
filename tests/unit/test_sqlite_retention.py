from contextlib import closing
from pathlib import Path

import pytest
import trio

from events.log.base import FrameCursor
from events.log.sqlite import open_sqlite_log
from events.log.sqlite_schema import PAGE_BYTES
from events.types import JobExpired
from tests.unit.sqlite_files import STARTED, accepted, completed, rows, settle


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "events.db"


FINISHED = """
    WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {count})
    INSERT INTO jobs (id, job_id, owner, model, mode, created_at, request_id, may_rerun, state, detached,
        result_ttl_s, last_seq, ended_at, expires_at, attempt, frames, usage)
    SELECT i, 'job-' || i, 'ci', 'm', 'async', i, '', 1, '{state}', 1, 60, 2, i, i + 60, 1, 0, '{{}}' FROM n
"""


async def fill(path: Path, count: int, state: str) -> None:
    """A file with so many jobs that are over."""
    async with open_sqlite_log(path) as log:
        with closing(log._commit._writer._connection.cursor()) as cursor:
            cursor.execute(FINISHED.format(count=count, state=state))
            cursor.execute("INSERT INTO events (id, fact) SELECT (id << 24) + 1, zeroblob(300) FROM jobs")


async def test_opening_does_not_read_what_is_finished(path: Path) -> None:
    await fill(path, 100_000, "completed")
    started_at = trio.current_time()
    async with open_sqlite_log(path) as log:
        assert trio.current_time() - started_at < 3
        assert await log.unfinished() == []
        assert log._live == {}
        assert await log.next_deadline() == 61.0
        assert [job.job_id for job in await log.due(62.5, 9)] == ["job-1", "job-2"]
        assert await log.append("new", [accepted()], 0) == 1
        query = "SELECT * FROM jobs WHERE ended_at IS NULL AND batch_id IS NULL ORDER BY id"
        (plan,) = rows(path, f"EXPLAIN QUERY PLAN {query}")
        assert "jobs_unfinished" in plan[-1]


async def test_a_purge_lets_appends_through_between_its_steps(path: Path) -> None:
    await fill(path, 20_000, "expired")
    purged: list[int] = []
    async with open_sqlite_log(path) as log:

        async def purge() -> None:
            purged.append(await log.purge(1e9, 15_000))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(purge)
            await settle()
            appends = 0
            while not purged:
                await log.append(f"meanwhile-{appends}", [accepted()], 0)
                appends += 1
        assert purged == [15_000]
        assert appends > 2
        assert rows(path, "SELECT min(id) FROM jobs WHERE state = 'expired'") == [(15_001,)]
        assert rows(path, "SELECT count(*) FROM events") == [(5_000 + appends,)]
        assert await log.purge(1e9, 15_000) == 5_000


async def test_the_files_size_levels_off(path: Path) -> None:
    sizes: list[int] = []
    async with open_sqlite_log(path) as log:
        for cycle in range(6):
            for number in range(25):
                job_id = f"{cycle}-{number}"
                body = b"x" * 300_000
                seq = await log.append(job_id, [accepted(body=body), STARTED, completed()], 0)
                await log.append(job_id, [JobExpired(at=4.0)], seq)
            assert await log.purge(5.0, 1000) == 25
            sizes.append(rows(path, "PRAGMA page_count")[0][0] * PAGE_BYTES)
    assert sizes[-1] == pytest.approx(sizes[1], rel=0.2)
    assert max(sizes) < 8 << 20


async def test_an_expired_job_keeps_its_story_but_no_content(path: Path) -> None:
    async with open_sqlite_log(path) as log:
        seq = await log.append("j", [accepted(body=b"SECRET body"), STARTED], 0)
        seq = await log.append_frames("j", 1, [b"SECRET frame"], seq, 2.5)
        seq = await log.append("j", [completed(b"SECRET message")], seq)
        assert (await log.snapshot("j")).message == b"SECRET message"
        await log.append("j", [JobExpired(at=9.0)], seq)
        events = [stored.event for stored in await log.read("j")]
        assert [type(event).__name__ for event in events] == [
            "JobAccepted",
            "AttemptStarted",
            "FramesReceived",
            "JobCompleted",
            "JobExpired",
        ]
        assert b"SECRET" not in repr(events).encode()
        assert await log.read_frames("j", FrameCursor(1, 0)) is None
        assert (await log.snapshot("j")).frames == 1
        assert rows(path, "SELECT count(*) FROM events WHERE content IS NOT NULL") == [(0,)]
