"""A whole gateway on a loopback port, and an HTTP/1.1 client that is as small as it can be.

For use under a ``MockClock`` with a threshold (the fixture ``http_clock``): the kernel does not count as
busy, so the clock must wait a moment before it jumps. The client leaves no time of its own in a scenario.
"""

import io
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import h11
import orjson
import trio

from actors.providers.base import Provider
from service.logs import make_logger
from service.main import Gateway, open_gateway
from service.settings import Settings
from tests.support.providers import FakeProvider

READ_BYTES = 1 << 16
BODY: dict[str, Any] = {"model": "m", "max_tokens": 100, "messages": [{"role": "user", "content": "count"}]}


def settings_of(**sections: Any) -> Settings:
    """Settings for a free loopback port, one route, and what a scenario wants otherwise."""
    return Settings.model_validate(
        {
            "server": {"port": 0},
            "providers": [{"name": "fake", "kind": "echo"}],
            "routes": [{"model": "*", "provider": "fake"}],
            **sections,
        }
    )


@asynccontextmanager
async def open_fake_gateway(
    provider: Provider | None = None, *, lines: io.StringIO | None = None, **sections: Any
) -> AsyncIterator[Gateway]:
    """The daemon in front of ``provider``; ``sections`` are tables of its settings."""
    settings = settings_of(**sections)
    logger = make_logger(settings.logging, lines or io.StringIO())
    named = {"fake": provider or FakeProvider()}
    async with open_gateway(settings, providers=named, logger=logger) as gateway:
        yield gateway


class SseEvent(NamedTuple):
    """One server-sent event."""

    id: str | None
    event: str
    data: Any
    at: float
    """Trio time at which it was read."""


@dataclass
class Answer:
    """A whole HTTP response."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body, parsed."""
        return orjson.loads(self.body)

    @property
    def error_type(self) -> str:
        """The type in an error envelope."""
        return str(self.json["error"]["type"])

    @property
    def job_id(self) -> str:
        """The job the answer is about."""
        return self.headers["x-bf-async-id"]


class Call:
    """One request and its response, on a connection that can serve several."""

    def __init__(self, stream: trio.SocketStream, host: str) -> None:
        self.stream = stream
        self._host = host
        self._h11 = h11.Connection(h11.CLIENT)
        self._text = b""

    async def send(
        self, method: str, path: str, headers: Mapping[str, str] | None = None, body: object = None
    ) -> None:
        """Send a request; ``body`` is bytes as they are, or anything JSON."""
        content = body if isinstance(body, bytes) else b"" if body is None else orjson.dumps(body)
        if self._h11.our_state is not h11.IDLE:
            self._h11.start_next_cycle()
        fields = {"host": self._host, "content-length": str(len(content)), **(headers or {})}
        request = h11.Request(method=method, target=path, headers=list(fields.items()))
        data = [self._h11.send(request), self._h11.send(h11.Data(data=content))]
        data.append(self._h11.send(h11.EndOfMessage()))
        await self.stream.send_all(b"".join(part for part in data if part))

    async def _next(self) -> object:
        while True:
            event = self._h11.next_event()
            if event is not h11.NEED_DATA:
                return event
            self._h11.receive_data(await self.stream.receive_some(READ_BYTES))

    async def head(self) -> Answer:
        """Status and headers of the response; the body is still to come."""
        event = await self._next()
        if not isinstance(event, h11.Response):
            raise ConnectionError(f"no response: {event!r}")
        headers = {name.decode(): value.decode() for name, value in event.headers}
        return Answer(event.status_code, headers, b"")

    async def chunk(self) -> bytes:
        """The next bytes of the body; empty at its end."""
        event = await self._next()
        return bytes(event.data) if isinstance(event, h11.Data) else b""

    async def answer(self) -> Answer:
        """The whole response."""
        answer = await self.head()
        while chunk := await self.chunk():
            answer.body += chunk
        return answer

    async def event(self) -> SseEvent | None:
        """The next server-sent event; None at the end of the stream."""
        while b"\n\n" not in self._text:
            chunk = await self.chunk()
            if not chunk:
                return None
            self._text += chunk
        block, _, self._text = self._text.partition(b"\n\n")
        fields = dict(line.split(": ", 1) for line in block.decode().split("\n"))
        data = orjson.loads(fields["data"])
        return SseEvent(fields.get("id"), fields["event"], data, trio.current_time())

    async def events(self, count: int | None = None) -> list[SseEvent]:
        """The next ``count`` events, or all that are left."""
        found: list[SseEvent] = []
        while (count is None or len(found) < count) and (event := await self.event()) is not None:
            found.append(event)
        return found


@asynccontextmanager
async def connect(url: str) -> AsyncIterator[Call]:
    """A connection; leaving hangs up, in the middle of a response too."""
    parts = urlsplit(url)
    stream = await trio.open_tcp_stream(parts.hostname or "", parts.port or 0)
    async with stream:
        yield Call(stream, parts.netloc)


@asynccontextmanager
async def start(
    url: str, method: str, path: str, headers: Mapping[str, str] | None = None, body: object = None
) -> AsyncIterator[Call]:
    """A connection with a request sent on it."""
    async with connect(url) as call:
        await call.send(method, path, headers, body)
        yield call


async def request(
    url: str, method: str, path: str, headers: Mapping[str, str] | None = None, body: object = None
) -> Answer:
    """One request on a connection of its own."""
    async with start(url, method, path, headers, body) as call:
        return await call.answer()


async def post(url: str, headers: Mapping[str, str] | None = None, **fields: object) -> Answer:
    """``POST /v1/messages``."""
    return await request(url, "POST", "/v1/messages", headers, {**BODY, **fields})


async def poll(url: str, job_id: str, **headers: str) -> Answer:
    """Ask for the result of a job."""
    return await request(url, "POST", "/v1/messages", {"x-bf-async-id": job_id, **headers})


def kinds(events: Sequence[SseEvent]) -> list[str]:
    """The names of the events."""
    return [event.event for event in events]
