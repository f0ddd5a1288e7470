"""One job's frames to many watchers.

Every watcher has a bounded memory channel. A run of frames is published with ``send_nowait`` to each of
them: the same tuple of the same bytes, so a watcher costs a reference. A watcher whose channel is full is
marked lagging and gets nothing more until it has read the log from its own cursor to the end: it slows
nobody down and loses nothing. A new watcher begins the same way, with a replay, so that joining late,
resuming and lagging are one piece of code. A watcher that waits for nothing but the next run may name a sink
that takes it there and then: waking a task to hand over one frame costs more than the frame.

The caller appends to the log *before* it publishes. That order is what closes the gap between replay and
live: whatever a replay did not find is still to be published, and what it did find is recognised by its
number when it comes again.
"""

from collections.abc import Callable
from contextlib import suppress

import trio

from actors.errors import JobConflictError, JobNotFoundError
from actors.telemetry import Telemetry
from events.errors import UnknownJobError
from events.log.base import EventLog, FrameCursor, FrameRun

_NUDGE = FrameRun(0, 0, ())
"""Passed through a channel, it says nothing but that somebody called. No attempt has its number."""


Sink = Callable[[FrameRun], bool]
"""Takes a run for a watcher, or refuses it (False). Synchronous; never raises."""


class Nudged(Exception):  # noqa: N818 - it tells no error
    """Somebody wants the receiver's attention; nothing is lost or over."""


class AttemptGivenUpError(JobConflictError):
    """The cursor belongs to an attempt that was given up. What was read of it is void; read anew."""

    def __init__(self, cursor: FrameCursor) -> None:
        super().__init__(f"attempt {cursor.attempt} of this job was given up; read its stream from the start")


class Broadcast:
    """The publishing side. Everything here is synchronous; one task publishes."""

    def __init__(self, job_id: str, log: EventLog, *, buffer_runs: int, telemetry: Telemetry) -> None:
        self._job_id = job_id
        self._log = log
        self._buffer_runs = buffer_runs
        self._telemetry = telemetry
        self._subscriptions: set[Subscription] = set()
        self.attempt = 0
        self.cursor = FrameCursor(0, 0)
        """After the last frame published."""
        self._closed = False
        self.watched = False
        """Whether somebody has watched the attempt."""

    def begin(self, attempt: int) -> None:
        """The stream to watch is this attempt's, from now on."""
        self.attempt = attempt
        self.watched = bool(self._subscriptions)

    def publish(self, run: FrameRun) -> None:
        """Hand ``run``, already in the log, to every watcher that keeps up."""
        self.cursor = run.cursor
        for subscription in self._subscriptions:
            subscription.offer(run)

    def close(self) -> None:
        """No more frames will come: watchers read what is left and end. Idempotent."""
        self._closed = True
        for subscription in self._subscriptions:
            subscription.end()

    def subscribe(self, after: FrameCursor | None = None) -> "Subscription":
        """Watch from ``after``; None is the start of the newest attempt. Close it, whatever happens."""
        subscription = Subscription(
            self._job_id, self._log, self, after, buffer_runs=self._buffer_runs, telemetry=self._telemetry
        )
        self._subscriptions.add(subscription)
        self.watched = True
        self._telemetry.subscribers(1)
        if self._closed:
            subscription.end()
        return subscription

    def leave(self, subscription: "Subscription") -> None:
        """Called by a subscription that closes."""
        if subscription in self._subscriptions:
            self._subscriptions.discard(subscription)
            self._telemetry.subscribers(-1)


class Subscription:
    """One watcher. One task receives; :meth:`close` may be called from anywhere."""

    def __init__(
        self,
        job_id: str,
        log: EventLog,
        source: Broadcast,
        after: FrameCursor | None,
        *,
        buffer_runs: int,
        telemetry: Telemetry,
    ) -> None:
        self._job_id = job_id
        self._log = log
        self._source = source
        self._telemetry = telemetry
        self._cursor = after or FrameCursor(source.attempt, 0)
        # With nothing published that is new to it there is nothing to replay.
        self._replaying = source.cursor > self._cursor
        self._lagging = False
        self._send, self._receive = trio.open_memory_channel[FrameRun](buffer_runs)
        # Asking an empty channel costs an exception.
        self._offered = self._taken = 0
        self._sink: Sink | None = None
        self._waiting = False

    @property
    def cursor(self) -> FrameCursor:
        """After the last frame received."""
        return self._cursor

    def short_cut(self, sink: Sink) -> None:
        """Have ``sink`` asked to take each run that :meth:`receive` waits for, with nothing left before it.

        What it takes counts as received; what it refuses comes through :meth:`receive`.
        """
        self._sink = sink

    def offer(self, run: FrameRun) -> None:
        """Publisher's side: take the run, or begin to lag."""
        if self._lagging:
            return
        if self._sink is not None and self._waiting and self._taken == self._offered:
            attempt, frame = self._cursor
            if run.attempt == attempt and run.first == frame + 1 and self._sink(run):
                self._cursor = run.cursor
                return
        try:
            self._send.send_nowait(run)
            self._offered += 1
        except trio.WouldBlock:
            self._lagging = True
            self._telemetry.lagged()

    def end(self) -> None:
        """Publisher's side: nothing more will be offered."""
        self._send.close()

    def close(self) -> None:
        """Stop watching. Idempotent, synchronous, safe while another task is in :meth:`receive`."""
        self._source.leave(self)
        # A sink refers to us: what forms no cycle needs no collector to go.
        self._sink = None
        self._send.close()
        self._receive.close()

    def nudge(self) -> None:
        """Have :meth:`receive` raise Nudged, should nothing else come first. Synchronous."""
        with suppress(trio.WouldBlock, trio.ClosedResourceError, trio.BrokenResourceError):
            # With the channel full there is something to receive.
            self._send.send_nowait(_NUDGE)
            self._offered += 1

    async def receive(self) -> list[FrameRun]:
        """The next runs, all that are at hand; an empty list at the end of the stream.

        Every frame comes once, in order, whatever was missed in between. Cancelling loses nothing. Raises
        AttemptGivenUpError when the job went on with another attempt after frames of this one were seen,
        JobNotFoundError when the job was deleted or expired before all of it was read, Nudged after
        :meth:`nudge`.
        """
        while True:
            if self._replaying:
                run = await self._replay()
                if run is not None:
                    return [run]
                self._replaying = False
            runs = self._at_hand()
            if runs:
                return runs
            if self._fell_behind():
                continue
            try:
                self._waiting = True
                received = await self._receive.receive()
                self._taken += 1
                run = self._fresh(received)
            except trio.EndOfChannel:
                # What was published between the last replay and the end may have been dropped.
                if self._fell_behind():
                    continue
                return []
            finally:
                self._waiting = False
            if run is not None:
                return [run, *self._at_hand()]
            if received is _NUDGE:
                runs = self._at_hand()
                if not runs:
                    raise Nudged
                return runs

    def _fell_behind(self) -> bool:
        """Whether something was dropped since the last replay; then the next step is another one."""
        if not self._lagging:
            return False
        self._lagging, self._replaying = False, True
        return True

    def _at_hand(self) -> list[FrameRun]:
        runs: list[FrameRun] = []
        while self._taken < self._offered:
            received = self._receive.receive_nowait()
            self._taken += 1
            run = self._fresh(received)
            if run is not None:
                runs.append(run)
        return runs

    def _fresh(self, run: FrameRun) -> FrameRun | None:
        """The part of a published run that was not seen yet; moves the cursor."""
        seen_attempt, seen_frame = self._cursor
        if run.attempt < seen_attempt:
            return None
        last = run.last
        if run.attempt == seen_attempt:
            if last <= seen_frame:
                return None
            if run.first <= seen_frame:
                run = FrameRun(run.attempt, seen_frame + 1, run.frames[seen_frame + 1 - run.first :])
        elif seen_frame > 0:
            raise AttemptGivenUpError(self._cursor)
        self._cursor = FrameCursor(run.attempt, last)
        return run

    async def _replay(self) -> FrameRun | None:
        """The next run from the log; None once it has no more for us."""
        while True:
            attempt, frame = self._cursor
            try:
                run = await self._log.read_frames(self._job_id, self._cursor) if attempt else None
            except UnknownJobError:
                if self._cursor < self._source.cursor:
                    raise JobNotFoundError from None
                return None
            if run is not None:
                self._cursor = run.cursor
                return run
            if self._source.attempt <= attempt:
                return None
            if frame > 0:
                raise AttemptGivenUpError(self._cursor)
            self._cursor = FrameCursor(attempt + 1, 0)


class Replay:
    """Stands in for a broadcast when the job has ended: its stream is all in the log."""

    def __init__(self, job_id: str, log: EventLog, *, last: FrameCursor, telemetry: Telemetry) -> None:
        """``last``: the place after the job's last frame."""
        self._broadcast = Broadcast(job_id, log, buffer_runs=1, telemetry=telemetry)
        self._broadcast.attempt = last.attempt
        self._broadcast.cursor = last
        self._broadcast.close()

    def subscribe(self, after: FrameCursor | None = None) -> Subscription:
        """Read the stream from ``after`` to its end."""
        return self._broadcast.subscribe(after)
