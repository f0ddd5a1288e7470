"""A file of schema 2, as its release wrote it (a row for each event but frames), read on and written on."""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from events.batches import ItemCounts
from events.log.base import EventLog
from events.log.sqlite import open_sqlite_log
from events.log.sqlite_schema import MIGRATIONS, open_database
from events.projections import project
from events.state import JobState
from events.types import AttemptFailed, AttemptStarted, Event, Failure, FramesReceived, JobCompleted, NextStep
from tests.unit.sqlite_files import STARTED, accepted, completed, rows

FAILURE = Failure(502, "api_error", "no\nluck")
RUNS = (
    FramesReceived(at=2.5, attempt=1, first=1, frames=(b"a", b"b")),
    FramesReceived(at=2.5, attempt=1, first=3, frames=(b"c",)),
)

ACCEPTED_FACT = (
    b'{"v":1,"kind":"JobAccepted","event":{"at":1.0,"owner":"ci","model":"m","mode":"async","body":"",'
    b'"detached":true,"result_ttl_s":60.0,"headers":[],"request_id":"","may_rerun":true,'
    b'"idempotency_key":null,"body_sha256":null,"batch_id":null,"custom_id":null,"webhook":null}}'
)
STARTED_FACT = (
    b'{"v":1,"kind":"AttemptStarted","event":{"at":2.0,"attempt":1,"provider":"p","upstream_model":"u",'
    b'"key_name":""}}'
)
COMPLETED_FACT = (
    b'{"v":1,"kind":"JobCompleted","event":{"at":3.0,"attempt":1,"message":"","usage":{"output_tokens":1},'
    b'"upstream_request_id":null}}'
)
RUNS_FACT = b'{"v":1,"attempt":1,"first":1,"runs":[[2.5,[1,1]],[2.5,[1]]]}'

INSERT_JOB = (
    "INSERT INTO jobs (id, job_id, batch_id, state, last_seq, started_at, ended_at, expires_at, attempt,"
    " frames, usage, message_seq, owner, model, mode, created_at, request_id, may_rerun, detached,"
    " result_ttl_s) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 'ci', 'm', 'async', 1.0, '', 1, 1, 60.0)"
)
JOBS = (
    (1, "done", None, "completed", 5, 2.0, 3.0, 63.0, 1, 3, '{"output_tokens":1}', 5),
    (2, "running", None, "processing", 4, 2.0, None, None, 1, 3, "{}", None),
    (3, "item", "b", "processing", 2, 2.0, None, None, 1, 0, "{}", None),
)
EVENTS = (
    (1, 1, None, None, ACCEPTED_FACT, b"secret"),
    (1, 2, None, None, STARTED_FACT, None),
    (1, 4, 1, 3, RUNS_FACT, b"abc"),
    (1, 5, None, None, COMPLETED_FACT, b'{"id":"msg"}'),
    (2, 1, None, None, ACCEPTED_FACT, b"run"),
    (2, 2, None, None, STARTED_FACT, None),
    (2, 4, 1, 3, RUNS_FACT, b"abc"),
    (3, 1, None, None, ACCEPTED_FACT.replace(b'"batch_id":null', b'"batch_id":"b"'), b"{}"),
    (3, 2, None, None, STARTED_FACT, None),
)


def old_file(path: Path) -> None:
    with closing(open_database(path, migrations=MIGRATIONS[:2])) as connection:
        connection.executemany(INSERT_JOB, JOBS)
        connection.executemany(
            "INSERT INTO events (job, seq, attempt, last_frame, fact, content) VALUES (?, ?, ?, ?, ?, ?)",
            EVENTS,
        )


async def must_tell(log: EventLog, job_id: str, history: Sequence[Event]) -> None:
    """All of it, from wherever one begins to read, and however little at once."""
    for after in range(len(history) + 1):
        for limit in (1, 2, 1000):
            found = await log.read(job_id, after, limit)
            assert [stored.event for stored in found] == list(history[after : after + limit])
    assert await log.snapshot(job_id) == project(job_id, history)


async def test_an_old_file_is_read_on_and_written_on(tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    old_file(path)
    done: list[Event] = [accepted(body=b"secret"), STARTED, *RUNS, completed()]
    running: list[Event] = [accepted(body=b"run"), STARTED, *RUNS]
    again: list[Event] = [
        AttemptFailed(at=2.6, attempt=1, failure=FAILURE, next=NextStep.RETRY),
        AttemptStarted(at=2.7, attempt=2, provider="p", upstream_model="u"),
    ]
    message = JobCompleted(at=4.0, attempt=2, message=b'{"id":"second"}')
    async with open_sqlite_log(path) as log:
        await must_tell(log, "done", done)
        await must_tell(log, "running", running)
        assert [job.job_id for job in await log.unfinished()] == ["running"]
        assert [job.job_id for job in await log.items.begun("b")] == ["item"]
        await log.append("running", again, 4)
        await log.append("running", [message], 6)
        await log.append("item", [completed()], 2)
        await log.redact("done")
    found = rows(path, "SELECT id - (2 << 24) FROM events WHERE id >> 24 = 2 ORDER BY id")
    assert found == [(1,), (2,), (4,), (6,), (7,)]
    async with open_sqlite_log(path) as log:
        await must_tell(log, "running", [*running, *again, message])
        assert (await log.snapshot("item")).message == b'{"id":"msg"}'
        assert await log.items.counts("b") == ItemCounts(succeeded=1)
        redacted = await log.snapshot("done")
        assert (redacted.state, redacted.last_seq, redacted.message) == (JobState.COMPLETED, 5, b"")
    assert rows(path, "SELECT count(content) FROM events WHERE id >> 24 = 1") == [(0,)]
