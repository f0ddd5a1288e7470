"""The stream of a call that nobody keeps, as somebody else than its caller sees it."""

from collections.abc import Sequence

from actors.broadcast import Sink, Subscription
from actors.job import COMMIT_TIMEOUT_S, JobActor
from actors.work import put_on_record
from events.log.base import EventLog, FrameRun

_LAST_FRAME = b"event: message_stop\n"


class RecordedStream:
    """A subscription that does not tell how the job ended before that will be so after a kill."""

    def __init__(self, subscription: Subscription, actor: JobActor, log: EventLog) -> None:
        """The subscription stays the caller's to close."""
        self._subscription = subscription
        self._actor = actor
        self._log = log
        self._unsent: Sequence[FrameRun] = ()

    def short_cut(self, sink: Sink) -> None:
        """Everything comes through :meth:`receive`."""

    def nudge(self) -> None:
        """See :meth:`actors.broadcast.Subscription.nudge`."""
        self._subscription.nudge()

    async def receive(self) -> Sequence[FrameRun]:
        """As :meth:`actors.broadcast.Subscription.receive`; raises LogUnavailableError, too."""
        self._unsent = self._unsent or await self._subscription.receive()
        if not self._unsent or self._unsent[-1].frames[-1].startswith(_LAST_FRAME):
            await self._actor.ended.wait()
            await put_on_record(self._log, self._actor.job_id, within_s=COMMIT_TIMEOUT_S)
        runs, self._unsent = self._unsent, ()
        return runs
