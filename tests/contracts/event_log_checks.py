"""Reading a whole event log in small steps, and comparing it with the model."""

from dataclasses import replace

import pytest

from events.errors import UnknownJobError
from events.log.base import EventLog, FrameCursor, JobFilter
from events.types import Event
from tests.contracts.event_log_model import LogModel

LONG_AGO, FAR_OFF = 0.0, 1e9


async def read_all(log: EventLog, job_id: str, after: int = 0, limit: int = 3) -> list[Event]:
    """All events after ``after``, in small pages; their seqs have no holes."""
    found: list[Event] = []
    while events := await log.read(job_id, after, limit):
        assert len(events) <= limit
        for stored in events:
            after += 1
            assert (stored.job_id, stored.seq) == (job_id, after)
            found.append(stored.event)
    return found


async def frames_after(log: EventLog, job_id: str, cursor: FrameCursor, max_bytes: int) -> list[bytes]:
    """All frames of the cursor's attempt that follow it, run by run."""
    found: list[bytes] = []
    while run := await log.read_frames(job_id, cursor, max_bytes):
        assert (run.attempt, run.first) == (cursor.attempt, cursor.frame + 1)
        assert run.frames
        found += run.frames
        cursor = run.cursor
    return found


async def walk(log: EventLog, where: JobFilter, limit: int, *, newest_first: bool) -> list[str]:
    """Every listed job, page by page, in the order in which the pages come."""
    found: list[str] = []
    page = await log.page(where, limit=limit)
    if not newest_first:
        oldest = await walk(log, where, 1000, newest_first=True)
        if not oldest:
            return []
        found = [oldest[-1]]
        page = await log.page(where, limit=limit, before_id=oldest[-1])
    while True:
        ids = [job.job_id for job in page.jobs]
        assert len(ids) <= limit
        found += ids if newest_first else ids[::-1]
        assert len(found) <= 1000, "the pages do not end"
        if not page.has_more:
            return found
        assert len(ids) == limit
        if newest_first:
            page = await log.page(where, limit=limit, after_id=ids[-1])
        else:
            page = await log.page(where, limit=limit, before_id=ids[0])


async def check_job(log: EventLog, model: LogModel, job_id: str) -> None:
    events = model.shown(job_id)
    if not events:
        for call in (log.read(job_id), log.snapshot(job_id), log.read_frames(job_id, FrameCursor(1, 0))):
            with pytest.raises(UnknownJobError):
                await call
        return
    assert await read_all(log, job_id) == events
    assert await log.snapshot(job_id) == model.snapshot(job_id)


async def check_frames(log: EventLog, model: LogModel, job_id: str) -> None:
    for attempt in range(model.attempts(job_id) + 2):
        frames = model.frames(job_id, attempt)
        for start in range(len(frames) + 2):
            for max_bytes in (1, 1 << 18):
                found = await frames_after(log, job_id, FrameCursor(attempt, start), max_bytes)
                assert found == frames[start:]


async def check_lists(log: EventLog, model: LogModel) -> None:
    assert [job.job_id for job in await log.unfinished()] == [job.job_id for job in model.unfinished()]
    due = await log.due(FAR_OFF, 1000)
    assert {job.job_id for job in due} == {job.job_id for job in model.kept()}
    deadlines = [job.expires_at for job in due]
    assert deadlines == sorted(job.expires_at or 0 for job in due)
    assert await log.next_deadline() == (deadlines[0] if deadlines else None)
    assert await log.due(LONG_AGO, 1000) == []


async def check_pages(log: EventLog, model: LogModel, where: JobFilter, limit: int) -> None:
    expected = [job.job_id for job in model.listed(where)]
    assert await walk(log, where, limit, newest_first=True) == expected
    assert await walk(log, where, limit, newest_first=False) == expected[::-1]
    page = await log.page(where, limit=1000)
    assert page.jobs == [replace(job, message=b"") for job in model.listed(where)]
