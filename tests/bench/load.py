"""Requests, and the load generator run with them."""

import http.client
import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench.errors import BenchError

KEY = "sk-bf-bench"
STREAM_END = "event: message_stop"
PLAIN_END = '"stop_reason":"end_turn"'
PENDING = '"stop_reason":null'
JOB_ID_HOLE = "@" * 36
POLL_WAIT_S = 10
"""A poll waits for the job's end, so that a pair is two requests and no more."""
EXIT_TIMEOUT_S = 60.0
"""Beyond the time of the run; the load generator gives up long before."""
CALL_TIMEOUT_S = 30.0


def body_of(model: str, *, stream: bool) -> bytes:
    """A Messages request; ``model`` tells the mock upstream how to answer."""
    fields = {
        "model": model,
        "max_tokens": 1024,
        "stream": stream,
        "messages": [{"role": "user", "content": "Tell me about gateways."}],
    }
    if not stream:
        del fields["stream"]
    return json.dumps(fields, separators=(",", ":")).encode()


def request_of(body: bytes, *headers: str, target: str = "POST /v1/messages") -> bytes:
    """The bytes of a request, with what the SDKs send."""
    lines = [
        f"{target} HTTP/1.1",
        "host: 127.0.0.1",
        "accept: application/json",
        "user-agent: Anthropic/Python bench",
        "anthropic-version: 2023-06-01",
        f"x-api-key: {KEY}",
        *headers,
    ]
    if body:
        lines += ["content-type: application/json", f"content-length: {len(body)}"]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


@dataclass(frozen=True)
class Work:
    """What one connection does over and over."""

    request: bytes
    marker: str
    """What the body of a right answer holds."""
    poll: bytes = b""
    """Sent after the answer, with its job id in the place of ``JOB_ID_HOLE``."""
    per_event: bool = False
    """Costs are told by event, not by answer."""


PLAIN = Work(request_of(body_of("plain", stream=False)), PLAIN_END)
FLOOD = Work(request_of(body_of("flood", stream=True)), STREAM_END, per_event=True)
PACED = Work(request_of(body_of("paced", stream=True)), STREAM_END, per_event=True)
SUBMIT = Work(request_of(body_of("plain", stream=False), "x-bf-async: true"), PENDING)
HELD = Work(request_of(body_of("held", stream=False), "x-bf-async: true"), PENDING)
PAIR = Work(
    SUBMIT.request,
    PLAIN_END,
    poll=request_of(b"", f"x-bf-async-id: {JOB_ID_HOLE}", f"prefer: wait={POLL_WAIT_S}", "content-length: 0"),
)


def poll_of(job_id: str) -> Work:
    """Read the result of an ended job."""
    return Work(request_of(b"", f"x-bf-async-id: {job_id}", "content-length: 0"), PLAIN_END)


def watch_of(job_id: str) -> Work:
    """Watch a job's stream."""
    return Work(request_of(b"", target=f"GET /v1/jobs/{job_id}/stream"), STREAM_END, per_event=True)


@dataclass(frozen=True)
class Load:
    """What the load generator saw. All answers were right."""

    answers: int
    events: int
    chunks: int
    polls: int
    failures: int
    reconnects: int
    bytes: int
    seconds: float
    """From the first request to the last answer."""
    cpu_s: float
    """Its own."""
    p50_us: float
    p99_us: float


class LoadRun:
    """The load generator under way."""

    def __init__(
        self,
        tool: Path,
        scratch: Path,
        port: int,
        work: Work,
        *,
        connections: int,
        seconds: float,
        count: int = 0,
    ) -> None:
        """``count``: at most so many requests; 0: as many as the time allows."""
        files = [scratch / "request"]
        files[0].write_bytes(work.request)
        if work.poll:
            files.append(scratch / "poll")
            files[1].write_bytes(work.poll)
        arguments: Sequence[object] = (tool, port, connections, seconds, count, work.marker, *files)
        self._timeout_s = seconds + EXIT_TIMEOUT_S
        self._process = subprocess.Popen(
            [str(argument) for argument in arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def result(self) -> Load:
        """Wait for its end. Raises BenchError for any wrong answer."""
        try:
            out, err = self._process.communicate(timeout=self._timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
            raise BenchError("the load generator did not end") from None
        if self._process.returncode:
            raise BenchError(f"the load generator failed: {err.strip()[:2000]} {out.strip()}")
        return Load(**json.loads(out))


def call(
    port: int, method: str, path: str, *, body: bytes = b"", headers: dict[str, str] | None = None
) -> bytes:
    """One request of our own. Raises BenchError unless it is answered with 200."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=CALL_TIMEOUT_S)
    try:
        connection.request(method, path, body, {"x-api-key": KEY, **(headers or {})})
        answer = connection.getresponse()
        data = answer.read()
    except OSError as error:
        raise BenchError(f"{method} {path}: {error}") from error
    finally:
        connection.close()
    if answer.status != 200:
        raise BenchError(f"{method} {path}: {answer.status} {data[:1000]!r}")
    return data


def call_json(port: int, method: str, path: str, **more: Any) -> dict[str, Any]:
    """The same, for an answer that is a JSON object."""
    found: dict[str, Any] = json.loads(call(port, method, path, **more))
    return found
