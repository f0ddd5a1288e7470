"""A stream over a socket that takes what it likes: every byte leaves once, in order, framed, to the end."""

from types import SimpleNamespace
from typing import Any, cast

import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from actors.broadcast import Subscription
from actors.timers import Timers, open_timers
from events.types import Failure
from service.connection import Connection, Protocol
from service.heartbeat import Heartbeat
from service.sse import PING, FrameStream, without_ids
from tests.unit.broadcasts import started

HEARTBEAT_S = 10
FAILURE = Failure(500, "api_error", "x")
STEPS = st.lists(
    # Nothing, a part, or the whole of a chunk is taken at once.
    st.tuples(
        st.sampled_from(["send", "send", "pause", "nudge", "wait"]),
        st.sampled_from([0, 3, 30]),
        st.integers(0, 3),
    ),
    min_size=5,
    max_size=40,
)


class Wire(Connection):
    """A connection without a network: ``room`` bytes are taken at once, the rest after ``pauses``."""

    def __init__(self) -> None:
        super().__init__(*[cast(Any, None)] * 4, cast(Any, self), direct_app=cast(Any, None))
        self.out = bytearray()
        self.room = self.pauses = 0
        self.way = Protocol.__new__(Protocol)
        self.way.connection = cast(Any, SimpleNamespace(their_http_version=b"1.1"))
        self.way.connection_ = self

    def _send_now(self, data: bytes) -> int:
        self.out += data[: self.room]
        return min(self.room, len(data))

    async def send_all(self, data: memoryview) -> None:
        for _ in range(self.pauses):
            await trio.lowlevel.checkpoint()
        self.out += data


def dechunked(data: bytes) -> bytes:
    body = b""
    while True:
        size, _, data = data.partition(b"\r\n")
        length = int(size, 16)
        body += data[:length]
        assert data[length : length + 2] == b"\r\n"
        data = data[length + 2 :]
        if not length:
            assert data == b""
            return body


def streamed(subscription: Subscription, wire: Wire, timers: Timers, failure: Failure | None) -> FrameStream:
    stream = FrameStream(
        subscription,
        first=[],
        encode=without_ids,
        ending=lambda: failure,
        beat=Heartbeat(timers, HEARTBEAT_S).watch(subscription.nudge),
        request_id="req_1",
    )
    stream.attach(wire.way)
    return stream


@given(steps=STEPS, buffer_runs=st.integers(1, 4), failure=st.sampled_from([None, FAILURE]))
@settings(max_examples=150, deadline=None)
def test_every_byte_leaves_once_whatever_the_socket_takes(
    steps: list[tuple[str, int, int]], buffer_runs: int, failure: Failure | None
) -> None:
    async def play() -> bytes:
        upstream = await started(buffer_runs)
        subscription = upstream.broadcast.subscribe()
        wire = Wire()

        async def respond(stream: FrameStream) -> None:
            async for piece in stream:
                await wire.way.send_piece(piece)
            await wire.write(b"0\r\n\r\n")

        async with open_timers() as timers:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(respond, streamed(subscription, wire, timers, failure))
                for number, (step, wire.room, wire.pauses) in enumerate(steps):
                    if step == "send":
                        await upstream.send(b"<%d>" % number)
                    elif step == "nudge":
                        subscription.nudge()
                    elif step == "wait":
                        await trio.sleep(HEARTBEAT_S / 2 + 1)
                        # Nothing waits for more to come.
                        assert not wire.backlog
                    else:
                        await trio.testing.wait_all_tasks_blocked()
                upstream.broadcast.close()
            subscription.close()
        return bytes(wire.out)

    body = dechunked(trio.run(play, clock=MockClock(autojump_threshold=0))).replace(PING, b"")
    sent = b"".join(b"<%d>" % number for number, (step, *_) in enumerate(steps) if step == "send")
    assert body.startswith(sent)
    assert body.removeprefix(sent).startswith(b"event: error" if failure else b"")
    assert failure is not None or body == sent
