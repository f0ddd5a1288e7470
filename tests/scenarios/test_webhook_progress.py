"""Progress of running jobs, deliveries sent again, and lists of them."""

from trio.testing import MockClock

from tests.scenarios.webhooks import closed, deliveries, redeliver, submit, times
from tests.support.gateway import open_fake_gateway, request, start
from tests.support.providers import FakeProvider
from tests.support.receiver import STALL, open_receiver

# --- progress -----------------------------------------------------------------------------------------


async def test_progress_is_told_once_a_second_with_a_cursor_to_resume_from(http_clock: MockClock) -> None:
    provider = FakeProvider(deltas=50, delay_s=0.1)
    async with open_receiver() as receiver:
        table = receiver.table(progress=True)
        async with open_fake_gateway(provider, webhooks=[table]) as gateway:
            job_id = await submit(gateway)
            heard = await receiver.until(3)
            cursor = heard[-1].body["data"]["cursor"]
            headers = {"last-event-id": cursor}
            async with start(gateway.url, "GET", f"/v1/jobs/{job_id}/stream", headers) as call:
                await call.head()
                (event,) = await call.events(1)
            assert event.id is not None
            assert int(event.id.removeprefix("1-")) == int(cursor.removeprefix("1-")) + 1
            await closed(gateway)
    progress, last = receiver.heard[:-1], receiver.heard[-1]
    assert {one.body["event"] for one in progress} == {"async_job.progress"}
    assert last.body["event"] == "async_job.completed"
    assert [later - sooner for sooner, later in zip(times(progress), times(progress)[1:], strict=False)] == [
        1.0
    ] * (len(progress) - 1)
    assert 4 <= len(progress) <= 6
    assert len({one.id for one in receiver.heard}) == len(receiver.heard)
    data = progress[0].body["data"]
    assert data == {
        "job_id": job_id,
        "request_type": "messages",
        "status": "processing",
        "status_code": 200,
        "result_url": f"/v1/jobs/{job_id}/result",
        "result_expires_at": None,
        "cursor": data["cursor"],
    }


async def test_progress_is_not_tried_again_and_holds_up_no_delivery(http_clock: MockClock) -> None:
    provider = FakeProvider(deltas=20, delay_s=0.1)
    async with open_receiver(STALL) as receiver:
        table = receiver.table(progress=True, max_concurrency=2, timeout_s=60)
        async with open_fake_gateway(provider, webhooks=[table]) as gateway:
            await submit(gateway)
            heard = await receiver.until(2)
            # One call at a time for a job: the stalled one is not followed by another.
            assert [one.body["event"] for one in heard] == ["async_job.progress", "async_job.completed"]
            receiver.release.set()
            await closed(gateway)
            metrics = (await request(gateway.url, "GET", "/metrics")).body.decode()
    assert 'outcome="progress_sent"} 1.0' in metrics
    assert len(receiver.heard) == 2


# --- again ---------------------------------------------------------------------------------------------


async def test_a_delivery_can_be_sent_again_under_its_id(http_clock: MockClock) -> None:
    async with (
        open_receiver(400, 500, 200) as receiver,
        open_fake_gateway(webhooks=[receiver.table()]) as gateway,
    ):
        await submit(gateway)
        (failed,) = await closed(gateway)
        again = await redeliver(gateway, failed["id"])
        assert again.status == 200
        assert (again.json["status"], again.json["ended_at"]) == ("pending", None)
        await receiver.until(2)
        busy = await redeliver(gateway, failed["id"])
        assert (busy.status, busy.error_type) == (409, "conflict_error")
        (delivered,) = await closed(gateway)
        unknown = await redeliver(gateway, "whd_nothing")
        assert (unknown.status, unknown.error_type) == (404, "not_found_error")
        await redeliver(gateway, failed["id"])
        await receiver.until(4)
    assert (delivered["status"], delivered["attempts"]) == ("delivered", 3)
    assert {heard.id for heard in receiver.heard} == {failed["id"]}
    assert times(receiver.heard[1:3]) == [0, 30]


async def test_deliveries_are_listed_a_page_at_a_time(http_clock: MockClock) -> None:
    async with open_receiver() as receiver, open_fake_gateway(webhooks=[receiver.table()]) as gateway:
        jobs = []
        for count in range(1, 4):
            jobs.append(await submit(gateway))
            newest = await closed(gateway, count)
        assert [one["job_id"] for one in newest] == jobs[::-1]
        page = await request(gateway.url, "GET", "/v1/webhooks/deliveries?limit=2")
        assert ([one["job_id"] for one in page.json["data"]], page.json["has_more"]) == (jobs[:0:-1], True)
        rest = await deliveries(gateway, f"?limit=2&after_id={page.json['last_id']}")
        assert [one["job_id"] for one in rest] == jobs[:1]
        back = await deliveries(gateway, f"?limit=2&before_id={rest[0]['id']}")
        assert [one["job_id"] for one in back] == jobs[:0:-1]
        assert [one["job_id"] for one in await deliveries(gateway, f"?job_id={jobs[1]}")] == [jobs[1]]
        for query, status in (("after_id=x", 404), ("limit=0", 400), (f"job_id={jobs[0]}&after_id=x", 400)):
            answer = await request(gateway.url, "GET", f"/v1/webhooks/deliveries?{query}")
            assert answer.status == status
