"""Webhooks with the official SDK on the one side and the specification's library on the other."""

import base64
import random
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import pytest
from anthropic import Anthropic, BadRequestError
from standardwebhooks.webhooks import Webhook

from tests.e2e.daemon import Process, spawned
from tests.e2e.test_process import until

SECRET = "whsec_" + base64.b64encode(b"a secret of twenty-four bytes").decode()
HOOK = {"x-bf-async": "true", "x-bf-async-webhook": "hook"}
JOBS = 10
"""In each life of the daemon."""
KILLS = 2
SEED = 6
AT_ONCE = 10
"""Calls of an endpoint under way at once, unless it says otherwise."""


@dataclass
class Endpoint:
    """A receiver as its operator would write it: it verifies, then notes."""

    url: str
    heard: list[tuple[str, Any]] = field(default_factory=list)
    """``webhook-id`` and body of each call."""
    refusals: int = 0
    """Calls still to be answered with 503."""

    def has_heard(self, calls: int) -> bool:
        """Whether so many calls came."""
        return len(self.heard) >= calls

    def ids_of(self, event: str) -> dict[str, set[str]]:
        """The ids under which each job was told of."""
        told: dict[str, set[str]] = {}
        for message_id, body in list(self.heard):
            if body["event"] == event:
                told.setdefault(body["data"]["job_id"], set()).add(message_id)
        return told


@contextmanager
def listening() -> Iterator[Endpoint]:
    """An endpoint in threads of its own."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            parsed = Webhook(SECRET).verify(body, dict(self.headers.items()))
            listener.heard.append((self.headers["webhook-id"], parsed))
            listener.refusals -= 1
            self.send_response(503 if listener.refusals >= 0 else 200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            return

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        listener = Endpoint(f"http://127.0.0.1:{server.server_address[1]}/hook")
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield listener
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with listening() as endpoint:
        yield endpoint


def configure(place: Path, endpoint: Endpoint, *, frame_delay_s: float = 0.0) -> None:
    (place / "messagesd.toml").write_text(f"""
        [server]
        port = 0
        [log]
        url = "sqlite:///events.db"
        [[providers]]
        name = "echo"
        kind = "echo"
        frame_delay_s = {frame_delay_s}
        [[webhooks]]
        name = "hook"
        url = "{endpoint.url}"
        secrets = ["env:HOOK_SECRET"]
        allow_private = true
        backoff_s = 0.2
    """)


def daemon(place: Path) -> Any:
    return spawned("serve", cwd=place, env={"HOOK_SECRET": SECRET})


def client_of(process: Process) -> Anthropic:
    return Anthropic(base_url=process.url, api_key="any", max_retries=0)


def submit(client: Anthropic, text: str, **headers: str) -> str:
    message = client.messages.create(
        model="m",
        max_tokens=50,
        messages=[{"role": "user", "content": text}],
        extra_headers={**HOOK, **{name.replace("_", "-"): value for name, value in headers.items()}},
    )
    assert message.stop_reason is None
    return message.id


def test_an_sdk_submits_and_an_endpoint_hears(tmp_path: Path, endpoint: Endpoint) -> None:
    endpoint.refusals = 1
    configure(tmp_path, endpoint)
    with daemon(tmp_path) as process, client_of(process.started()) as client:
        job_id = submit(client, "the quick brown fox")
        until(lambda: len(endpoint.heard) == 2)
        (first_id, first), (second_id, second) = endpoint.heard
        assert (first_id, first) == (second_id, second)
        assert (first["event"], first["data"]["job_id"]) == ("async_job.completed", job_id)
        result = httpx2.get(process.url + first["data"]["result_url"])
        assert result.json()["content"][0]["text"] == "the quick brown fox"
        with pytest.raises(BadRequestError, match="no webhook endpoint is named 'nobody'"):
            submit(client, "hello", x_bf_async_webhook="nobody")
        process.tell(signal.SIGTERM)
        assert process.wait() == 0
    assert SECRET not in process.banner + process.errors
    assert endpoint.url not in process.banner + process.errors


def test_kills_lose_no_delivery(tmp_path: Path, endpoint: Endpoint) -> None:
    """SIGKILL at random moments, among ends, deliveries and their records: each is heard, under one id."""
    chance = random.Random(SEED)
    configure(tmp_path, endpoint, frame_delay_s=0.02)
    jobs: list[str] = []
    for _ in range(KILLS):
        with daemon(tmp_path) as process, client_of(process.started()) as client:
            jobs += [submit(client, "word " * chance.randint(1, 12)) for _ in range(JOBS)]
            enough = len(endpoint.heard) + chance.randint(1, JOBS - 1)
            until(partial(endpoint.has_heard, enough))
            process.tell(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
    with daemon(tmp_path) as process:
        url = f"{process.started().url}/v1/webhooks/deliveries?limit=1000"

        def listed() -> list[dict[str, Any]]:
            found: list[dict[str, Any]] = httpx2.get(url).json()["data"]
            return found

        until(lambda: [one["status"] for one in listed()] == ["delivered"] * len(jobs))
        assert sorted(one["job_id"] for one in listed()) == sorted(jobs)
    told = endpoint.ids_of("async_job.completed")
    assert told.keys() == set(jobs)
    assert all(len(ids) == 1 for ids in told.values())
    # What a kill cut off is sent again; nothing else is.
    assert len(endpoint.heard) <= len(jobs) + KILLS * AT_ONCE
