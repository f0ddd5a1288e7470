"""What a start makes of what an earlier process left: every verdict, seen from the client's side."""

import pytest
import trio

from actors.recovery import Verdict, verdict_on
from events.projections import JobSnapshot
from events.state import JobState
from events.types import (
    AttemptFailed,
    JobAccepted,
    JobFailed,
    Mode,
    NextStep,
)
from tests.scenarios.restarts import (
    EPOCH,
    Place,
    Recorder,
    asks,
    describe,
    event_kinds,
    place,
    result,
    submit,
    until_attempts,
)
from tests.support.gateway import poll, request, start
from tests.support.providers import PATIENCE_S, FakeProvider, text_of

__all__ = ["place"]

AFTER_RESTART = "interrupted by a restart of the gateway"


def unfinished(*, detached: bool = True, attempt: int = 0, may_rerun: bool = True) -> JobSnapshot:
    return JobSnapshot(
        job_id="j",
        owner="",
        model="m",
        mode=Mode.ASYNC,
        state=JobState.PROCESSING if attempt else JobState.PENDING,
        detached=detached,
        result_ttl_s=1.0,
        created_at=1.0,
        attempt=attempt,
        may_rerun=may_rerun,
    )


@pytest.mark.parametrize(
    ("snapshot", "verdict"),
    [
        (unfinished(), Verdict.RESUME),
        (unfinished(may_rerun=False), Verdict.RESUME),
        (unfinished(attempt=1), Verdict.RESUME),
        (unfinished(attempt=2), Verdict.RESUME),
        (unfinished(attempt=3), Verdict.OUT_OF_ATTEMPTS),
        (unfinished(attempt=4), Verdict.OUT_OF_ATTEMPTS),
        (unfinished(attempt=1, may_rerun=False), Verdict.RERUN_REFUSED),
        (unfinished(attempt=3, may_rerun=False), Verdict.RERUN_REFUSED),
        (unfinished(detached=False), Verdict.INTERRUPTED),
        (unfinished(detached=False, attempt=1), Verdict.INTERRUPTED),
        (unfinished(detached=False, attempt=3, may_rerun=False), Verdict.INTERRUPTED),
    ],
)
def test_verdicts(snapshot: JobSnapshot, verdict: Verdict) -> None:
    assert verdict_on(snapshot, max_attempts=3) is verdict


# --- run again -------------------------------------------------------------------------------------


async def test_jobs_are_taken_up_again_in_the_order_they_were_accepted(place: Place) -> None:
    first = Recorder(stall_at="connect")
    async with place.life(first, crash=True) as gateway:
        jobs = [await submit(gateway, f"job {number}") for number in range(6)]
        await first.until_called(6)
    second = Recorder(stall_at="connect")
    async with place.life(second, jobs={"max_resumed": 2}) as gateway:
        await second.until_called(2)
        # All others wait for one of the two.
        actors = [gateway.supervisor.actor(job_id, None) for job_id in jobs]
        assert [actor.waiting for actor in actors if actor] == [False, False, True, True, True, True]
        assert gateway.supervisor.in_flight == 6
        assert second.open_calls == 2
        assert (await poll(gateway.url, jobs[5])).headers["x-bf-async-status"] == "processing"
        # A new job does not queue behind them.
        await submit(gateway, "new")
        await second.until_called(3)
        second.release.set()
        for job_id in jobs:
            answer = await result(gateway, job_id)
            assert answer.json["content"] == [{"type": "text", "text": text_of(3)}]
            assert (await describe(gateway, job_id))["attempts"] == 2
    # Two at once: within a pair there is no order.
    assert sorted(second.asked[:2]) == ["job 0", "job 1"]
    assert second.asked[2] == "new"


async def test_one_at_a_time_they_are_run_in_that_very_order(place: Place) -> None:
    first = FakeProvider(stall_at="connect")
    texts = [f"job {number}" for number in range(8)]
    async with place.life(first, crash=True) as gateway:
        jobs = [await submit(gateway, text) for text in texts]
        await first.until_called(8)
    second = Recorder()
    async with place.life(second, jobs={"max_resumed": 1}) as gateway:
        for job_id in jobs:
            assert (await result(gateway, job_id)).status == 200
    assert second.asked == texts


async def test_the_story_of_a_job_that_was_run_again(place: Place) -> None:
    first = FakeProvider(stall_at="mid_stream")
    async with place.life(first, crash=True) as gateway:
        job_id = await submit(gateway)
        await first.stalled.wait()
    async with place.life() as gateway:
        await result(gateway, job_id)
        events = [stored.event for stored in await gateway.log.read(job_id)]
    assert [type(event).__name__ for event in events if type(event).__name__ != "FramesReceived"] == [
        "JobAccepted",
        "AttemptStarted",
        "AttemptFailed",
        "AttemptStarted",
        "JobCompleted",
    ]
    (failed,) = [event for event in events if isinstance(event, AttemptFailed)]
    assert (failed.attempt, failed.next, failed.failure.message) == (1, NextStep.RETRY, AFTER_RESTART)


async def test_a_job_is_not_run_more_often_than_its_attempts(place: Place) -> None:
    jobs = {"max_attempts": 2}
    for attempt in (1, 2):
        provider = FakeProvider(stall_at="connect")
        async with place.life(provider, crash=True, jobs=jobs) as gateway:
            if attempt == 1:
                job_id = await submit(gateway)
            await until_attempts(gateway, [job_id], attempt)
    provider = FakeProvider()
    async with place.life(provider, jobs=jobs) as gateway:
        answer = await result(gateway, job_id)
        assert (answer.status, answer.error_type) == (500, "api_error")
        assert answer.json["error"]["message"] == "interrupted by a restart in each of its 2 attempts"
        assert answer.headers["x-should-retry"] == "false"
        assert (await event_kinds(gateway, job_id))[-2:] == ["AttemptFailed", "JobFailed"]
    assert provider.calls == []


async def test_who_would_rather_fail_than_pay_twice(place: Place) -> None:
    first = FakeProvider(stall_at="connect")
    async with place.life(first, crash=True) as gateway:
        never = await submit(gateway, x_bf_async_retry="never")
        other = await submit(gateway)
        await first.until_called(2)
    # In the next life the one that may be run again waits for its turn and is cut off again; then comes one
    # that may not, and has not begun.
    second = FakeProvider(stall_at="connect")
    async with place.life(second, crash=True) as gateway:
        answer = await result(gateway, never)
        assert answer.status == 500
        assert "x-bf-async-retry was never" in answer.json["error"]["message"]
        assert (await describe(gateway, never))["attempts"] == 1
        await second.until_called(1)
    async with place.life() as gateway:
        assert (await result(gateway, other)).status == 200
        assert (await result(gateway, never)).json["error"] == answer.json["error"]


async def test_one_that_never_began_costs_nobody_twice(place: Place) -> None:
    async with place.life(crash=True) as gateway:
        accepted = JobAccepted(
            at=EPOCH, owner="", model="m", mode=Mode.ASYNC, body=b"{}", detached=True, may_rerun=False
        )
        await gateway.log.append("waiting", [accepted], 0)
    async with place.life() as gateway:
        with trio.fail_after(PATIENCE_S):
            while not (await gateway.log.snapshot("waiting")).ended:  # noqa: ASYNC110 - nothing tells
                await trio.lowlevel.checkpoint()
        assert (await gateway.log.snapshot("waiting")).state is JobState.COMPLETED


async def test_no_route_leads_anywhere_any_more(place: Place) -> None:
    first = FakeProvider(stall_at="connect")
    async with place.life(first, crash=True) as gateway:
        job_id = await submit(gateway)
        await first.until_called(1)
    async with place.life(routes=[{"model": "other", "provider": "fake"}]) as gateway:
        answer = await result(gateway, job_id)
        assert (answer.status, answer.error_type) == (404, "not_found_error")
        # It is the job's own error, not an unknown job's.
        assert answer.job_id == job_id
        assert (await describe(gateway, job_id))["status"] == "failed"


async def test_a_job_that_waits_for_its_turn_can_be_cancelled(place: Place) -> None:
    first = FakeProvider(stall_at="mid_stream")
    async with place.life(first, crash=True) as gateway:
        jobs = [await submit(gateway) for _ in range(3)]
        await until_attempts(gateway, jobs, 1)
    second = FakeProvider(stall_at="connect")
    async with place.life(second, crash=True, jobs={"max_resumed": 1}) as gateway:
        await second.until_called(1)
        answer = await request(gateway.url, "POST", f"/v1/jobs/{jobs[1]}/cancel")
        assert (answer.status, answer.json["status"]) == (200, "cancelled")
        assert answer.json["attempts"] == 1
        # Its turn goes to the next one.
        second.release.set()
        assert (await result(gateway, jobs[2])).status == 200
    assert len(second.calls) == 2
    async with place.life() as gateway:
        assert (await describe(gateway, jobs[1]))["status"] == "cancelled"
        assert (await result(gateway, jobs[1])).status == 409


# --- nobody is there any more ----------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_attached_calls_fail(place: Place, stream: bool) -> None:
    first = FakeProvider(stall_at="last_frame")
    async with (
        place.life(first, crash=True) as gateway,
        start(gateway.url, "POST", "/v1/messages", {}, asks("secret", stream=stream)),
    ):
        await first.stalled.wait()
        (job,) = (await request(gateway.url, "GET", "/v1/jobs")).json["data"]
        place.kill()
    second = FakeProvider()
    async with place.life(second) as gateway:
        found = await describe(gateway, job["id"])
        assert found["status"] == "failed"
        assert found["error"] == {"type": "api_error", "message": AFTER_RESTART}
        assert (await poll(gateway.url, job["id"])).status == 404
        events = [stored.event for stored in await gateway.log.read(job["id"])]
        assert isinstance(events[0], JobAccepted)
        assert events[0].body == b""
        assert isinstance(events[-1], JobFailed)
    assert second.calls == []
