"""What every event log promises to drop, and when. See :mod:`events.log.base`."""

from dataclasses import replace

import pytest

from events.errors import (
    UnknownJobError,
)
from events.log.base import EventLog, FrameCursor, JobFilter
from events.projections import project
from events.state import JobState
from events.types import Event, FramesReceived, JobAccepted, JobExpired
from tests.contracts.event_log_checks import (
    FAR_OFF,
    read_all,
)
from tests.contracts.event_log_model import (
    accepted,
    completed,
    failed,
    started,
)


async def a_full_job(log: EventLog, job_id: str = "job", *, detached: bool = True) -> list[Event]:
    """A completed job with a body, frames and a message; its events."""
    await log.append(job_id, [accepted(1.0, detached=detached), started(2.0, 1)], 0)
    await log.append_frames(job_id, 1, [b"frame-1", b"frame-2"], 2, 3.0)
    await log.append(job_id, [completed(4.0, 1)], 3)
    return await read_all(log, job_id)


async def test_what_is_redacted_keeps_its_shape(log: EventLog) -> None:
    events = await a_full_job(log)
    assert events[2] == FramesReceived(at=3.0, attempt=1, first=1, frames=(b"frame-1", b"frame-2"))
    before = await log.snapshot("job")
    assert before.message == completed(4.0, 1).message != b""
    for _ in range(2):
        await log.redact("job")
        redacted = await read_all(log, "job")
        assert [type(event) for event in redacted] == [type(event) for event in events]
        assert isinstance(redacted[0], JobAccepted)
        assert redacted[0].body == b""
        assert redacted[2] == FramesReceived(at=3.0, attempt=1, first=1, frames=(), count=2)
        assert await log.snapshot("job") == replace(before, message=b"")
        assert await log.read_frames("job", FrameCursor(1, 0)) is None
    assert project("job", redacted) == await log.snapshot("job")
    await log.redact("unknown")


async def test_what_is_held_is_let_go(log: EventLog) -> None:
    at_rest = log.held_bytes
    for number in range(3):
        await a_full_job(log, f"job-{number}")
    await log.redact("job-0")
    await log.forget("job-1")
    await log.append("job-2", [JobExpired(at=9.0)], 4)
    assert log.held_bytes == at_rest


async def test_a_forgotten_job_never_was(log: EventLog) -> None:
    await a_full_job(log)
    for _ in range(2):
        await log.forget("job")
        with pytest.raises(UnknownJobError):
            await log.read("job")
        with pytest.raises(UnknownJobError):
            await log.page(JobFilter(), limit=1, after_id="job")
    assert await log.append("job", [accepted(7.0)], 0) == 1
    assert await read_all(log, "job") == [accepted(7.0)]


async def test_an_expired_job_has_no_content(log: EventLog) -> None:
    await a_full_job(log)
    await log.append("job", [JobExpired(at=9.0)], 4)
    events = await read_all(log, "job")
    assert isinstance(events[0], JobAccepted)
    assert events[0].body == b""
    assert events[2] == FramesReceived(at=3.0, attempt=1, first=1, frames=(), count=2)
    snapshot = await log.snapshot("job")
    assert (snapshot.state, snapshot.message, snapshot.expires_at) == (JobState.EXPIRED, b"", 9.0)
    assert (await log.page(JobFilter(), limit=9)).jobs == []
    assert await log.due(FAR_OFF, 9) == []


async def test_what_is_due_comes_in_the_order_of_deadlines(log: EventLog) -> None:
    for job_id, ttl_s in (("late", 30.0), ("soon", 10.0), ("later", 20.0)):
        await log.append(job_id, [accepted(1.0, ttl_s=ttl_s), failed(2.0)], 0)
    await log.append("running", [accepted(1.0, ttl_s=1.0)], 0)
    await log.append("attached", [accepted(1.0, detached=False), failed(2.0)], 0)
    assert await log.next_deadline() == 12.0
    assert [job.job_id for job in await log.due(11.9, 9)] == []
    assert [job.job_id for job in await log.due(22.0, 9)] == ["soon", "later"]
    assert [job.job_id for job in await log.due(99.0, 2)] == ["soon", "later"]
    await log.append("soon", [JobExpired(at=12.0)], 2)
    assert await log.next_deadline() == 22.0


async def test_purging_forgets_what_keeps_no_result(log: EventLog) -> None:
    await log.append("kept", [accepted(1.0, ttl_s=1e6), failed(2.0)], 0)
    await log.append("running", [accepted(1.0, detached=False)], 0)
    for number in range(5):
        job_id = f"job-{number}"
        detached = number % 2 == 0
        await log.append(job_id, [accepted(1.0, detached=detached), failed(10.0 + number)], 0)
        if detached:
            await log.append(job_id, [JobExpired(at=10.0 + number)], 2)
    assert await log.purge(12.0, 1000) == 2
    assert await log.purge(99.0, 2) == 2
    assert await log.purge(99.0, 2) == 1
    assert await log.purge(99.0, 2) == 0
    assert {job.job_id for job in (await log.page(JobFilter(), limit=9)).jobs} == {"kept", "running"}
