"""A webhook endpoint that answers as it is told, and remembers what it heard, verified."""

import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import orjson
import trio
from standardwebhooks.webhooks import Webhook

from tests.fake_upstream import Exchange, FakeUpstream, open_upstream
from tests.support.providers import PATIENCE_S

SECRET = "whsec_" + base64.b64encode(b"the first of two secrets").decode()
OTHER_SECRET = "whsec_" + base64.b64encode(b"the second of two secret").decode()
STALL = 0
"""An answer that does not come."""


@dataclass(frozen=True)
class Heard:
    """One call."""

    at: float
    """Trio time."""
    id: str
    timestamp: int
    body: Any
    raw: bytes


@dataclass
class Receiver:
    """The endpoint. ``answers`` are statuses, one a call, the last of them for ever; ``STALL`` is one."""

    answers: list[int]
    headers: str = ""
    """Lines of every answer, each ended."""
    heard: list[Heard] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0
    release: trio.Event = field(default_factory=trio.Event)
    """Lets stalled calls go, with 200."""
    upstream: FakeUpstream | None = None
    _changed: trio.Event = field(default_factory=trio.Event)

    def table(self, name: str = "hook", **options: Any) -> dict[str, Any]:
        """Its ``[[webhooks]]`` table."""
        assert self.upstream is not None
        url = f"{self.upstream.url}/{name}"
        return {"name": name, "url": url, "secrets": [SECRET], "allow_private": True} | options

    async def until(self, count: int) -> list[Heard]:
        """The first ``count`` calls."""
        with trio.fail_after(PATIENCE_S):
            while len(self.heard) < count:
                await self._changed.wait()
        return self.heard[:count]

    async def serve(self, exchange: Exchange) -> None:
        """Answer one call."""
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        self.heard.append(verified(exchange))
        self._changed.set()
        self._changed = trio.Event()
        status = self.answers[min(len(self.heard), len(self.answers)) - 1]
        try:
            if status == STALL:
                await self.release.wait()
            await exchange.send(
                f"HTTP/1.1 {status or 200} X\r\n{self.headers}content-length: 0\r\n\r\n".encode()
            )
        finally:
            self.at_once -= 1


def verified(exchange: Exchange) -> Heard:
    """The call, if the first secret has signed it. The library's own check knows no virtual clock."""
    request = exchange.request
    assert request.method == "POST"
    assert request.headers["content-type"] == "application/json"
    message_id, timestamp = request.headers["webhook-id"], int(request.headers["webhook-timestamp"])
    moment = datetime.fromtimestamp(timestamp, UTC)
    signature = Webhook(SECRET).sign(message_id, moment, request.body.decode())
    assert signature in request.headers["webhook-signature"].split(" ")
    return Heard(trio.current_time(), message_id, timestamp, orjson.loads(request.body), request.body)


@asynccontextmanager
async def open_receiver(*answers: int, headers: str = "") -> AsyncIterator[Receiver]:
    """A receiver on a loopback port; it answers 200 unless told otherwise."""
    receiver = Receiver(list(answers) or [200], headers)
    async with open_upstream(receiver.serve) as upstream:
        receiver.upstream = upstream
        yield receiver
