"""The SQLite log and the memory log take the same steps and must not be told apart, reopenings included."""

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest

from events.errors import DuplicateKeyError, EventsError, SequenceConflict
from events.log.base import EventLog, FrameCursor, JobFilter
from events.log.content import content_bytes
from events.log.memory import MemoryLog
from events.log.sqlite import open_sqlite_log
from events.projections import JobSnapshot
from events.state import ENDED, JobState
from events.types import (
    AttemptFailed,
    AttemptStarted,
    Event,
    Failure,
    FramesReceived,
    JobAccepted,
    JobCancelled,
    JobCompleted,
    JobDetached,
    JobExpired,
    JobFailed,
    Mode,
    NextStep,
)
from tests.unit.sqlite_files import flushes_every

STEPS = 400
FAILURE = Failure(502, "api_error", "no\nluck", (("retry-after", "3"),))


class Pair:
    """Both logs; every call goes to both, and both must answer alike."""

    def __init__(self, path: Path, stack: AsyncExitStack, flush_interval_s: float) -> None:
        self._path = path
        self._stack = stack
        self._options = flushes_every(flush_interval_s)
        self.memory = MemoryLog()

    async def open(self) -> None:
        self.sqlite = await self._stack.enter_async_context(
            open_sqlite_log(self._path, options=self._options)
        )

    async def reopen(self) -> None:
        await self.sqlite.aclose()
        assert self.sqlite.held_bytes == 0
        await self.open()

    async def both(self, call: Callable[[EventLog], Awaitable[Any]]) -> Any:
        expected = await answer(call(self.memory))
        actual = await answer(call(self.sqlite))
        assert actual == expected
        return expected


async def answer(call: Awaitable[Any]) -> Any:
    try:
        return await call
    except SequenceConflict as exc:
        return SequenceConflict, exc.expected, exc.actual
    except DuplicateKeyError as exc:
        return DuplicateKeyError, exc.existing_job_id
    except EventsError as exc:
        return type(exc)


async def add_frames(now: JobSnapshot, frames: list[bytes], seq: int, at: float, log: EventLog) -> int:
    return await log.append_frames(now.job_id, now.attempt, frames, seq, at)


async def whole_story(job_id: str, log: EventLog) -> list[object]:
    """All that there is to read of a job."""
    snapshot = await log.snapshot(job_id)
    attempts = range(1, snapshot.attempt + 1)
    return [snapshot, await log.read(job_id), [await all_frames(log, job_id, n, 64) for n in attempts]]


async def all_frames(log: EventLog, job_id: str, attempt: int, max_bytes: int) -> list[bytes]:
    """Every frame of an attempt, gathered as a watcher would."""
    found: list[bytes] = []
    while run := await log.read_frames(job_id, FrameCursor(attempt, len(found)), max_bytes):
        assert run.first == len(found) + 1
        found.extend(run.frames)
    return found


class Driver:
    """Draws steps: mostly ones that follow, some that do not."""

    def __init__(self, seed: int, pair: Pair) -> None:
        self.random = Random(seed)
        self.pair = pair
        self.jobs: list[str] = []
        self.now = 1000.0

    async def step(self) -> None:
        # Never the same moment twice: which of two jobs due together goes first is left open.
        self.now += self.random.uniform(0.01, 3.0)
        kind = self.random.choices(
            [
                self.accept,
                self.go_on,
                self.frames,
                self.settle,
                self.astray,
                self.drop,
                self.purge,
                self.look,
            ],
            [4, 12, 12, 1, 2, 1, 1, 6],
        )[0]
        await kind()

    def job(self) -> str:
        return self.random.choice(self.jobs[-12:]) if self.jobs and self.random.random() < 0.97 else "nobody"

    async def accept(self) -> None:
        job_id = f"job-{len(self.jobs)}"
        owner = self.random.choice(["", "ci", "ü"])
        accepted = JobAccepted(
            at=self.now,
            owner=owner,
            model=self.random.choice(["m", "n"]),
            mode=self.random.choice(list(Mode)),
            body=self.random.randbytes(self.random.choice([0, 9, 5000])),
            detached=self.random.random() < 0.6,
            result_ttl_s=self.random.choice([0.0, 5.0, 60.0]),
            headers=(("anthropic-beta", "x"),),
            request_id=f"req-{len(self.jobs)}",
            may_rerun=self.random.random() < 0.5,
            idempotency_key=self.random.choice([None, None, "k1", "k2"]),
            batch_id=self.random.choice([None, "b"]),
        )
        deferred = self.random.random() < 0.7 and not accepted.detached
        more: list[list[Event]] = [
            [],
            [self.started(1)],
            [self.started(1), *self.again(1)],
            [JobFailed(at=self.now, failure=FAILURE)],
        ]
        events = [accepted, *self.random.choice(more)]
        answered = await self.pair.both(lambda log: log.append(job_id, events, 0, deferred=deferred))
        if answered == len(events):
            self.jobs.append(job_id)

    async def snapshot(self, job_id: str) -> JobSnapshot | None:
        found = await self.pair.both(lambda log: log.snapshot(job_id))
        return found if isinstance(found, JobSnapshot) else None

    def next_events(self, now: JobSnapshot) -> Sequence[Event]:
        at = self.now
        if now.state in ENDED:
            return [JobExpired(at=at)]
        started = self.started(now.attempt + 1)
        ends: list[Event] = [
            JobFailed(at=at, failure=FAILURE, usage={"output_tokens": 2}),
            JobCancelled(at=at, by="ci", reason="asked"),
        ]
        if now.state is JobState.PENDING:
            return self.random.choice(
                [[started], [started], [JobDetached(at=at, result_ttl_s=7.5)], ends[:1]]
            )
        again = self.again(now.attempt)
        message = b'{"id":"m"}' if self.random.random() < 0.7 else b""
        ends.append(JobCompleted(at=at, attempt=now.attempt, message=message, usage={"input_tokens": 5}))
        last = FramesReceived(at=at, attempt=now.attempt, first=now.frames + 1, frames=(b"last", b"ones"))
        return self.random.choice([again, [again[0], ends[0]], [ends[1]], [ends[2]], [last, ends[2]]])

    def started(self, attempt: int) -> AttemptStarted:
        return AttemptStarted(at=self.now, attempt=attempt, provider="p", upstream_model="u")

    def again(self, attempt: int) -> list[Event]:
        failed = AttemptFailed(at=self.now, attempt=attempt, failure=FAILURE, next=NextStep.RETRY)
        return [failed, self.started(attempt + 1)]

    async def go_on(self) -> None:
        job_id = self.job()
        now = await self.snapshot(job_id)
        if now is not None:
            events = self.next_events(now)
            deferred = (
                self.random.random() < 0.7
                and not now.detached
                and not any(isinstance(event, JobDetached | JobExpired) for event in events)
            )
            await self.pair.both(lambda log: log.append(job_id, events, now.last_seq, deferred=deferred))

    async def frames(self) -> None:
        job_id = self.job()
        now = await self.snapshot(job_id)
        if now is None:
            return
        seq = now.last_seq
        for _ in range(self.random.randrange(1, 6)):
            run = [
                self.random.randbytes(self.random.choice([1, 40])) for _ in range(self.random.randrange(1, 4))
            ]
            answered = await self.pair.both(partial(add_frames, now, run, seq, self.now))
            if not isinstance(answered, int):
                break
            seq = answered

    async def settle(self) -> None:
        job_id = self.job()
        frames = self.random.random() < 0.5
        await self.pair.both(lambda log: log.settle(job_id, frames=frames))

    async def astray(self) -> None:
        job_id = self.job()
        seq = self.random.randrange(6)
        now = await self.snapshot(job_id)
        astray: list[Event] = [
            JobExpired(at=self.now),
            # Should it follow after all: no two attempts have one number.
            self.started(now.attempt + 1 if now else 1),
            JobAccepted(at=self.now, owner="", model="m", mode=Mode.ASYNC, body=b""),
        ]
        event = self.random.choice(astray)
        if job_id != "nobody" or not isinstance(event, JobAccepted):
            await self.pair.both(lambda log: log.append(job_id, [event], seq))
            await self.pair.both(lambda log: log.append_frames(job_id, 1, [b"x"], seq, self.now))

    async def drop(self) -> None:
        job_id = self.job()
        if self.random.random() < 0.5:
            await self.pair.both(lambda log: log.redact(job_id))
        else:
            await self.pair.both(lambda log: log.forget(job_id))

    async def purge(self) -> None:
        before, limit = self.now - self.random.choice([0.0, 10.0, 60.0]), self.random.randrange(1, 9)
        await self.pair.both(lambda log: log.purge(before, limit))

    async def look(self) -> None:
        pair, random = self.pair, self.random
        job_id, after, limit = self.job(), random.randrange(9), random.choice([1, 3, 1000])
        now = await self.snapshot(job_id)
        await pair.both(lambda log: log.read(job_id, after, limit))
        if now is not None:
            attempt, size = random.randrange(1, now.attempt + 2), random.choice([1, 50, 1 << 18])
            await pair.both(lambda log: all_frames(log, job_id, attempt, size))
        await pair.both(lambda log: log.unfinished())
        await pair.both(lambda log: log.next_deadline())
        moment = self.now + random.choice([0.0, 30.0])
        due = await pair.both(lambda log: ids_by_moment(log, moment))
        assert all(at <= moment for at, _ in due)
        where = JobFilter(
            owner=random.choice([None, "ci"]),
            states=random.choice([None, frozenset({JobState.COMPLETED, JobState.PENDING})]),
            model=random.choice([None, "n"]),
        )
        side = random.choice(["after_id", "before_id"])
        cursor: dict[str, str | None] = {side: random.choice([None, self.job()])}
        await pair.both(lambda log: log.page(where, limit=random_limit(limit), **cursor))


def random_limit(limit: int) -> int:
    return min(limit, 4)


async def ids_by_moment(log: EventLog, moment: float) -> list[tuple[float, str]]:
    """Jobs due at the same moment come in any order."""
    return sorted((job.expires_at or 0.0, job.job_id) for job in await log.due(moment, 1000))


@pytest.mark.parametrize("seed", range(6))
async def test_both_logs_tell_the_same_story(tmp_path: Path, seed: int) -> None:
    async with AsyncExitStack() as stack:
        # Mostly flushed when the log is closed, or all the time.
        pair = Pair(tmp_path / "events.db", stack, flush_interval_s=(0.25, 0.001)[seed % 2])
        await pair.open()
        driver = Driver(seed, pair)
        for step in range(STEPS):
            await driver.step()
            if step % 50 == 49:
                await pair.reopen()
        held_bytes = 0
        for job_id in driver.jobs:
            story = await pair.both(partial(whole_story, job_id))
            if isinstance(story, list):
                held_bytes += sum(content_bytes(stored.event) for stored in story[1])
        assert pair.memory.held_bytes == held_bytes
        assert len(driver.jobs) > 15
