"""Fakes that fail call by call, and what the events tell of it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import trio

from actors.errors import ProviderError, UpstreamStatusError
from actors.providers.base import Frame, FrameSource, ProviderCall
from events.types import AttemptFailed, AttemptStarted
from tests.support.providers import FakeProvider, Point, frame, opening, whole_stream
from tests.support.world import World

Script = list[list[Frame] | float]
"""Frames of one read each, and pauses in seconds; at its end the connection is gone."""


def says(status: int, **headers: str) -> ProviderError:
    """An upstream's refusal."""
    named = tuple((name.replace("_", "-"), value) for name, value in headers.items())
    return UpstreamStatusError("not now", status=status, headers=named)


def start_only() -> list[Frame]:
    """``message_start`` alone."""
    return opening()[:1]


def ping() -> list[Frame]:
    """A ping."""
    return [frame("ping")]


@dataclass
class Moody(FakeProvider):
    """Fails its first calls, each at its point, and then does what a fake does."""

    moods: list[tuple[Point, ProviderError]] = field(default_factory=list)

    async def at(self, point: Point) -> None:
        number = len(self.calls) - 1
        if number < len(self.moods) and self.moods[number][0] == point:
            raise self.moods[number][1]
        await super().at(point)


@dataclass
class Scripted(FakeProvider):
    """Streams what its scripts say, call by call; a whole answer of two deltas once they are used up."""

    scripts: list[Script] = field(default_factory=list)

    @asynccontextmanager
    async def open_stream(self, call: ProviderCall) -> AsyncIterator[FrameSource]:
        async with self._call(plain=False):
            number = len(self.calls) - 1
            yield _Frames(self.scripts[number] if number < len(self.scripts) else [whole_stream(2)])


class _Frames:
    upstream_request_id: str | None = None

    def __init__(self, script: Script) -> None:
        self._left = list(script)

    async def receive(self) -> list[Frame]:
        while self._left:
            step = self._left.pop(0)
            if isinstance(step, list):
                await trio.lowlevel.checkpoint()
                return step
            await trio.sleep(step)
        return []


async def told(world: World, job_id: str) -> list[tuple[Any, ...]]:
    """The attempts, as the events tell them: ``(1, "fake", "m")``, then ``(1, 529, "retry")``."""
    story: list[tuple[Any, ...]] = []
    for event in await world.events(job_id):
        if isinstance(event, AttemptStarted):
            story.append((event.attempt, event.provider, event.upstream_model))
        elif isinstance(event, AttemptFailed):
            story.append((event.attempt, event.failure.status, event.next.value))
    return story
