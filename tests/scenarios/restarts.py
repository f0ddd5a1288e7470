"""A gateway over a file, which can be left in the lurch and started anew."""

import io
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio

from actors.providers.base import FrameSource, Provider, ProviderCall
from events.log.sqlite import SqliteLog
from service.main import Gateway
from tests.support.gateway import BODY, Answer, SseEvent, open_fake_gateway, poll, request, start
from tests.support.providers import PATIENCE_S, FakeProvider

ASYNC = {"x-bf-async": "true"}
EPOCH = 1_900_000_000.0


@dataclass
class Place:
    """Where a gateway keeps its file, and what time it is there."""

    path: Path
    log: dict[str, Any] = field(default_factory=dict)
    """More of the table ``[log]``."""
    wall_s: float = EPOCH
    """Unix seconds at the next start."""
    lines: io.StringIO = field(default_factory=io.StringIO)
    """What the gateway logs, as JSON."""
    _scope: trio.CancelScope | None = None

    def kill(self) -> None:
        """End this life here and now, before whoever is about to leave has left."""
        assert self._scope is not None
        self._scope.cancel()

    @asynccontextmanager
    async def life(
        self, provider: Provider | None = None, *, crash: bool = False, **sections: Any
    ) -> AsyncIterator[Gateway]:
        """One life of the gateway, ended as by SIGTERM, or cut off (``crash``) with nothing more recorded."""
        log = {"url": f"sqlite:///{self.path}", **self.log}
        logging = {"format": "json"}
        with trio.CancelScope() as self._scope:
            async with open_fake_gateway(
                provider, lines=self.lines, log=log, logging=logging, **sections
            ) as gateway:
                yield gateway
                if crash:
                    self._scope.cancel()
                    await trio.lowlevel.checkpoint()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A place of its own for each test; between two lives, ``wall_s`` is its clock."""
    made = Place(tmp_path / "events.db")
    monkeypatch.setattr("actors.clock.time.time", lambda: made.wall_s)
    return made


@dataclass
class Recorder(FakeProvider):
    """A fake upstream that remembers what it was asked, in order."""

    asked: list[str] = field(default_factory=list)

    @asynccontextmanager
    async def open_stream(self, call: ProviderCall) -> AsyncIterator[FrameSource]:
        messages: Any = call.fields["messages"]
        self.asked.append(messages[0]["content"])
        async with super().open_stream(call) as source:
            yield source


def asks(text: str, **fields: object) -> dict[str, object]:
    """A request with this text."""
    return {**BODY, "messages": [{"role": "user", "content": text}], **fields}


async def submit(gateway: Gateway, text: str = "count", **headers: str) -> str:
    """An async job; its id."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    answer = await request(gateway.url, "POST", "/v1/messages", ASYNC | named, asks(text))
    assert answer.status == 200, answer.body
    return answer.job_id


async def result(gateway: Gateway, job_id: str) -> Answer:
    """How the job ended, waited for."""
    with trio.fail_after(PATIENCE_S):
        return await poll(gateway.url, job_id, prefer="wait=60")


async def describe(gateway: Gateway, job_id: str) -> dict[str, Any]:
    """The job's record."""
    answer = await request(gateway.url, "GET", f"/v1/jobs/{job_id}")
    assert answer.status == 200, answer.body
    found: dict[str, Any] = answer.json
    return found


async def watch(gateway: Gateway, job_id: str, after: str = "") -> tuple[Answer, list[SseEvent]]:
    """The job's stream from a cursor to its end."""
    headers = {"last-event-id": after} if after else {}
    with trio.fail_after(PATIENCE_S):
        async with start(gateway.url, "GET", f"/v1/jobs/{job_id}/stream", headers) as call:
            head = await call.head()
            if head.status != 200:
                while chunk := await call.chunk():
                    head.body += chunk
                return head, []
            return head, await call.events()


async def until_attempts(gateway: Gateway, job_ids: list[str], attempt: int) -> None:
    """Until each of these jobs has this attempt under way."""
    with trio.fail_after(PATIENCE_S):
        for job_id in job_ids:
            while (await gateway.log.snapshot(job_id)).attempt < attempt:  # noqa: ASYNC110 - nothing tells
                await trio.lowlevel.checkpoint()


async def event_kinds(gateway: Gateway, job_id: str) -> list[str]:
    """The names of the job's events."""
    return [type(stored.event).__name__ for stored in await gateway.log.read(job_id)]


@contextmanager
def no_writes(gateway: Gateway) -> Iterator[None]:
    """Every transaction of the log fails, as on a full disk."""
    assert isinstance(gateway.log, SqliteLog)
    connection = gateway.log._commit._writer._connection
    connection.execute("PRAGMA query_only = ON")
    try:
        yield
    finally:
        connection.execute("PRAGMA query_only = OFF")


async def until_logged(place: Place, action: str, times: int = 1) -> None:
    """Until the gateway has said so."""
    with trio.fail_after(PATIENCE_S):
        while place.lines.getvalue().count(f'"{action}"') < times:  # noqa: ASYNC110 - nothing tells
            await trio.lowlevel.checkpoint()
