"""Webhooks over a log that fails at every call they make."""

import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import orjson
import pytest
import trio
from trio.testing import MockClock

from actors.clock import Clock
from actors.webhooks.errors import DeliveryNotFoundError
from actors.webhooks.options import WebhookOptions
from actors.webhooks.telemetry import NullWebhookTelemetry
from actors.webhooks.webhooks import Webhooks
from events.errors import CodecError, EventsError, LogUnavailableError
from events.log.memory import MemoryLog
from events.log.records import Record
from events.types import Failure, JobAccepted, JobFailed, Mode
from service.logs import make_logger
from service.settings_sections import LoggingSettings
from tests.scenarios.conftest import http_clock
from tests.support.receiver import Receiver, open_receiver

__all__ = ["http_clock"]

UNAVAILABLE = LogUnavailableError("the disk is full")
DAMAGED = CodecError("a stored delivery is damaged")


@dataclass
class Faults:
    """How often each call of the records fails before it works, and with what."""

    log: MemoryLog = field(default_factory=MemoryLog)
    left: dict[str, list[EventsError]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        records = self.log.records
        for name in ("append", "get", "open", "unannounced", "due"):
            setattr(records, name, self._faulty(name, getattr(records, name)))

    def _faulty(self, name: str, call: object) -> object:
        async def faulty(*arguments: object, **named: object) -> object:
            await trio.lowlevel.checkpoint()
            if self.left.get(name):
                raise self.left[name].pop(0)
            return await call(*arguments, **named)  # type: ignore[operator]  # one of the port's methods

        return faulty


@dataclass
class World:
    """Webhooks at work, and what they say."""

    webhooks: Webhooks
    faults: Faults
    receiver: Receiver
    lines: io.StringIO

    async def end_a_job(self, job_id: str, *, ended: bool = True) -> None:
        """A job that names the endpoint, in the log."""
        accepted = JobAccepted(
            at=1.0, owner="", model="m", mode=Mode.ASYNC, body=b"{}", detached=True, webhook="hook"
        )
        failed = JobFailed(at=2.0, failure=Failure(500, "api_error", "no"))
        await self.faults.log.append(job_id, [accepted, failed] if ended else [accepted], 0)

    def said(self, action: str) -> int:
        """How many log lines have this action."""
        return sum(orjson.loads(line)["action"] == action for line in self.lines.getvalue().splitlines())

    async def told(self, *job_ids: str) -> bool:
        """Whether these jobs were told of, each once, and recorded as told."""
        await self.receiver.until(len(job_ids))
        while self.webhooks.waiting:  # noqa: ASYNC110 - nothing tells
            await trio.sleep(1)
        page = await self.webhooks.page(limit=100, after_id=None, before_id=None)
        delivered = [one.job_id for one in page.deliveries if one.state.value == "delivered"]
        heard = [one.body["data"]["job_id"] for one in self.receiver.heard]
        return sorted(delivered) == sorted(heard) == sorted(job_ids)


@asynccontextmanager
async def world(left: dict[str, list[EventsError]], *before: str) -> AsyncIterator[World]:
    """Webhooks that start over a log with these ended jobs."""
    faults = Faults()
    lines = io.StringIO()
    async with open_receiver() as receiver, trio.open_nursery() as nursery:
        webhooks = Webhooks(
            [WebhookOptions.model_validate(receiver.table())],
            log=faults.log,
            clock=Clock(),
            telemetry=NullWebhookTelemetry(),
            logger=make_logger(LoggingSettings(level="debug", format="json"), lines),
            history_s=0.0,
        )
        made = World(webhooks, faults, receiver, lines)
        for job_id in before:
            await made.end_a_job(job_id)
        faults.left = left
        nursery.start_soon(webhooks.run)  # noqa: ASYNC113 - nothing here waits for it
        yield made
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ("open", "webhook.take_up_delayed"),
        ("unannounced", "webhook.catch_up_delayed"),
        ("append", "webhook.catch_up_delayed"),
        ("get", "webhook.delayed"),
    ],
)
async def test_what_cannot_be_done_now_is_done_later(call: str, says: str, http_clock: MockClock) -> None:
    async with world({call: [UNAVAILABLE, UNAVAILABLE]}, "job-1", "job-2") as made:
        assert await made.told("job-1", "job-2")
        assert made.said(says)
        assert made.faults.left == {call: []}


async def test_a_delivery_that_cannot_be_read_holds_up_no_other(http_clock: MockClock) -> None:
    async with world({"open": [DAMAGED]}) as made:
        await made.end_a_job("job-1")
        made.webhooks.job_ended("job-1")
        assert await made.told("job-1")
        assert made.said("webhook.take_up_failed") == 1


async def test_news_that_cannot_be_recorded_holds_up_no_other(http_clock: MockClock) -> None:
    async with world({}) as made:
        # What was missing at the start has been looked for by then.
        await trio.sleep(1)
        for job_id in ("job-1", "job-2"):
            await made.end_a_job(job_id)
        made.faults.left = {"append": [DAMAGED]}
        made.webhooks.job_ended("job-1")
        made.webhooks.job_ended("job-2")
        await made.receiver.until(1)
        await trio.sleep(5)
        assert len(made.receiver.heard) == 1
        assert made.said("webhook.record_failed") == 1


async def test_a_job_whose_end_is_not_in_the_log_is_not_told_of(http_clock: MockClock) -> None:
    async with world({}) as made:
        await made.end_a_job("left", ended=False)
        for job_id in ("left", "forgotten"):
            made.webhooks.job_ended(job_id)
        await made.end_a_job("job-1")
        made.webhooks.job_ended("job-1")
        # Twice is once: its id is made of the job's.
        made.webhooks.job_ended("job-1")
        assert await made.told("job-1")
        page = await made.webhooks.page(limit=10, after_id=None, before_id=None)
        assert [one.job_id for one in page.deliveries] == ["job-1"]


async def test_missing_news_for_an_endpoint_that_is_gone_is_skipped(http_clock: MockClock) -> None:
    async with world({}) as made:
        accepted = JobAccepted(
            at=1.0, owner="", model="m", mode=Mode.ASYNC, body=b"{}", detached=True, webhook="gone"
        )
        await made.faults.log.append(
            "job-1", [accepted, JobFailed(at=2.0, failure=Failure(500, "api_error", "no"))], 0
        )
        made.webhooks.job_ended("job-1")
        while not made.said("webhook.skipped"):  # noqa: ASYNC110 - nothing tells
            await trio.sleep(0.1)
        (delivery,) = await made.webhooks.about("job-1")
    assert (delivery.state.value, delivery.last_error) == (
        "skipped",
        "the endpoint is not configured, or disabled",
    )
    assert made.receiver.heard == []


async def test_forgetting_is_tried_again(http_clock: MockClock) -> None:
    async with world({"due": [UNAVAILABLE]}, "job-1") as made:
        assert await made.told("job-1")
        await made.faults.log.forget("job-1")
        await trio.sleep(200)
        assert made.said("webhook.forget_delayed") == 1
        assert await made.webhooks.about("job-1") == []


async def test_a_record_of_another_kind_is_no_delivery(http_clock: MockClock) -> None:
    async with world({}) as made:
        batch = Record(
            record_id="msgbatch_1",
            kind="batch",
            owner="",
            created_at=1.0,
            last_seq=1,
            open=True,
            due_at=None,
            state=b"{}",
        )
        await made.faults.log.records.append(batch, [b"{}"], 0)
        with pytest.raises(DeliveryNotFoundError):
            await made.webhooks.redeliver("msgbatch_1", by="root")
