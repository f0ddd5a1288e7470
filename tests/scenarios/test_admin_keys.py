"""An admin key sees everybody's jobs and deliveries; any other key its own jobs, and no deliveries."""

import pytest
import trio
from trio.testing import MockClock

from service.main import Gateway
from tests.support.gateway import Answer, open_fake_gateway, poll, post, request, start
from tests.support.providers import FakeProvider, text_of
from tests.support.receiver import open_receiver

KEYS = [
    {"name": "ann", "key": "sk-bf-ann"},
    {"name": "bob", "key": "sk-bf-bob"},
    {"name": "root", "key": "sk-bf-root", "admin": True},
]
ASYNC = {"x-bf-async": "true"}


def key(name: str) -> dict[str, str]:
    return {"x-api-key": f"sk-bf-{name}"}


async def ask(gateway: Gateway, name: str, method: str, path: str) -> Answer:
    return await request(gateway.url, method, path, key(name))


async def test_an_admin_finds_every_job_and_others_find_their_own(http_clock: MockClock) -> None:
    async with open_fake_gateway(keys=KEYS) as gateway:
        anns = (await post(gateway.url, key("ann") | ASYNC)).job_id
        bobs = (await post(gateway.url, key("bob") | ASYNC)).job_id
        seen = {}
        for name in ("ann", "bob", "root"):
            page = (await ask(gateway, name, "GET", "/v1/jobs")).json
            seen[name] = [job["id"] for job in page["data"]]
        assert seen == {"ann": [anns], "bob": [bobs], "root": [bobs, anns]}
        page = (await ask(gateway, "root", "GET", f"/v1/jobs?limit=1&after_id={bobs}")).json
        assert [job["id"] for job in page["data"]] == [anns]
        assert (await ask(gateway, "bob", "GET", f"/v1/jobs?after_id={anns}")).status == 404


@pytest.mark.parametrize("name", ["root", "bob"])
async def test_an_admin_reads_and_deletes_anybodys_job(name: str, http_clock: MockClock) -> None:
    theirs = 200 if name == "root" else 404
    async with open_fake_gateway(keys=KEYS) as gateway:
        job_id = (await post(gateway.url, key("ann") | ASYNC)).job_id
        done = await poll(gateway.url, job_id, prefer="wait=10", **key("ann"))
        assert done.status == 200
        polled = await poll(gateway.url, job_id, **key(name))
        assert polled.status == theirs
        for path in ("", "/events", "/result", "/stream"):
            assert (await ask(gateway, name, "GET", f"/v1/jobs/{job_id}{path}")).status == theirs, path
        if name == "root":
            assert polled.json["content"][0]["text"] == text_of(3)
        # A job that has ended stays as it is.
        assert (await ask(gateway, name, "POST", f"/v1/jobs/{job_id}/cancel")).status == theirs
        assert (await ask(gateway, name, "DELETE", f"/v1/jobs/{job_id}")).status == theirs
        gone = await poll(gateway.url, job_id, **key("ann"))
        assert gone.status == (404 if name == "root" else 200)


async def test_an_admin_watches_and_cancels_anybodys_running_job(http_clock: MockClock) -> None:
    provider = FakeProvider(stall_at="mid_stream")
    async with open_fake_gateway(provider, keys=KEYS) as gateway:
        job_id = (await post(gateway.url, key("ann") | ASYNC)).job_id
        await provider.stalled.wait()
        assert (await ask(gateway, "bob", "POST", f"/v1/jobs/{job_id}/cancel")).status == 404
        for feed in ("stream", "events"):
            headers = key("root") | {"accept": "text/event-stream"}
            async with start(gateway.url, "GET", f"/v1/jobs/{job_id}/{feed}", headers) as call:
                assert (await call.head()).status == 200
                with trio.fail_after(5):
                    assert await call.events(2)
        cancelled = await ask(gateway, "root", "POST", f"/v1/jobs/{job_id}/cancel")
        assert (cancelled.status, cancelled.json["status"]) == (200, "cancelled")
        events = (await ask(gateway, "ann", "GET", f"/v1/jobs/{job_id}/events")).json["data"]
        assert events[-1]["by"] == "root"


async def test_an_admins_jobs_are_its_own(http_clock: MockClock) -> None:
    async with open_fake_gateway(keys=KEYS) as gateway:
        same = {"idempotency-key": "k"}
        anns = await post(gateway.url, key("ann") | ASYNC | same)
        roots = await post(gateway.url, key("root") | ASYNC | same)
        assert anns.job_id != roots.job_id
        assert (await ask(gateway, "ann", "GET", f"/v1/jobs/{roots.job_id}")).status == 404


async def test_deliveries_are_for_admins(http_clock: MockClock) -> None:
    async with (
        open_receiver() as receiver,
        open_fake_gateway(keys=KEYS, webhooks=[receiver.table()]) as gateway,
    ):
        for name in ("ann", "bob"):
            await post(gateway.url, key(name) | ASYNC | {"x-bf-async-webhook": "hook"})
        heard = await receiver.until(2)
        path = "/v1/webhooks/deliveries"
        again = f"{path}/{heard[0].id}/redeliver"
        for method, where in (("GET", path), ("POST", again)):
            refused = await ask(gateway, "ann", method, where)
            assert (refused.status, refused.error_type) == (403, "permission_error")
            assert (await request(gateway.url, method, where)).status == 401
        listed = await ask(gateway, "root", "GET", path)
        assert {one["owner"] for one in listed.json["data"]} == {"ann", "bob"}
        assert (await ask(gateway, "root", "POST", again)).status == 200
        await receiver.until(3)
        headers = {"x-bf-async": "true"} | key("root")
        assert (await request(gateway.url, "GET", path, headers)).status == 400


async def test_anonymous_callers_are_no_admins_where_there_are_keys(http_clock: MockClock) -> None:
    auth = {"allow_anonymous": True}
    async with open_fake_gateway(keys=KEYS, auth=auth) as gateway:
        refused = await request(gateway.url, "GET", "/v1/webhooks/deliveries")
        assert (refused.status, refused.error_type) == (403, "permission_error")
