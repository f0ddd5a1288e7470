"""A row's id has room for so many events of a job; what happens there."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from events.errors import TooManyEventsError
from events.log.sqlite import open_sqlite_log
from events.log.sqlite_live import ENDING_EVENTS
from events.log.sqlite_schema import MAX_SEQ
from events.types import Event, JobDetached
from tests.unit.sqlite_files import completed, start


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "events.db"


async def test_a_job_with_all_the_events_it_can_have_can_still_be_ended(path: Path) -> None:
    async with open_sqlite_log(path) as log:
        await start(log, "full")
        await start(log, "next")
    most = MAX_SEQ - ENDING_EVENTS
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("UPDATE jobs SET last_seq = ? WHERE job_id = 'full'", (most - 1,))
    async with open_sqlite_log(path) as log:
        others = await log.read("next")
        assert await log.append_frames("full", 1, [b"x"], most - 1, 2.5) == most
        with pytest.raises(TooManyEventsError, match=f"more than {most} events"):
            await log.append_frames("full", 1, [b"y"], most, 2.5)
        assert await log.append("full", [completed()], most) == most + 1
        assert [stored.seq for stored in await log.read("full", 2)] == [most, most + 1]
        assert await log.read("full", most + 1) == await log.read("full", 1 << 40) == []
        assert await log.read("next") == await log.read("next", -1) == others


@pytest.mark.parametrize("deferred", [False, True])
async def test_an_event_beyond_the_last_number_is_refused_and_nothing_else(
    path: Path, deferred: bool
) -> None:
    async with open_sqlite_log(path) as log:
        await start(log, "full")
        await start(log, "next")
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("UPDATE jobs SET last_seq = ?", (MAX_SEQ - 1,))
    too_many: list[Event] = [JobDetached(at=2.5, result_ttl_s=5.0), completed()]
    async with open_sqlite_log(path) as log:
        with pytest.raises(TooManyEventsError, match=f"more than {MAX_SEQ} events"):
            await log.append("full", too_many, MAX_SEQ - 1, deferred=deferred)
        assert log.held_bytes == 0
        assert await log.append("full", [completed()], MAX_SEQ - 1, deferred=deferred) == MAX_SEQ
        assert (await log.snapshot("full")).message == completed().message
        assert [stored.seq for stored in await log.read("next")] == [1, 2]
