"""Starting over a file that has a past: how long it takes, what is done, and when it is refused."""

import logging
import os
import re
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import trio

from events.codec import decode
from events.log.sqlite import open_sqlite_log
from events.log.sqlite_schema import MIGRATIONS, open_database
from events.types import AttemptStarted, Event, JobAccepted, JobCompleted, Mode
from tests.e2e.daemon import Process, spawned
from tests.e2e.wire import Wire, assert_error, connect, post, request

FINISHED_JOBS = 100_000
UNFINISHED_JOBS = int(os.environ.get("UNFINISHED_JOBS", "1000"))
"""UNFINISHED_JOBS=10000 in the environment is the full number, at a quarter of a minute more."""
READY_WITHIN_S = 3.0
ALL_TAKEN_UP_WITHIN_S = 10.0
"""An actor for each of them, on a busy machine and under coverage, too."""
RESUMED_WITHIN_S = 60.0
MAX_RESUMED = 20
MAX_OVERTAKEN = 10 * MAX_RESUMED
"""Places by which a job may be late: its call is read back from disk while others that have a turn go on."""
POLL_S = 0.1
TOML = f"""
[jobs]
drain_s = 1
max_in_flight = {2 * UNFINISHED_JOBS}
max_resumed = {MAX_RESUMED}
[log]
url = "sqlite:///events.db"
[logging]
level = "warning"
[[providers]]
name = "echo"
kind = "echo"
"""
BODY = b'{"model":"m","max_tokens":50,"messages":[{"role":"user","content":"one two three"}]}'
FRAMES = tuple(b'event: content_block_delta\ndata: {"n":%d}\n\n' % number for number in range(10))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A working directory with a configuration."""
    (tmp_path / "messagesd.toml").write_text(TOML)
    return tmp_path


def story(*, finished: bool) -> list[Event]:
    now = time.time()
    accepted = JobAccepted(
        at=now, owner="", model="m", mode=Mode.ASYNC, body=BODY, detached=True, result_ttl_s=86_400.0
    )
    started = AttemptStarted(at=now, attempt=1, provider="echo", upstream_model="m")
    completed = JobCompleted(at=now, attempt=1, message=b'{"id":"msg"}' + b" " * 500)
    return [accepted, started, completed] if finished else [accepted, started]


async def fill(path: Path, jobs: int, *, finished: bool) -> None:
    """So many jobs: the first as the log writes it, the others its copies."""
    async with open_sqlite_log(path) as log:
        seq = await log.append("0", story(finished=False), 0)
        seq = await log.append_frames("0", 1, FRAMES, seq, time.time())
        if finished:
            await log.append("0", story(finished=True)[-1:], seq)
    numbers = "WITH RECURSIVE other(n) AS (SELECT 2 UNION ALL SELECT n + 1 FROM other WHERE n < ?)"
    with closing(sqlite3.connect(path)) as file:
        columns = [name for _, name, *_ in file.execute("PRAGMA table_info(jobs)")]
        own = {"id": "n", "job_id": "printf('00000000-0000-0000-0000-%012d', n)"}
        values = ", ".join(own.get(name, name) for name in columns)
        file.execute(
            f"INSERT INTO jobs {numbers} SELECT {values} FROM other, jobs WHERE id = 1",  # noqa: S608 - our own
            (jobs,),
        )
        file.execute(
            f"INSERT INTO events {numbers}"  # noqa: S608 - our own
            " SELECT (n << 24) + (id & 0xFFFFFF), attempt, last_frame, fact, content"
            " FROM other, events WHERE id >> 24 = 1",
            (jobs,),
        )
        file.execute("UPDATE jobs SET job_id = printf('00000000-0000-0000-0000-%012d', 1) WHERE id = 1")
        file.commit()


def job_id(number: int) -> str:
    return f"00000000-0000-0000-0000-{number:012d}"


@contextmanager
def ready_in_time(place: Path) -> Iterator[tuple[Process, float]]:
    """A daemon that listens, and how long it took from the start of its process."""
    began_at = time.monotonic()
    with spawned("serve", "--port", "0", cwd=place) as daemon:
        daemon.started()
        yield daemon, time.monotonic() - began_at


@pytest.mark.slow
async def test_a_hundred_thousand_finished_jobs(
    place: Path, record_property: Callable[[str, object], None]
) -> None:
    path = place / "events.db"
    began_at = time.monotonic()
    await fill(path, FINISHED_JOBS, finished=True)
    filled_s = time.monotonic() - began_at
    with ready_in_time(place) as (daemon, ready_s), trio.fail_after(20):
        async with connect(daemon.url) as wire:
            answer = await wire.ask(post(b"", ("x-bf-async-id", job_id(FINISHED_JOBS))))
            assert (answer.status, answer.json()) == (200, {"id": "msg"})
            page = await wire.ask(request("GET", "/v1/jobs?limit=1000"), method="GET")
            assert len(page.json()["data"]) == 1000
            assert page.json()["has_more"]
    figures = {"filled_s": filled_s, "file_bytes": path.stat().st_size, "ready_s": ready_s}
    record_property("figures", figures)
    logging.getLogger(__name__).info("%s", figures)
    assert ready_s < READY_WITHIN_S, figures


@pytest.mark.slow
@pytest.mark.timeout(120)
async def test_ten_thousand_unfinished_jobs(
    place: Path, record_property: Callable[[str, object], None]
) -> None:
    path = place / "events.db"
    await fill(path, UNFINISHED_JOBS, finished=False)
    with ready_in_time(place) as (daemon, ready_s), trio.fail_after(RESUMED_WITHIN_S):
        began_at = time.monotonic()
        async with connect(daemon.url) as wire:
            # New work does not wait for theirs.
            assert (await wire.ask(post(BODY))).json()["content"][0]["text"] == "one two three"
            answered_s = time.monotonic() - began_at
            while await _in_flight(wire):  # noqa: ASYNC110 - the daemon is another process
                await trio.sleep(POLL_S)
        resumed_s = time.monotonic() - began_at
        daemon.tell(signal.SIGTERM)
        assert await trio.to_thread.run_sync(daemon.wait) == 0
    figures = {"ready_s": ready_s, "answered_s": answered_s, "resumed_s": resumed_s}
    record_property("figures", figures)
    logging.getLogger(__name__).info("%s", figures)
    began, ended = _second_attempts(path)
    assert list(began) == list(ended) == list(range(1, UNFINISHED_JOBS + 1))
    # At most so many at once, and in the order of acceptance but for those that are at work together.
    changes = sorted([(at, 1) for at in began.values()] + [(at, -1) for at in ended.values()])
    at_work = 0
    for _, change in changes:
        at_work += change
        assert at_work <= MAX_RESUMED
    for place_in_line, number in enumerate(sorted(began, key=lambda number: began[number]), 1):
        assert abs(place_in_line - number) <= MAX_OVERTAKEN
    assert ready_s < ALL_TAKEN_UP_WITHIN_S, figures
    assert answered_s < READY_WITHIN_S, figures


async def _in_flight(wire: Wire) -> float:
    answer = await wire.ask(request("GET", "/metrics"), method="GET")
    found = re.search(rb"^messagesd_jobs_in_flight (\S+)$", answer.body, re.MULTILINE)
    assert found
    return float(found.group(1))


def _second_attempts(path: Path) -> tuple[dict[int, float], dict[int, float]]:
    """When each job's second attempt began and ended, by number."""
    began: dict[int, float] = {}
    ended: dict[int, float] = {}
    with closing(sqlite3.connect(path)) as file:
        query = "SELECT id >> 24 AS job, fact FROM events WHERE attempt IS NULL AND job <= ? ORDER BY id"
        for number, facts in file.execute(query, (UNFINISHED_JOBS,)):
            for fact in facts.split(b"\n"):
                match decode(fact):
                    case AttemptStarted(attempt=2, at=at):
                        began[number] = at
                    case JobCompleted(attempt=2, at=at):
                        ended[number] = at
    return began, ended


def test_an_older_file_is_brought_up_and_says_so(place: Path) -> None:
    (place / "messagesd.toml").write_text(TOML.replace('"warning"', '"info"'))
    open_database(place / "events.db", migrations=MIGRATIONS[:2]).close()
    with spawned("serve", "--port", "0", cwd=place) as daemon:
        daemon.started().tell(signal.SIGTERM)
        assert daemon.wait() == 0
        assert "log.migrating" in daemon.errors


# --- refused ---------------------------------------------------------------------------------------


def refused(place: Path) -> str:
    """What a daemon that cannot open its log says: one line, no more."""
    with spawned("serve", "--port", "0", cwd=place) as daemon:
        assert daemon.wait() == 1
        assert daemon.banner == ""
        (line,) = [line for line in daemon.errors.splitlines() if not line.startswith("{")]
        assert line.startswith(f"error: cannot open the event log {place / 'events.db'}: ")
        return line


async def test_a_second_daemon_on_the_same_file_is_refused(place: Path) -> None:
    with spawned("serve", "--port", "0", cwd=place) as first:
        first.started()
        said = refused(place)
        assert f"another daemon uses it (process {first.pid})" in said
        assert "stop that one" in said
        async with connect(first.url) as wire:
            assert (await wire.ask(post(BODY))).status == 200
        first.process.kill()
        first.wait()
    # A lock ends with its process, however that ended.
    with spawned("serve", "--port", "0", cwd=place) as third:
        third.started()
        async with connect(third.url) as wire:
            assert_error(await wire.ask(post(b"", ("x-bf-async-id", job_id(1)))), 404)


def test_another_programs_database_is_left_alone(place: Path) -> None:
    with closing(sqlite3.connect(place / "events.db")) as file:
        file.execute("CREATE TABLE theirs (x)")
    before = (place / "events.db").read_bytes()
    assert "some other program's database" in refused(place)
    assert (place / "events.db").read_bytes() == before


def test_a_file_that_is_no_database(place: Path) -> None:
    (place / "events.db").write_bytes(b"precious " * 5000)
    assert "no SQLite database" in refused(place)
    assert (place / "events.db").read_bytes() == b"precious " * 5000


async def test_a_damaged_file(place: Path) -> None:
    await fill(place / "events.db", 2000, finished=True)
    os.truncate(place / "events.db", (place / "events.db").stat().st_size // 2)
    said = refused(place)
    assert "it is damaged" in said
    assert "put a backup in its place" in said


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_directory(place: Path) -> None:
    place.chmod(0o500)
    try:
        assert "cannot be written" in refused(place)
    finally:
        place.chmod(0o700)


def test_a_directory_that_is_not_there(place: Path) -> None:
    (place / "messagesd.toml").write_text(TOML.replace("///events.db", "///absent/events.db"))
    with spawned("serve", "--port", "0", cwd=place) as daemon:
        assert daemon.wait() == 1
        assert "its directory does not exist; make it, or choose another file" in daemon.errors
        assert "Traceback" not in daemon.errors
