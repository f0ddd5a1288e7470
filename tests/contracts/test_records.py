"""What every log promises of records, whatever it keeps them in. See :mod:`events.log.records`."""

from collections.abc import Awaitable
from dataclasses import dataclass, replace

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from events.errors import LogUnavailableError, SequenceConflict, UnknownRecordError
from events.log.base import EventLog
from events.log.records import Record, RecordPage, StoredRecordEvent
from events.types import Event, Failure, JobAccepted, JobExpired, JobFailed, Mode
from tests.contracts.event_log_adapters import ADAPTERS, OpenLog

each_adapter = pytest.mark.parametrize("open_log", ADAPTERS.values(), ids=list(ADAPTERS))
IDS = [f"record-{number}" for number in range(5)]


def record(*, last_seq: int = 1) -> Record:
    return Record(
        record_id="r",
        kind="batch",
        owner="ann",
        created_at=1.0,
        last_seq=last_seq,
        open=True,
        due_at=None,
        state=b"{}",
    )


# --- against a model -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    record_id: str
    forgets: bool
    off_by: int
    facts: tuple[bytes, ...]
    kind: str
    owner: str
    subject: str
    open: bool
    due_at: float | None


STEPS = st.builds(
    Step,
    record_id=st.sampled_from(IDS),
    forgets=st.sampled_from([False] * 8 + [True]),
    off_by=st.sampled_from([0] * 8 + [-1, 1]),
    facts=st.lists(st.binary(max_size=5), min_size=1, max_size=3).map(tuple),
    kind=st.sampled_from(["batch", "delivery"]),
    owner=st.sampled_from(["ann", "bob"]),
    subject=st.sampled_from(["", "job-1", "job-2"]),
    open=st.booleans(),
    due_at=st.none() | st.sampled_from([10.0, 20.0, 30.0]),
)


class Model:
    """Records in the order of creation, each with its facts."""

    def __init__(self) -> None:
        self.records: dict[str, tuple[Record, list[bytes]]] = {}

    def after(self, step: Step, expected_seq: int) -> Record:
        before = self.records.get(step.record_id)
        new = Record(
            record_id=step.record_id,
            kind=step.kind,
            owner=step.owner,
            created_at=1.0,
            last_seq=expected_seq + len(step.facts),
            open=step.open,
            due_at=step.due_at,
            state=b"".join(step.facts),
            subject=step.subject,
        )
        if before is None:
            return new
        first = before[0]
        return replace(new, kind=first.kind, owner=first.owner, subject=first.subject)

    def all(self) -> list[Record]:
        return [record for record, _ in self.records.values()]


async def perform(log: EventLog, model: Model, step: Step) -> None:
    """Do the same to both."""
    if step.forgets:
        await log.records.forget(step.record_id)
        model.records.pop(step.record_id, None)
        return
    facts = model.records[step.record_id][1] if step.record_id in model.records else []
    expected_seq = max(0, len(facts) + step.off_by)
    after = model.after(step, expected_seq)
    # What a record is does not change, whatever a writer says of it.
    told = replace(after, kind=step.kind, owner=step.owner, subject=step.subject)
    if expected_seq != len(facts):
        with pytest.raises(SequenceConflict) as caught:
            await log.records.append(told, step.facts, expected_seq)
        assert (caught.value.expected, caught.value.actual) == (expected_seq, len(facts))
        return
    await log.records.append(told, step.facts, expected_seq)
    model.records[step.record_id] = after, [*facts, *step.facts]


async def check(log: EventLog, model: Model) -> None:
    for record_id in IDS:
        if record_id not in model.records:
            await refused(log.records.get(record_id))
            await refused(log.records.read(record_id))
            continue
        expected, facts = model.records[record_id]
        assert await log.records.get(record_id) == expected
        stored = [StoredRecordEvent(record_id, seq, fact) for seq, fact in enumerate(facts, 1)]
        assert await log.records.read(record_id) == stored
        assert await log.records.read(record_id, after=1, limit=2) == stored[1:3]
    for kind in ("batch", "delivery"):
        ours = [found for found in model.all() if found.kind == kind]
        assert await log.records.open(kind) == [found for found in ours if found.open]
        due = [found.due_at for found in ours if found.due_at is not None]
        assert await log.records.next_due(kind) == min(due, default=None)
        found = await log.records.due(kind, 20.0, 100)
        assert [one.due_at for one in found] == sorted(at for at in due if at <= 20.0)
        assert {one.record_id for one in found} == {
            one.record_id for one in ours if one.due_at is not None and one.due_at <= 20.0
        }
        assert await log.records.due(kind, 20.0, 1) == found[:1]
        for subject in ("job-1", "job-2"):
            about = await log.records.about(kind, subject)
            assert about == [one for one in ours if one.subject == subject]
        for owner in ("ann", None):
            await check_pages(
                log, kind, owner, [one for one in ours if owner is None or one.owner == owner][::-1]
            )


async def refused(call: Awaitable[object]) -> None:
    with pytest.raises(UnknownRecordError):
        await call


async def check_pages(log: EventLog, kind: str, owner: str | None, newest_first: list[Record]) -> None:
    assert await log.records.page(kind, owner, limit=100) == RecordPage(newest_first, has_more=False)
    for place, cursor in enumerate(newest_first):
        older = newest_first[place + 1 :]
        page = await log.records.page(kind, owner, limit=2, after_id=cursor.record_id)
        assert page == RecordPage(older[:2], has_more=len(older) > 2)
        newer = newest_first[:place]
        page = await log.records.page(kind, owner, limit=2, before_id=cursor.record_id)
        assert page == RecordPage(newer[-2:], has_more=len(newer) > 2)


@each_adapter
@settings(max_examples=15, deadline=None)
@given(steps=st.lists(STEPS, min_size=5, max_size=30))
async def test_they_are_what_the_model_is(open_log: OpenLog, steps: list[Step]) -> None:
    model = Model()
    async with open_log() as log:
        for step in steps:
            await perform(log, model, step)
        await check(log, model)


# --- one by one ------------------------------------------------------------------------------------


async def test_of_two_writers_one_wins(log: EventLog) -> None:
    await log.records.append(record(), [b"first"], 0)
    refusals: list[SequenceConflict] = []

    async def write(fact: bytes) -> None:
        try:
            await log.records.append(record(last_seq=2), [fact], 1)
        except SequenceConflict as conflict:
            refusals.append(conflict)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(write, b"ann was here")
        nursery.start_soon(write, b"bob was here")
    assert [(one.expected, one.actual) for one in refusals] == [(1, 2)]
    assert len(await log.records.read("r")) == 2


async def test_numbers_that_do_not_add_up_are_refused(log: EventLog) -> None:
    for wrong, facts in ((record(last_seq=3), [b"one"]), (record(last_seq=0), [])):
        with pytest.raises(ValueError, match="counts all of its events"):
            await log.records.append(wrong, facts, 0)
    await refused(log.records.get("r"))


async def test_a_cursor_of_another_kind_is_unknown(log: EventLog) -> None:
    await log.records.append(record(), [b"fact"], 0)
    await refused(log.records.page("delivery", None, limit=1, after_id="r"))
    await refused(log.records.page("batch", None, limit=1, before_id="nobody"))


async def test_an_append_that_is_cancelled_is_done_or_not_done(log: EventLog) -> None:
    with trio.CancelScope() as scope:
        scope.cancel()
        await log.records.append(record(), [b"fact"], 0)
    try:
        assert (await log.records.get("r")).last_seq == 1
    except UnknownRecordError:
        await log.records.append(record(), [b"fact"], 0)
    assert [event.fact for event in await log.records.read("r")] == [b"fact"]


async def test_ended_jobs_with_a_webhook_are_found_until_a_record_is_about_them(log: EventLog) -> None:
    async def job(job_id: str, *after: Event, webhook: str | None = "hook") -> None:
        accepted = JobAccepted(
            at=1.0, owner="ann", model="m", mode=Mode.ASYNC, body=b"{}", detached=True, webhook=webhook
        )
        await log.append(job_id, [accepted, *after], 0)

    failed = JobFailed(at=2.0, failure=Failure(500, "api_error", "no"))
    await job("running")
    await job("ended", failed)
    await job("silent", failed, webhook=None)
    await job("expired", failed, JobExpired(at=3.0))
    await job("told", failed)
    await log.records.append(replace(record(), kind="delivery", subject="told"), [b"fact"], 0)
    await log.records.append(replace(record(), record_id="b", subject="ended"), [b"fact"], 0)
    assert await log.records.unannounced("delivery", 10) == ["ended", "expired"]
    assert await log.records.unannounced("delivery", 1) == ["ended"]
    await log.records.forget("r")
    assert await log.records.unannounced("delivery", 10) == ["ended", "expired", "told"]


async def test_a_closed_log_takes_no_record(log: EventLog) -> None:
    await log.aclose()
    with pytest.raises(LogUnavailableError):
        await log.records.append(record(), [b"fact"], 0)
