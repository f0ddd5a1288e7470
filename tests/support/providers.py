"""A provider that does what a scenario tells it, and remembers what was done to it."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import orjson
import trio

from actors.providers.base import (
    Completion,
    ForwardAnswer,
    ForwardCall,
    Frame,
    FrameSource,
    ProviderCall,
    TokenCount,
)

Point = Literal["connect", "first_frame", "mid_stream", "last_frame"]
"""Where a call can be made to stall or fail. A plain call passes ``connect`` and ``last_frame``."""

PATIENCE_S = 10.0
"""Virtual time a scenario waits for what ought to come at once."""
USAGE = {"input_tokens": 3, "output_tokens": 5}


def frame(event: str, **fields: Any) -> Frame:
    """A frame of the Messages stream."""
    data = orjson.dumps({"type": event, **fields})
    return Frame(event, data, b"event: %b\ndata: %b\n\n" % (event.encode(), data))


def opening() -> list[Frame]:
    """``message_start`` and the start of a text block: two frames."""
    message: dict[str, Any] = {
        "id": "msg_scenario",
        "type": "message",
        "role": "assistant",
        "model": "m",
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {"input_tokens": USAGE["input_tokens"], "output_tokens": 0},
    }
    block = {"type": "text", "text": ""}
    return [
        frame("message_start", message=message),
        frame("content_block_start", index=0, content_block=block),
    ]


def delta(number: int, pad_bytes: int = 0) -> Frame:
    """The ``number``-th piece of text, from 1."""
    text = f"{number} " + "x" * pad_bytes
    return frame("content_block_delta", index=0, delta={"type": "text_delta", "text": text})


def closing() -> list[Frame]:
    """The last three frames of a stream."""
    return [
        frame("content_block_stop", index=0),
        frame(
            "message_delta",
            delta={"stop_reason": "end_turn", "stop_sequence": None},
            usage={"output_tokens": USAGE["output_tokens"]},
        ),
        frame("message_stop"),
    ]


def whole_stream(deltas: int) -> list[Frame]:
    """All frames of an answer: five, and its deltas."""
    return [*opening(), *(delta(number + 1) for number in range(deltas)), *closing()]


def text_of(deltas: int) -> str:
    """The text of such an answer."""
    return "".join(f"{number + 1} " for number in range(deltas))


@dataclass
class UpstreamCall:
    """One call to the fake upstream."""

    plain: bool
    opened_at: float
    """Trio time."""
    closed_at: float | None = None
    cancelled: bool = False


@dataclass
class FakeProvider:
    """Streams ``deltas`` pieces of text, ``delay_s`` before the opening and before each piece.

    A plain call takes as long. ``pad_bytes`` makes each piece larger. ``stall_at`` keeps every call waiting
    at that point until ``release`` is set; ``raise_at`` makes it fail there.
    """

    deltas: int = 3
    delay_s: float = 0.0
    first_delay_s: float | None = None
    pad_bytes: int = 0
    stall_at: Point | None = None
    raise_at: dict[Point, Exception] = field(default_factory=dict)
    name: str = "fake"
    kind: str = "echo"
    calls: list[UpstreamCall] = field(default_factory=list)
    release: trio.Event = field(default_factory=trio.Event)
    stalled: trio.Event = field(default_factory=trio.Event)
    """Set once a call is waiting at ``stall_at``."""
    _changed: trio.Event = field(default_factory=trio.Event)

    @property
    def open_calls(self) -> int:
        """Calls under way."""
        return sum(call.closed_at is None for call in self.calls)

    def _change(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def until_called(self, count: int) -> None:
        """Wait until ``count`` calls have been made."""
        with trio.fail_after(PATIENCE_S):
            while len(self.calls) < count:
                await self._changed.wait()

    async def until_closed(self) -> None:
        """Wait until no call is under way."""
        with trio.fail_after(PATIENCE_S):
            while self.open_calls:
                await self._changed.wait()

    @asynccontextmanager
    async def _call(self, *, plain: bool) -> AsyncIterator[None]:
        call = UpstreamCall(plain, trio.current_time())
        self.calls.append(call)
        self._change()
        try:
            yield
        except trio.Cancelled:
            call.cancelled = True
            raise
        finally:
            call.closed_at = trio.current_time()
            self._change()

    async def at(self, point: Point) -> None:
        """Stall or fail here, if that is the script."""
        if point in self.raise_at:
            raise self.raise_at[point]
        if point == self.stall_at:
            self.stalled.set()
            await self.release.wait()

    async def complete(self, call: ProviderCall) -> Completion:
        async with self._call(plain=True):
            await self.at("connect")
            first_s = self.delay_s if self.first_delay_s is None else self.first_delay_s
            await trio.sleep(first_s + self.delay_s * self.deltas)
            await self.at("last_frame")
            message = {
                "id": "msg_scenario",
                "type": "message",
                "role": "assistant",
                "model": call.requested_model,
                "content": [{"type": "text", "text": text_of(self.deltas)}],
                "stop_reason": "end_turn",
                "stop_sequence": None,
                "usage": USAGE,
            }
            return Completion(orjson.dumps(message), USAGE)

    @asynccontextmanager
    async def open_stream(self, call: ProviderCall) -> AsyncIterator[FrameSource]:
        async with self._call(plain=False):
            await self.at("connect")
            yield _Frames(self)

    async def count_tokens(self, call: ProviderCall) -> TokenCount:
        return TokenCount(1)

    async def forward(self, call: ForwardCall) -> ForwardAnswer:
        raise NotImplementedError


class _Frames:
    """One frame run per read: the opening, each delta, the closing."""

    upstream_request_id: str | None = None

    def __init__(self, provider: FakeProvider) -> None:
        self._provider = provider
        self._sent: int | None = None

    async def receive(self) -> list[Frame]:
        provider = self._provider
        if self._sent is None:
            await provider.at("first_frame")
            await trio.sleep(provider.delay_s if provider.first_delay_s is None else provider.first_delay_s)
            self._sent = 0
            return opening()
        if self._sent < provider.deltas:
            if self._sent == provider.deltas // 2:
                await provider.at("mid_stream")
            await trio.sleep(provider.delay_s)
            self._sent += 1
            return [delta(self._sent, provider.pad_bytes)]
        await provider.at("last_frame")
        return closing()


def wire(frames: Sequence[Frame]) -> bytes:
    """The frames as a watcher of the plain stream gets them."""
    return b"".join(one.wire for one in frames)
