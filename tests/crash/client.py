"""One client of a daemon that may die at any moment: what it asks, and what it notes down."""

import random
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

import h11
import trio

from tests.crash.notes import ENDED, BrokenPromiseError, JobNote, Notes, StreamNote
from tests.support.gateway import BODY, Answer, Call, request, start

LOST = (OSError, trio.BrokenResourceError, trio.ClosedResourceError, h11.RemoteProtocolError)
"""How a connection to a killed process ends."""
ANSWER_TIMEOUT_S = 15.0
"""For anything that a living daemon answers at once."""
LONG_TTL_S = 3600
SHORT_TTL_S = 1
MODELS = ("fast", "fast", "slow", "slow", "slower")
ROUTE = "/v1/messages"


class DaemonGoneError(Exception):
    """The connection is lost, as was to be expected: the daemon was killed."""


@dataclass
class Life:
    """One run of the daemon, as its clients see it."""

    url: str
    doomed: bool = False
    """From here on connections may be lost, and jobs refused."""
    accepted: int = 0
    unanswered: int = 0
    """Submits cut off without an answer."""


@dataclass(frozen=True)
class Keyed:
    """A call with an idempotency key, to be made again word for word."""

    text: str
    headers: Mapping[str, str]
    model: str


class Client:
    """Asks at random, and judges every answer by the notes."""

    def __init__(self, notes: Notes, rng: random.Random, keyed: dict[str, Keyed]) -> None:
        self._notes = notes
        self._rng = rng
        self._keyed = keyed
        """Every call with a key that was ever made, answered or not."""

    async def work(self, life: Life) -> None:
        """Ask, until the daemon is gone."""
        acts = (
            (self.submit, 8),
            (self.submit_again, 2),
            (self.stream_detached, 2),
            (self.stream_attached, 2),
            (self.plain_attached, 1),
            (self.poll_some, 4),
            (self.describe_some, 3),
            (self.watch_some, 4),
            (self.cancel_some, 1),
            (self.delete_some, 1),
        )
        try:
            while True:
                (act,) = self._rng.choices([act for act, _ in acts], [weight for _, weight in acts])
                await act(life)
        except DaemonGoneError:
            return

    @asynccontextmanager
    async def _losing(self, life: Life) -> AsyncIterator[None]:
        try:
            yield
        except LOST as error:
            if life.doomed:
                raise DaemonGoneError from error
            raise BrokenPromiseError("a connection was lost while the daemon lived") from error

    async def ask(
        self,
        life: Life,
        method: str,
        path: str,
        headers: Mapping[str, str] | None = None,
        body: object = None,
    ) -> Answer:
        """One request. Raises DaemonGoneError."""
        async with self._losing(life):
            with trio.fail_after(ANSWER_TIMEOUT_S):
                return await request(life.url, method, path, headers, body)
        raise AssertionError("unreachable")

    def _pick(self, *, ended: bool | None = None, attached: bool = False) -> JobNote | None:
        """Some job among the latest, or any of all."""
        jobs = list(self._notes.jobs.values())
        if self._rng.random() < 0.7:
            jobs = jobs[-60:]
        fit = [
            job
            for job in jobs
            if (attached or not job.attached) and (ended is None or (job.status is not None) == ended)
        ]
        return self._rng.choice(fit) if fit else None

    def _text(self) -> str:
        words = self._rng.randint(3, 15)
        return " ".join(f"w{self._rng.getrandbits(32):x}" for _ in range(words))

    # -- submitting ------------------------------------------------------------------------------

    async def submit(self, life: Life) -> None:
        """An async job, of any kind."""
        ttl_s = SHORT_TTL_S if self._rng.random() < 0.25 else LONG_TTL_S
        headers: dict[str, str] = {}
        if self._rng.random() < 0.25:
            headers["x-bf-async-retry"] = "never"
        if self._rng.random() < 0.3:
            ttl_s = LONG_TTL_S
            headers["idempotency-key"] = f"{self._rng.getrandbits(64):x}"
        await self.submit_one(life, ttl_s=ttl_s, headers=headers, model=self._rng.choice(MODELS))

    async def submit_one(
        self,
        life: Life,
        *,
        ttl_s: int = LONG_TTL_S,
        headers: Mapping[str, str] | None = None,
        model: str = "fast",
        text: str | None = None,
    ) -> JobNote | None:
        """An async job; None when it was refused for a shutdown."""
        text = text or self._text()
        sent = {**(headers or {}), "x-bf-async": "true", "x-bf-async-job-result-ttl": str(ttl_s)}
        key = sent.get("idempotency-key")
        if key is not None:
            self._keyed.setdefault(key, Keyed(text, sent, model))
        at = time.time()
        try:
            answer = await self.ask(life, "POST", ROUTE, sent, body_of(text, model))
        except DaemonGoneError:
            life.unanswered += 1
            raise
        if answer.status == 529 and life.doomed:
            return None
        if "x-bf-async-id" not in answer.headers:
            raise BrokenPromiseError(f"a submit was answered {answer.status} {answer.body!r}")
        life.accepted += 1
        note = JobNote(answer.job_id, text, ttl_s, at, key=key, never="x-bf-async-retry" in sent)
        note = self._notes.accepted(note)
        if answer.headers["x-bf-async-status"] in ENDED:
            self._notes.polled(note, self._notes.asking(note), answer)
        return note

    async def submit_again(self, life: Life) -> None:
        """A call that was made before, possibly without an answer, possibly at this very moment."""
        if not self._keyed:
            return
        key = self._rng.choice(list(self._keyed)[-20:])
        await self.again(life, key)

    async def again(self, life: Life, key: str) -> None:
        """Make the call with this key again: it is the same job."""
        keyed = self._keyed[key]
        known = key in self._notes.keys
        job = await self.submit_one(
            life, ttl_s=LONG_TTL_S, headers=keyed.headers, model=keyed.model, text=keyed.text
        )
        if job is not None:
            self._notes.counts["keys used again" if known else "keys of unanswered calls"] += 1

    # -- attached and detached calls -------------------------------------------------------------

    async def plain_attached(self, life: Life) -> None:
        """A plain call: its answer is that of its text."""
        text = self._text()
        answer = await self.ask(life, "POST", ROUTE, {}, body_of(text, self._rng.choice(MODELS)))
        if answer.status == 200:
            got = "".join(block["text"] for block in answer.json["content"])
            if got != text:
                raise BrokenPromiseError(f"a wrong answer: {got!r}, not {text!r}")
            self._notes.counts["plain calls answered"] += 1
        elif not life.doomed:
            raise BrokenPromiseError(f"a plain call was answered {answer.status} {answer.body!r}")

    async def stream_detached(self, life: Life) -> None:
        """A stream whose job outlives it."""
        headers = {"x-bf-detach": "true", "x-bf-async-job-result-ttl": str(LONG_TTL_S)}
        await self._stream(life, headers, attached=False)

    async def stream_attached(self, life: Life) -> None:
        """A stream whose job does not."""
        await self._stream(life, {}, attached=True)

    async def _stream(self, life: Life, headers: Mapping[str, str], *, attached: bool) -> None:
        text, at = self._text(), time.time()
        body = {**body_of(text, self._rng.choice(MODELS)), "stream": True}
        async with self._losing(life), start(life.url, "POST", ROUTE, headers, body) as call:
            with trio.fail_after(ANSWER_TIMEOUT_S):
                head = await call.head()
            if head.status != 200:
                if not life.doomed:
                    raise BrokenPromiseError(f"a stream was answered {head.status}")
                return
            job = JobNote(head.job_id, text, LONG_TTL_S, at, attached=attached)
            self._notes.accepted(job)
            job.being_read = True
            try:
                if attached:
                    await self._read_plainly(life, job, call)
                else:
                    await self._read(life, job, job.read, call)
            finally:
                job.being_read = False

    async def _read_plainly(self, life: Life, job: JobNote, call: Call) -> None:
        leave_after = self._rng.randint(0, 12)
        with trio.fail_after(ANSWER_TIMEOUT_S):
            while (event := await call.event()) is not None:
                if event.event == "error":
                    self._error(life, job, event.data["error"]["message"])
                    return
                self._notes.follow(job, job.read, event)
                leave_after -= 1
                if leave_after == 0 and not job.read.stopped:
                    return
        if not job.read.stopped:
            raise BrokenPromiseError(f"{job}: its stream ended without an end")

    async def _read(self, life: Life, job: JobNote, read: StreamNote, call: Call) -> None:
        with trio.fail_after(ANSWER_TIMEOUT_S):
            while (event := await call.event()) is not None:
                if event.event == "ping":
                    continue
                if event.event == "error":
                    self._error(life, job, event.data["error"]["message"])
                    return
                self._notes.frame(job, read, event)
        if not read.stopped:
            raise BrokenPromiseError(f"{job}: its stream ended without an end")
        self._notes.counts["streams read to their end"] += 1

    def _error(self, life: Life, job: JobNote, text: str) -> None:
        if job.never and not (job.cancel_asked or life.doomed):
            self._notes.failure(job, text)
        elif not (job.cancel_asked or job.delete_asked or life.doomed or job.ttl_s == SHORT_TTL_S):
            raise BrokenPromiseError(f"{job}: its stream ended with {text!r}")

    # -- looking after them ----------------------------------------------------------------------

    async def poll_some(self, life: Life) -> None:
        """Poll some job, with or without waiting for it."""
        job = self._pick()
        if job is not None:
            await self.poll(life, job, wait_s=self._rng.choice((0, 0, 0.3)))

    async def poll(self, life: Life, job: JobNote, *, wait_s: float = 0) -> None:
        """Poll a job."""
        asked = self._notes.asking(job)
        headers = {"x-bf-async-id": job.job_id, **({"prefer": f"wait={wait_s}"} if wait_s else {})}
        self._notes.polled(job, asked, await self.ask(life, "POST", ROUTE, headers))

    async def describe_some(self, life: Life) -> None:
        """Look at some job's record."""
        job = self._pick(attached=True)
        if job is not None:
            await self.describe(life, job)

    async def describe(self, life: Life, job: JobNote) -> None:
        """Look at a job's record."""
        asked = self._notes.asking(job)
        self._notes.described(job, asked, await self.ask(life, "GET", f"/v1/jobs/{job.job_id}"))

    async def cancel_some(self, life: Life) -> None:
        """Cancel some job."""
        job = self._pick(ended=False)
        if job is None:
            return
        job.cancel_asked = True
        asked = self._notes.asking(job)
        answer = await self.ask(life, "POST", f"/v1/jobs/{job.job_id}/cancel")
        self._notes.described(job, asked, answer)
        if answer.status == 200 and answer.json["status"] == "cancelled":
            job.cancelled = True
            self._notes.counts["cancelled"] += 1

    async def delete_some(self, life: Life) -> None:
        """Delete some job without a key; one with a key would set that free."""
        job = self._pick(ended=True)
        if job is None or job.key is not None or job.delete_asked:
            return
        job.delete_asked = True
        answer = await self.ask(life, "DELETE", f"/v1/jobs/{job.job_id}")
        if answer.status == 200:
            job.deleted = True
            self._notes.counts["deleted"] += 1
        elif answer.status != 404:
            raise BrokenPromiseError(f"{job}: its deletion was answered {answer.status}")

    async def watch_some(self, life: Life) -> None:
        """Go on with some job's stream."""
        job = self._pick()
        if job is not None and not job.delete_asked:
            await self.watch(life, job)

    async def watch(self, life: Life, job: JobNote) -> None:
        """Go on with a job's stream where it was left; from its start where that was its end."""
        if job.being_read or job.read.stopped:
            await self._watch(life, job, StreamNote())
            return
        job.being_read = True
        try:
            await self._watch(life, job, job.read)
        finally:
            job.being_read = False

    async def _watch(self, life: Life, job: JobNote, read: StreamNote) -> None:
        headers = {} if read.cursor is None else {"last-event-id": read.cursor}
        asked = self._notes.asking(job)
        path = f"/v1/jobs/{job.job_id}/stream"
        async with self._losing(life), start(life.url, "GET", path, headers) as call:
            with trio.fail_after(ANSWER_TIMEOUT_S):
                head = await call.head()
            match head.status:
                case 200:
                    self._notes.still_there(job, asked)
                    self._notes.counts["streams resumed"] += read.cursor is not None
                    await self._read(life, job, read, call)
                case 404:
                    self._notes.gone(job)
                case 409 if read.cursor is not None:
                    self._notes.given_up(job, read)
                case _ if not (job.cancel_asked or job.never or life.doomed):
                    raise BrokenPromiseError(f"{job}: its stream was answered {head.status}")


def body_of(text: str, model: str) -> dict[str, object]:
    """A request that is answered with ``text``."""
    return {**BODY, "model": model, "messages": [{"role": "user", "content": text}]}
