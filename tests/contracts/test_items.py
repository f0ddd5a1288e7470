"""What every log promises of the items of batches. See :mod:`events.log.items`."""

from collections.abc import Sequence

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from events.batches import ItemCounts, ItemResult, result_of
from events.errors import LogUnavailableError, SequenceConflict, UnknownJobError
from events.log.base import EventLog, JobFilter
from events.log.items import NewItem
from events.log.records import Record
from events.projections import JobSnapshot, project
from events.types import Event, Failure, JobAccepted, JobCancelled, JobFailed, Mode
from tests.contracts.event_log_adapters import ADAPTERS, OpenLog
from tests.contracts.event_log_checks import read_all
from tests.contracts.event_log_model import completed, failed, started

each_adapter = pytest.mark.parametrize("open_log", ADAPTERS.values(), ids=list(ADAPTERS))
CANCELLED = JobCancelled(at=5.0, by="ann", reason="had enough")
LAPSED = JobCancelled(at=5.0, by="", reason="its time was up", lapsed=True)
REFUSED = JobFailed(at=1.0, failure=Failure(400, "invalid_request_error", "no messages"))


def item(custom_id: str, *more: Event, batch_id: str = "b", body: bytes = b'{"the": "body"}') -> NewItem:
    accepted = JobAccepted(
        at=1.0,
        owner="ann",
        model="m",
        mode=Mode.BATCH,
        body=body,
        detached=True,
        result_ttl_s=100.0,
        batch_id=batch_id,
        custom_id=custom_id,
    )
    return NewItem(f"job-{batch_id}-{custom_id}", [accepted, *more])


def names(jobs: Sequence[JobSnapshot]) -> list[str | None]:
    return [job.custom_id for job in jobs]


async def waiting(log: EventLog, after: int = 0, limit: int = 100) -> list[str | None]:
    return names([found.job for found in await log.items.waiting("b", after, limit)])


# --- against a model -------------------------------------------------------------------------------

STEPS = st.one_of(
    st.tuples(st.just("accept"), st.integers(1, 4)),
    st.tuples(st.just("refuse"), st.just(1)),
    st.tuples(st.sampled_from(["start", "complete", "fail"]), st.integers(0, 20)),
    st.tuples(st.just("end"), st.integers(1, 3)),
)


@each_adapter
@settings(max_examples=15, deadline=None)
@given(steps=st.lists(STEPS, min_size=4, max_size=25), lapsed=st.booleans())
async def test_they_are_what_the_model_is(
    open_log: OpenLog, steps: list[tuple[str, int]], lapsed: bool
) -> None:
    jobs: dict[str, list[Event]] = {}
    ending = LAPSED if lapsed else CANCELLED
    async with open_log() as log:
        for kind, number in steps:
            now = {job_id: project(job_id, events) for job_id, events in jobs.items()}
            if kind in ("accept", "refuse"):
                more = [REFUSED] if kind == "refuse" else []
                new = [item(f"{len(jobs) + place}", *more) for place in range(number)]
                await log.items.accept([*new, item(f"other-{len(jobs)}", batch_id="other")])
                jobs |= {one.job_id: list(one.events) for one in new}
            elif kind == "end":
                open_ids = [job_id for job_id, job in now.items() if job.state == "pending"]
                but, due = open_ids[:1], open_ids[1:][:number]
                assert await log.items.end_waiting("b", ending, but=but, limit=number) == len(due)
                for job_id in due:
                    jobs[job_id].append(ending)
            elif number < len(jobs):
                job_id = list(jobs)[number]
                wanted = "pending" if kind == "start" else "processing"
                if now[job_id].state == wanted:
                    events: dict[str, Event] = {
                        "start": started(2.0, 1),
                        "complete": completed(3.0, 1),
                        "fail": failed(3.0),
                    }
                    await log.append(job_id, [events[kind]], now[job_id].last_seq)
                    jobs[job_id].append(events[kind])
        await check(log, jobs)


async def check(log: EventLog, jobs: dict[str, list[Event]]) -> None:
    now = [project(job_id, events) for job_id, events in jobs.items()]
    results = [result_of(job).value for job in now]
    assert await log.items.counts("b") == ItemCounts(**{name: results.count(name) for name in set(results)})
    pending = [job for job in now if job.state == "pending"]
    found = await log.items.waiting("b", 0, 100)
    assert [one.job for one in found] == pending
    for place, one in enumerate(found):
        assert await log.items.waiting("b", one.number, 2) == found[place + 1 : place + 3]
    assert await log.items.begun("b") == [job for job in now if job.state == "processing"]
    ended = [job for job in now if job.ended]
    paged: list[JobSnapshot] = []
    after = 0
    while page := await log.items.results("b", after, limit=2, max_bytes=1 << 20):
        assert len(page) <= 2
        paged += [one.job for one in page]
        after = page[-1].number
    assert paged == ended
    if ended:
        assert len(await log.items.results("b", 0, limit=100, max_bytes=1)) == next(
            (place for place, job in enumerate(ended, 1) if job.message), len(ended)
        )
    for job_id, events in jobs.items():
        assert await read_all(log, job_id) == events


# --- one by one ------------------------------------------------------------------------------------


async def test_of_items_of_which_one_is_there_none_is_accepted(log: EventLog) -> None:
    await log.items.accept([item("1")])
    with pytest.raises(SequenceConflict):
        await log.items.accept([item("2"), item("1")])
    assert await waiting(log) == ["1"]
    with pytest.raises(UnknownJobError):
        await log.snapshot("job-b-2")


async def test_a_closed_log_accepts_none(log: EventLog) -> None:
    await log.aclose()
    with pytest.raises(LogUnavailableError):
        await log.items.accept([item("1")])


async def test_they_are_listed_but_not_among_the_unfinished_or_the_due(log: EventLog) -> None:
    await log.items.accept([item("1"), item("2", REFUSED)])
    await log.append("job-b-1", [started(2.0, 1)], 1)
    assert await log.unfinished() == []
    assert await log.next_deadline() is None
    assert await log.due(1e9, 10) == []
    page = await log.page(JobFilter(owner="ann"), limit=10)
    assert names(page.jobs) == ["2", "1"]


async def test_who_follows_one_hears_that_it_was_ended(log: EventLog) -> None:
    await log.items.accept([item("1"), item("2")])
    with log.follow("job-b-1") as follower:
        assert len(await follower.receive()) == 1
        async with trio.open_nursery() as nursery:
            nursery.start_soon(end_all, log)
            (end,) = await follower.receive()
        assert end.event == CANCELLED
        assert await follower.receive() == []
    assert await log.items.counts("b") == ItemCounts(canceled=2)


async def end_all(log: EventLog) -> None:
    assert await log.items.end_waiting("b", CANCELLED, but=(), limit=10) == 2


async def test_forgetting_is_done_in_parts_and_leaves_other_batches_alone(log: EventLog) -> None:
    await log.items.accept([item(str(number)) for number in range(25)])
    await log.items.accept([item("1", batch_id="other")])
    assert await log.items.forget("b", 20) == 20
    assert (await log.items.counts("b")).processing == 5
    assert await log.items.forget("b", 20) == 5
    assert await log.items.forget("b", 20) == 0
    assert await log.items.counts("b") == ItemCounts()
    assert (await log.items.counts("other")).processing == 1
    with pytest.raises(UnknownJobError):
        await log.read("job-b-1")


async def test_orphans_have_no_record(log: EventLog) -> None:
    for batch_id in ("a", "b", "c"):
        await log.items.accept([item("1", batch_id=batch_id), item("2", batch_id=batch_id)])
    record = Record(
        record_id="b",
        kind="batch",
        owner="ann",
        created_at=1.0,
        last_seq=1,
        open=True,
        due_at=None,
        state=b"{}",
    )
    await log.records.append(record, [b"{}"], 0)
    assert sorted(await log.items.orphans()) == ["a", "c"]


def test_every_result_has_a_count() -> None:
    assert {result.value for result in ItemResult} == set(ItemCounts.__dataclass_fields__)
