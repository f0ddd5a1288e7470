"""What a client was told, and whether what it is told later agrees with that.

Nothing in here looks at the daemon's file or its memory: every judgement is from answers alone.
"""

import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from tests.support.gateway import Answer, SseEvent

CLOCK_SLACK_S = 0.1
"""Between this process's clock and a moment the daemon named: rounding, and an answer under way."""
RECORD_S = 15
"""How long the record of an attached call is kept; ``log.history_s``."""
ENDED = ("completed", "failed", "cancelled")
NOT_RERUN = "x-bf-async-retry was never"
INTERRUPTED = "interrupted by a restart"


class BrokenPromiseError(AssertionError):
    """The daemon took back what it had said."""


@dataclass
class StreamNote:
    """The frames read of a job's newest attempt, without a hole."""

    attempt: int = 0
    last: int = 0
    text: str = ""
    message_id: str | None = None
    stopped: bool = False

    @property
    def cursor(self) -> str | None:
        """The ``Last-Event-ID`` to go on from."""
        return f"{self.attempt}-{self.last}" if self.last else None


@dataclass
class JobNote:
    """One job, from the client's side."""

    job_id: str
    text: str
    ttl_s: int
    submitted_at: float
    """Unix seconds, before the request was sent."""
    attached: bool = False
    never: bool = False
    key: str | None = None
    status: str | None = None
    """Once it was seen ended."""
    result: tuple[int, bytes] | None = None
    message_id: str | None = None
    """Of the Message, or of a stream that was read to its message_stop."""
    expires_at: float | None = None
    attempts: int = 0
    cancelled: bool = False
    cancel_asked: bool = False
    deleted: bool = False
    delete_asked: bool = False
    being_read: bool = False
    """Somebody goes on with :attr:`read`."""
    read: StreamNote = field(default_factory=StreamNote)

    @property
    def kept(self) -> bool:
        """Whether its end must still be there to be read at the end of the run."""
        return not self.attached and not self.delete_asked and self.ttl_s > 60


@dataclass(frozen=True)
class Asked:
    """What was known of a job when a question about it was sent."""

    at: float
    cancelled: bool
    deleted: bool
    ended: bool
    attempts: int


def moment(text: str | None) -> float | None:
    """Unix seconds of an RFC 3339 time."""
    return None if text is None else datetime.fromisoformat(text).timestamp()


class Notes:
    """Every job, and what was counted on the way. Each method raises BrokenPromiseError."""

    def __init__(self) -> None:
        self.jobs: dict[str, JobNote] = {}
        self.keys: dict[str, str] = {}
        """Idempotency key to job id, once that was told."""
        self.counts: Counter[str] = Counter()

    def accepted(self, job: JobNote) -> JobNote:
        """A submit was answered; the note of the job, an earlier one where the key was used before."""
        if job.key is not None:
            known = self.keys.setdefault(job.key, job.job_id)
            if known != job.job_id:
                raise BrokenPromiseError(f"key {job.key}: job {known}, then job {job.job_id}")
        self.counts["accepted"] += job.job_id not in self.jobs
        return self.jobs.setdefault(job.job_id, job)

    def asking(self, job: JobNote) -> Asked:
        """Call it when a question is sent."""
        return Asked(time.time(), job.cancelled, job.deleted, job.status is not None, job.attempts)

    def gone(self, job: JobNote) -> None:
        """404: only what was deleted, or has outlived its time."""
        if job.delete_asked:
            return
        until = job.expires_at if job.expires_at is not None else job.submitted_at + job.ttl_s
        if time.time() < until - CLOCK_SLACK_S:
            raise BrokenPromiseError(f"{job}: gone {until - time.time():.3f} s before its time")
        self.counts["expired as promised"] += 1

    def still_there(self, job: JobNote, asked: Asked) -> None:
        """Any answer but 404: neither of what was deleted nor of what has outlived its time."""
        if asked.deleted:
            raise BrokenPromiseError(f"{job}: was deleted")
        if job.expires_at is not None and not job.attached and asked.at > job.expires_at + CLOCK_SLACK_S:
            raise BrokenPromiseError(f"{job}: outlived its time by {asked.at - job.expires_at:.3f} s")

    def polled(self, job: JobNote, asked: Asked, answer: Answer) -> None:
        """The answer to a poll, or to a submit with a key that was used before."""
        if answer.status == 404:
            self.gone(job)
            return
        self.still_there(job, asked)
        status = answer.headers.get("x-bf-async-status")
        if status not in ENDED:
            if answer.status != 200 or asked.ended:
                raise BrokenPromiseError(f"{job}: {answer.status} {status} {answer.body!r}")
            return
        self.ended(job, asked, status)
        if job.result is not None and job.result != (answer.status, _content(answer)):
            raise BrokenPromiseError(f"{job}: two results, the other {answer.body!r}")
        if job.result is None:
            self.counts["results"] += 1
        job.result = (answer.status, _content(answer))
        if status == "completed":
            self.message(job, answer.json)
        elif status == "failed":
            self.failure(job, answer.json["error"]["message"])

    def message(self, job: JobNote, message: dict[str, Any]) -> None:
        """A Message: of this job's text, and the only one there ever was."""
        text = "".join(block["text"] for block in message["content"])
        if text != job.text or message["stop_reason"] != "end_turn":
            raise BrokenPromiseError(f"{job}: a wrong result {message}")
        self.one_message(job, message["id"])

    def one_message(self, job: JobNote, message_id: str) -> None:
        """A result was told, by a poll or by a stream's message_stop: it is always the same."""
        if job.message_id not in (None, message_id):
            raise BrokenPromiseError(f"{job}: two results, the other {message_id}")
        job.message_id = message_id

    def failure(self, job: JobNote, text: str) -> None:
        """Nothing fails here but what a restart may fail."""
        if job.never and NOT_RERUN in text:
            self.counts["not run again, as asked"] += 1
        elif not (job.attached and INTERRUPTED in text):
            raise BrokenPromiseError(f"{job}: failed: {text}")

    def described(self, job: JobNote, asked: Asked, answer: Answer) -> None:
        """``GET /v1/jobs/{id}``, and the answer to a cancel."""
        if answer.status == 404:
            if not job.attached:
                self.gone(job)
            elif time.time() < job.submitted_at + RECORD_S:
                raise BrokenPromiseError(f"{job}: its record is gone")
            return
        if answer.status != 200:
            raise BrokenPromiseError(f"{job}: {answer.status} {answer.body!r}")
        self.still_there(job, asked)
        found = answer.json
        if found["attempts"] < asked.attempts or (job.never and found["attempts"] > 1):
            raise BrokenPromiseError(f"{job}: {found['attempts']} attempts")
        job.attempts = max(job.attempts, found["attempts"])
        if found["status"] not in ENDED:
            if asked.ended:
                raise BrokenPromiseError(f"{job}: it is {found['status']}")
            return
        self.ended(job, asked, found["status"])
        expires_at = moment(found["expires_at"])
        if job.expires_at is not None and expires_at != job.expires_at:
            raise BrokenPromiseError(f"{job}: it now expires at {expires_at}")
        job.expires_at = expires_at
        if found["status"] == "failed":
            self.failure(job, found["error"]["message"])

    def ended(self, job: JobNote, asked: Asked, status: str) -> None:
        """It was seen ended: it stays so, in the same way."""
        if job.status not in (None, status) or (asked.cancelled and status != "cancelled"):
            raise BrokenPromiseError(f"{job}: it is {status}")
        if status == "cancelled" and not (job.cancel_asked or job.attached):
            raise BrokenPromiseError(f"{job}: nobody cancelled it")
        job.status = status

    def frame(self, job: JobNote, read: StreamNote, event: SseEvent) -> None:
        """One more frame of a stream: the very next one."""
        if event.id is None:
            raise BrokenPromiseError(f"{job}: a frame without an id: {event}")
        attempt, number = map(int, event.id.split("-"))
        if read.last == 0:
            read.attempt = attempt
        if (attempt, number) != (read.attempt, read.last + 1):
            raise BrokenPromiseError(f"{job}: frame {event.id} after {read.attempt}-{read.last}")
        read.last = number
        self.follow(job, read, event)

    def follow(self, job: JobNote, read: StreamNote, event: SseEvent) -> None:
        """What a frame says; ``message_stop`` is an end that was told."""
        match event.event:
            case "message_start":
                read.message_id = event.data["message"]["id"]
            case "content_block_delta":
                read.text += event.data["delta"]["text"]
            case "message_stop":
                read.stopped = True
                if read.text != job.text or read.message_id is None:
                    raise BrokenPromiseError(f"{job}: a stream with a hole: {read}")
                self.one_message(job, read.message_id)

    def given_up(self, job: JobNote, read: StreamNote) -> None:
        """409: what was read of the attempt is void, which a whole stream never is."""
        if read.stopped:
            raise BrokenPromiseError(f"{job}: its whole stream was given up")
        self.counts["streams begun anew"] += 1
        job.read = StreamNote()


def _content(answer: Answer) -> bytes:
    """The body, but for the id of the request in an error."""
    if answer.status == 200:
        return answer.body
    error = answer.json["error"]
    return f"{error['type']}: {error['message']}".encode()
