"""Lives and deaths of the daemon.

Each life ends in a SIGKILL at a moment picked at random around something that is worth interrupting
(:class:`Death`); the next life opens the same file. The last one is given the time to end everything, and is
then asked about every job there ever was.
"""

import random
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from pathlib import Path

import orjson
import trio

from tests.crash.client import SHORT_TTL_S, Client, DaemonGoneError, Keyed, Life
from tests.crash.notes import RECORD_S, BrokenPromiseError, JobNote, Notes
from tests.e2e.daemon import Process, spawned

CLIENTS = 6
LIFE_TIMEOUT_S = 40.0
FINALE_TIMEOUT_S = 60.0
FINALE_S_A_KILL = 4.0
"""More of it, as each life leaves more to end and to be asked about."""
CHECKS_AT_ONCE = 16
MANY_ATTEMPTS = 1_000_000
TOML = f"""
[server]
port = 0
[jobs]
drain_s = 1
max_resumed = 20
max_attempts = {MANY_ATTEMPTS}
[log]
url = "sqlite:///events.db"
history_s = {RECORD_S}
[[providers]]
name = "fast"
kind = "echo"
[[providers]]
name = "slow"
kind = "echo"
frame_delay_s = 0.02
[[providers]]
name = "slower"
kind = "echo"
first_frame_delay_s = 0.3
frame_delay_s = 0.1
[[routes]]
model = "fast"
provider = "fast"
[[routes]]
model = "slow"
provider = "slow"
[[routes]]
model = "slower"
provider = "slower"
"""


class Death(StrEnum):
    """When a life ends."""

    LOAD = "at any moment under load"
    ANSWER = "right after a submit was answered"
    COMMIT = "while submits are being committed"
    END = "while ends are being committed"
    EXPIRY = "while results expire"
    RECOVERY = "during recovery"
    START = "at any moment of a start"
    DRAIN = "during a shutdown"


@dataclass
class Story:
    """What happened, for the summary."""

    seed: int
    deaths: Counter[Death] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    resumed: list[int] = field(default_factory=list)
    """Jobs taken up again, for each life that got so far."""
    accepted: int = 0
    ended: Counter[str] = field(default_factory=Counter)
    most_attempts: int = 0
    took_s: float = 0.0

    @property
    def text(self) -> str:
        """A page for a person."""
        lines = [f"seed {self.seed}: {self.deaths.total()} kills, {self.accepted} jobs, {self.took_s:.0f} s"]
        lines += [f"  {count:5} killed {death}" for death, count in sorted(self.deaths.items())]
        lines += [f"  {count:5} {what}" for what, count in sorted(self.counts.items())]
        lines += [f"  {count:5} jobs {status}" for status, count in sorted(self.ended.items())]
        lines.append(
            f"  {sum(self.resumed):5} resumptions; at most {max(self.resumed, default=0)} at a start"
        )
        lines.append(f"  {self.most_attempts:5} attempts at most at one job")
        return "\n".join(lines)


async def torment(place: Path, *, kills: int, seed: int, tell: Callable[[str], None]) -> Story:
    """Kill the daemon ``kills`` times in the directory ``place``. Raises BrokenPromiseError."""
    try:
        return await _Run(place, seed, tell).run(kills)
    except BaseException as error:
        error.add_note(f"seed {seed}")
        raise


class _Run:
    def __init__(self, place: Path, seed: int, tell: Callable[[str], None]) -> None:
        (place / "messagesd.toml").write_text(TOML)
        self._place = place
        self._tell = tell
        self._rng = random.Random(seed)
        self._notes = Notes()
        self._keyed: dict[str, Keyed] = {}
        self._client = Client(self._notes, self._rng, self._keyed)
        self._story = Story(seed)

    async def run(self, kills: int) -> Story:
        began_at = time.monotonic()
        deaths = [list(Death)[number % len(Death)] for number in range(kills)]
        self._rng.shuffle(deaths)
        for number, death in enumerate(deaths, 1):
            self._tell(f"{number}/{kills}: {death}")
            with trio.fail_after(LIFE_TIMEOUT_S):
                await self._life(death)
            self._story.deaths[death] += 1
        with trio.fail_after(FINALE_TIMEOUT_S + kills * FINALE_S_A_KILL):
            await self._finale()
        jobs = self._notes.jobs.values()
        self._story.counts += self._notes.counts
        self._story.accepted = len(self._notes.jobs)
        self._story.ended = Counter(job.status or "gone unseen" for job in jobs)
        self._story.most_attempts = max((job.attempts for job in jobs), default=0)
        self._story.took_s = time.monotonic() - began_at
        return self._story

    # -- one life --------------------------------------------------------------------------------

    async def _life(self, death: Death) -> None:
        with spawned("serve", cwd=self._place) as daemon:
            if death is Death.START:
                await trio.sleep(self._rng.uniform(0, 0.6))
                daemon.process.kill()
            elif death is Death.RECOVERY:
                await self._until_opened(daemon)
                await trio.sleep(self._rng.uniform(0, 0.06))
                self._story.counts["kills between opening and listening"] += not daemon.out
                daemon.process.kill()
            else:
                await trio.to_thread.run_sync(daemon.started)
                try:
                    await self._lived(daemon, Life(daemon.url), death)
                except BaseException as error:
                    error.add_note(f"the daemon said: {daemon.errors[-4000:]}")
                    raise
            await trio.to_thread.run_sync(daemon.wait)
            self._hear(daemon)

    async def _until_opened(self, daemon: Process) -> None:
        """Until the daemon has its lock on the file: recovery comes next."""
        lock = self._place / "events.db.lock"
        while daemon.process.poll() is None:
            with suppress(FileNotFoundError):
                if lock.read_text().strip() == str(daemon.pid):
                    return
            await trio.sleep(0.001)

    async def _lived(self, daemon: Process, life: Life, death: Death) -> None:
        def kill() -> None:
            life.doomed = True
            daemon.process.kill()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._audit, life)
            for _ in range(CLIENTS):
                nursery.start_soon(self._client.work, life)
            await trio.sleep(self._rng.uniform(0.05, 0.5))
            match death:
                case Death.ANSWER:
                    until = life.accepted + self._rng.randint(1, 25)
                    while life.accepted < until:  # noqa: ASYNC110 - as fine as can be, without a timer
                        await trio.lowlevel.checkpoint()
                case Death.COMMIT:
                    for _ in range(30):
                        nursery.start_soon(self._one_submit, life)
                    await self._soon(0.03)
                case Death.END:
                    jobs = await self._many(life, 20)
                    for job in jobs:
                        nursery.start_soon(self._one_watch, life, job)
                    until = self._rng.randint(1, len(jobs))
                    while sum(job.read.stopped or job.cancel_asked for job in jobs) < until:  # noqa: ASYNC110 - the same
                        await trio.lowlevel.checkpoint()
                    await self._soon(0.002)
                case Death.EXPIRY:
                    await self._until_expiry(life)
                case Death.DRAIN:
                    life.doomed = True
                    daemon.tell(signal.SIGTERM)
                    await trio.sleep(self._rng.uniform(0, 1.2))
                case _:
                    await trio.sleep(self._rng.uniform(0, 0.8))
            kill()
        self._story.counts["submits cut off without an answer"] += life.unanswered

    async def _soon(self, within_s: float) -> None:
        """A random moment, finer than a timer's."""
        until = time.monotonic() + self._rng.uniform(0, within_s)
        while time.monotonic() < until:  # noqa: ASYNC110 - the same
            await trio.lowlevel.checkpoint()

    async def _one_submit(self, life: Life) -> None:
        with suppress(DaemonGoneError):
            await self._client.submit(life)

    async def _one_watch(self, life: Life, job: JobNote) -> None:
        with suppress(DaemonGoneError):
            while not (job.read.stopped or job.cancel_asked or job.delete_asked):
                await self._client.watch(life, job)

    async def _many(self, life: Life, count: int, *, model: str = "slow", ttl_s: int = 3600) -> list[JobNote]:
        jobs: list[JobNote] = []

        async def one() -> None:
            job = await self._client.submit_one(life, model=model, ttl_s=ttl_s)
            if job is not None:
                jobs.append(job)

        async with trio.open_nursery() as nursery:
            for _ in range(count):
                nursery.start_soon(one)
        return jobs

    async def _until_some_end(self, life: Life, jobs: list[JobNote]) -> None:
        while not any(job.status for job in jobs):
            await self._client.poll(life, self._rng.choice(jobs), wait_s=0.05)

    async def _until_expiry(self, life: Life) -> None:
        jobs = await self._many(life, 30, model="fast", ttl_s=SHORT_TTL_S)
        await self._until_some_end(life, jobs)
        for job in jobs:
            await self._client.describe(life, job)
        due = [job.expires_at for job in jobs if job.expires_at is not None]
        if due:
            await trio.sleep(max(0.0, self._rng.uniform(min(due) - 0.01, max(due) + 0.03) - time.time()))

    # -- judging ---------------------------------------------------------------------------------

    async def _audit(self, life: Life) -> None:
        """What was promised in earlier lives, asked first thing in this one."""
        jobs = list(self._notes.jobs.values())
        unended = [job for job in jobs if job.status is None]
        others = [job for job in jobs if job.status is not None]
        with suppress(DaemonGoneError):
            for key in [key for key in self._keyed if key not in self._notes.keys]:
                await self._client.again(life, key)
            for job in unended[-40:] + self._rng.sample(others, min(20, len(others))):
                await self._client.describe(life, job)
                if not job.attached:
                    await self._client.poll(life, job)
                if self._rng.random() < 0.2 and not (job.attached or job.delete_asked):
                    await self._client.watch(life, job)

    def _hear(self, daemon: Process) -> None:
        """What it printed: nothing it was surprised by, and how many jobs it took up again."""
        for line in daemon.err:
            if not line.endswith("\n"):
                continue
            if not line.startswith("{"):
                raise BrokenPromiseError(f"the daemon printed {daemon.errors}")
            said = orjson.loads(line)
            if said["level"] in ("error", "critical"):
                raise BrokenPromiseError(f"the daemon said {line}")
            if said["action"] == "recovery.done":
                self._story.resumed.append(said["resumed"])

    async def _finale(self) -> None:
        """Time for everything to end; then every job there ever was, and every stream."""
        with spawned("serve", cwd=self._place) as daemon:
            await trio.to_thread.run_sync(daemon.started)
            life = Life(daemon.url)
            jobs = list(self._notes.jobs.values())
            await self._each(jobs, partial(self._until_ended, life))
            await self._each(jobs, partial(self._judged, life))
            # Twice: what was read once is the same when it is read again.
            await self._each(jobs, partial(self._judged, life))
            left = await self._client.ask(life, "GET", "/v1/jobs?status=processing")
            waiting = await self._client.ask(life, "GET", "/v1/jobs?status=pending")
            if left.json["data"] or waiting.json["data"]:
                raise BrokenPromiseError(f"not ended: {left.json['data'] + waiting.json['data']}")
            life.doomed = True
            daemon.tell(signal.SIGTERM)
            if await trio.to_thread.run_sync(daemon.wait) != 0:
                raise BrokenPromiseError(f"a clean shutdown failed: {daemon.errors}")
            self._hear(daemon)

    async def _each(self, jobs: list[JobNote], check: Callable[[JobNote], Awaitable[None]]) -> None:
        limiter = trio.CapacityLimiter(CHECKS_AT_ONCE)

        async def one(job: JobNote) -> None:
            async with limiter:
                await check(job)

        async with trio.open_nursery() as nursery:
            for job in jobs:
                nursery.start_soon(one, job)

    async def _until_ended(self, life: Life, job: JobNote) -> None:
        while job.kept and job.status is None:
            await self._client.poll(life, job, wait_s=5)

    async def _judged(self, life: Life, job: JobNote) -> None:
        await self._client.describe(life, job)
        if job.attached:
            return
        await self._client.poll(life, job)
        if job.kept and job.result is None:
            raise BrokenPromiseError(f"{job}: its end cannot be read")
        if not job.delete_asked:
            await self._client.watch(life, job)
            # Where the attempt was given up, the one that ended is read from its start.
            if job.status == "completed" and job.kept and not job.read.stopped:
                await self._client.watch(life, job)
                if not job.read.stopped:
                    raise BrokenPromiseError(f"{job}: its stream cannot be read to its end")
