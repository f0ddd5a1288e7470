"""Message Batches over the wire: shapes, errors, owners, pages, and uploads of every kind."""

from typing import Any

import h11
import orjson
import pytest
import trio
from trio.testing import MockClock

from service.main import Gateway
from tests.support.gateway import BODY, Answer, Call, connect, open_fake_gateway, request, start
from tests.support.providers import FakeProvider

PATH = "/v1/messages/batches"
TIMES = {"created_at", "expires_at", "ended_at", "cancel_initiated_at"}
KEYS = [
    {"name": "ann", "key": "sk-bf-ann"},
    {"name": "bob", "key": "sk-bf-bob", "models": ["cheap-*"]},
    {"name": "root", "key": "sk-bf-root", "admin": True},
]


def one(custom_id: str = "a", **params: object) -> dict[str, Any]:
    return {"custom_id": custom_id, "params": {**BODY, **params}}


async def create(gateway: Gateway, *requests: object, key: str = "any", **headers: str) -> Answer:
    sent = {"x-api-key": key} | {name.replace("_", "-"): value for name, value in headers.items()}
    return await request(gateway.url, "POST", PATH, sent, {"requests": list(requests) or [one()]})


async def ended(gateway: Gateway, batch_id: str, key: str = "any") -> dict[str, Any]:
    with trio.fail_after(60):
        while True:
            answer = await request(gateway.url, "GET", f"{PATH}/{batch_id}", {"x-api-key": key})
            batch: dict[str, Any] = answer.json
            if batch["processing_status"] == "ended":
                return batch
            await trio.sleep(0.05)


async def results(gateway: Gateway, batch_id: str, key: str = "any") -> list[dict[str, Any]]:
    answer = await request(gateway.url, "GET", f"{PATH}/{batch_id}/results", {"x-api-key": key})
    assert answer.headers["content-type"] == "application/x-jsonl"
    return [orjson.loads(line) for line in answer.body.splitlines()]


async def test_a_batch_has_the_shape_of_the_api(http_clock: MockClock) -> None:
    fake = FakeProvider(stall_at="mid_stream")
    async with open_fake_gateway(fake) as gateway:
        answer = await create(gateway, one("a"), one("b"), one("c", messages=[]), one("d", stream=True))
        batch = answer.json
        assert answer.status == 200
        assert batch["id"].startswith("msgbatch_")
        assert len(batch["id"]) >= len("msgbatch_") + 24
        assert {name: value for name, value in batch.items() if name not in TIMES | {"id"}} == {
            "type": "message_batch",
            "processing_status": "in_progress",
            "request_counts": {"processing": 2, "succeeded": 0, "errored": 2, "canceled": 0, "expired": 0},
            "archived_at": None,
            "results_url": None,
        }
        assert batch["ended_at"] is batch["cancel_initiated_at"] is None
        path = f"{PATH}/{batch['id']}"
        early = await request(gateway.url, "GET", f"{path}/results")
        assert (early.status, early.error_type) == (404, "not_found_error")
        refused = await request(gateway.url, "DELETE", path)
        assert (refused.status, refused.error_type) == (409, "conflict_error")
        assert refused.headers["x-should-retry"] == "false"
        await fake.until_called(2)
        fake.release.set()
        done = await ended(gateway, batch["id"])
        assert done["request_counts"]["succeeded"] == 2
        assert done["results_url"] == f"{gateway.url}{path}/results"
        lines = await results(gateway, batch["id"])
        assert [(line["custom_id"], line["result"]["type"]) for line in lines] == [
            ("a", "succeeded"),
            ("b", "succeeded"),
            ("c", "errored"),
            ("d", "errored"),
        ]
        assert lines[0]["result"]["message"]["stop_reason"] == "end_turn"
        error = lines[2]["result"]["error"]
        assert (error["type"], error["error"]["type"]) == ("error", "invalid_request_error")
        assert "messages" in error["error"]["message"]
        assert "stream" in lines[3]["result"]["error"]["error"]["message"]
        gone = await request(gateway.url, "DELETE", path)
        assert gone.json == {"id": batch["id"], "type": "message_batch_deleted"}
        for left in (path, f"{path}/results"):
            assert (await request(gateway.url, "GET", left)).status == 404


async def test_addresses_are_those_the_client_came_by(http_clock: MockClock) -> None:
    async with open_fake_gateway() as gateway:
        batch_id = (await create(gateway)).json["id"]
        await ended(gateway, batch_id)
        prefixed = await request(gateway.url, "GET", f"/anthropic{PATH}/{batch_id}")
        assert prefixed.json["results_url"] == f"{gateway.url}/anthropic{PATH}/{batch_id}/results"
    async with open_fake_gateway(server={"port": 0, "public_url": "https://llm.example/x"}) as gateway:
        batch_id = (await create(gateway)).json["id"]
        url = (await ended(gateway, batch_id))["results_url"]
        assert url == f"https://llm.example/x{PATH}/{batch_id}/results"


async def test_an_item_goes_upstream_as_the_clients_bytes(http_clock: MockClock) -> None:
    params = (
        b'{ "max_tokens":1e1 , "messages": [{"role":"user","content":"\\u00e9"}],\n "model":"m", "x": 1.0 }'
    )
    body = b'{"requests":[{"params": %b, "custom_id":"a"}]}' % params.replace(b"1e1", b"10")
    async with open_fake_gateway() as gateway:
        answer = await request(gateway.url, "POST", PATH, {}, body)
        await ended(gateway, answer.json["id"])
        (job,) = (await request(gateway.url, "GET", "/v1/jobs")).json["data"]
        assert (job["mode"], job["status"], job["model"]) == ("batch", "completed", "m")
        stored = (await gateway.log.read(job["id"]))[0].event
        assert getattr(stored, "body", None) == params.replace(b"1e1", b"10")
        poll = await request(gateway.url, "POST", "/v1/messages", {"x-bf-async-id": job["id"]})
        assert poll.json["type"] == "message"
        assert (await request(gateway.url, "DELETE", f"/v1/jobs/{job['id']}")).status == 409


@pytest.mark.parametrize(
    ("body", "status", "text"),
    [
        (b"", 400, "it breaks off"),
        (b'{"requests": []}', 400, "at least 1"),
        ({"requests": [one("a"), one("a")]}, 400, "requests.1.custom_id"),
        ({"requests": [one("a"), one("")]}, 400, "requests.1.custom_id"),
        ({"requests": [one("x" * 65)]}, 400, "requests.0.custom_id"),
        ({"requests": [{"params": {}}]}, 400, "requests.0.custom_id"),
        ({"requests": [one("a"), {"custom_id": "b"}]}, 400, "requests.1.params"),
        ({"requests": [{"custom_id": "b", "params": 7}]}, 400, "requests.0.params"),
        (b'{"requests": [{"custom_id": "a", "params": {7}}]}', 400, "requests.0"),
        ({"requests": [one(str(number)) for number in range(4)]}, 400, "more than 3"),
        ({"requests": [one("a", more="x" * 3000)]}, 413, "requests.0"),
        ({"requests": [one("a")], "more": "x" * 30_000}, 413, "too large"),
    ],
)
async def test_what_is_no_batch_is_refused_and_leaves_nothing(
    http_clock: MockClock, body: object, status: int, text: str
) -> None:
    bounds = {"max_requests": 3, "max_body_bytes": 20_000}
    server = {"port": 0, "max_body_bytes": 1500}
    async with open_fake_gateway(batches=bounds, server=server) as gateway:
        answer = await request(gateway.url, "POST", PATH, {}, body)
        assert answer.status == status
        assert text in answer.json["error"]["message"]
        await trio.sleep(1)
        assert (await request(gateway.url, "GET", "/v1/jobs")).json["data"] == []
        assert (await request(gateway.url, "GET", PATH)).json["data"] == []


async def test_batches_belong_to_their_key_and_admins_see_all(http_clock: MockClock) -> None:
    async with open_fake_gateway(keys=KEYS) as gateway:
        ann = (await create(gateway, key="sk-bf-ann")).json["id"]
        bob = (await create(gateway, one("a"), one("b", model="cheap-1"), key="sk-bf-bob")).json["id"]
        await ended(gateway, ann, "sk-bf-root")
        # What a key may not use, its items may not either.
        assert (await ended(gateway, bob, "sk-bf-bob"))["request_counts"]["errored"] == 1
        error = (await results(gateway, bob, "sk-bf-bob"))[0]["result"]["error"]["error"]
        assert error["type"] == "permission_error"
        for method, path in (
            ("GET", f"{PATH}/{ann}"),
            ("GET", f"{PATH}/{ann}/results"),
            ("POST", f"{PATH}/{ann}/cancel"),
            ("DELETE", f"{PATH}/{ann}"),
            ("GET", f"{PATH}?after_id={ann}"),
        ):
            assert (await request(gateway.url, method, path, {"x-api-key": "sk-bf-bob"})).status == 404
        listed = (await request(gateway.url, "GET", PATH, {"x-api-key": "sk-bf-root"})).json["data"]
        assert [batch["id"] for batch in listed] == [bob, ann]
        listed = (await request(gateway.url, "GET", PATH, {"x-api-key": "sk-bf-ann"})).json["data"]
        assert [batch["id"] for batch in listed] == [ann]


@pytest.mark.parametrize(
    ("fallbacks", "error"),
    [(["cheap-2", "dear-1"], "permission_error"), (["cheap-2"] * 9, "invalid_request_error")],
)
async def test_fallbacks_of_an_item_are_those_a_call_may_name(
    fallbacks: list[str], error: str, http_clock: MockClock
) -> None:
    async with open_fake_gateway(keys=KEYS) as gateway:
        asked = one("a", model="cheap-1", fallbacks=fallbacks)
        batch_id = (await create(gateway, asked, key="sk-bf-bob")).json["id"]
        assert (await ended(gateway, batch_id, "sk-bf-bob"))["request_counts"]["errored"] == 1
        (line,) = await results(gateway, batch_id, "sk-bf-bob")
        assert line["result"]["error"]["error"]["type"] == error


@pytest.mark.parametrize("prefix", ["", "/anthropic"])
async def test_other_methods_are_not_passed_on(prefix: str, http_clock: MockClock) -> None:
    async with open_fake_gateway() as gateway:
        batch_id = (await create(gateway)).json["id"]
        for path, method, allowed in (
            (batch_id, "POST", {"GET", "HEAD", "DELETE"}),
            (batch_id, "PUT", {"GET", "HEAD", "DELETE"}),
            (f"{batch_id}/results", "POST", {"GET", "HEAD"}),
            (f"{batch_id}/cancel", "GET", {"POST"}),
        ):
            answer = await request(gateway.url, method, f"{prefix}{PATH}/{path}", {}, BODY)
            assert (answer.status, answer.error_type) == (405, "invalid_request_error")
            assert set(answer.headers["allow"].split(", ")) == allowed
        for path in ("/", f"/{batch_id}/other", f"/{batch_id}/cancel/x"):
            answer = await request(gateway.url, "POST", f"{prefix}{PATH}{path}", {}, BODY)
            assert (answer.status, answer.error_type) == (404, "not_found_error")
        # A name that only begins like it is a provider's.
        answer = await request(gateway.url, "POST", f"{prefix}/v1/messages/batchesx", {}, {})
        assert "passed on to a provider" in answer.json["error"]["message"]


async def test_lists_go_both_ways(http_clock: MockClock) -> None:
    async with open_fake_gateway() as gateway:
        ids = [(await create(gateway)).json["id"] for _ in range(5)]
        newest_first = ids[::-1]
        first = (await request(gateway.url, "GET", f"{PATH}?limit=2")).json
        assert [batch["id"] for batch in first["data"]] == newest_first[:2]
        assert (first["has_more"], first["first_id"], first["last_id"]) == (True, *newest_first[:2])
        older = (await request(gateway.url, "GET", f"{PATH}?limit=3&after_id={first['last_id']}")).json
        assert [batch["id"] for batch in older["data"]] == newest_first[2:]
        assert not older["has_more"]
        newer = (await request(gateway.url, "GET", f"{PATH}?limit=2&before_id={newest_first[3]}")).json
        assert [batch["id"] for batch in newer["data"]] == newest_first[1:3]
        assert newer["has_more"]
        for bad in ("limit=0", "limit=1001", f"after_id={ids[0]}&before_id={ids[1]}"):
            assert (await request(gateway.url, "GET", f"{PATH}?{bad}")).status == 400


async def test_async_headers_mean_nothing_here(http_clock: MockClock) -> None:
    async with open_fake_gateway() as gateway:
        assert (await create(gateway, x_bf_async="true")).status == 400
        assert (await create(gateway, x_bf_async_id="x")).status == 404
        batch_id = (await create(gateway)).json["id"]
        assert (await request(gateway.url, "GET", f"{PATH}/{batch_id}", {"x-bf-async": "true"})).status == 400


async def test_cancelling_has_two_phases(http_clock: MockClock) -> None:
    fake = FakeProvider(stall_at="mid_stream")
    async with open_fake_gateway(fake, batches={"max_running_per_batch": 1}) as gateway:
        batch_id = (await create(gateway, one("a"), one("b"))).json["id"]
        await fake.until_called(1)
        waiting = (await request(gateway.url, "GET", "/v1/jobs?status=pending")).json["data"][0]["id"]
        assert (await request(gateway.url, "GET", f"/v1/jobs/{waiting}/stream")).status == 409
        canceling = (await request(gateway.url, "POST", f"{PATH}/{batch_id}/cancel")).json
        assert canceling["processing_status"] == "canceling"
        assert canceling["cancel_initiated_at"] is not None
        done = await ended(gateway, batch_id)
        assert done["request_counts"]["canceled"] == 2
        again = (await request(gateway.url, "POST", f"{PATH}/{batch_id}/cancel")).json
        assert again == done
        assert [line["result"] for line in await results(gateway, batch_id)] == [{"type": "canceled"}] * 2


@pytest.mark.parametrize("end", ["completed", "cancelled", "pending"])
async def test_a_poll_may_wait_for_an_item_that_waits(end: str, http_clock: MockClock) -> None:
    fake = FakeProvider(stall_at="mid_stream")
    async with open_fake_gateway(fake, batches={"max_running_per_batch": 1}) as gateway:
        batch_id = (await create(gateway, one("a"), one("b"))).json["id"]
        await fake.until_called(1)
        (waiting,) = (await request(gateway.url, "GET", "/v1/jobs?status=pending")).json["data"]
        asked_at, answers = trio.current_time(), list[Answer]()

        async def poll() -> None:
            headers = {"x-bf-async-id": waiting["id"], "prefer": "wait=30"}
            answers.append(await request(gateway.url, "POST", "/v1/messages", headers))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(poll)
            await trio.sleep(5)
            assert not answers
            if end == "completed":
                fake.release.set()
            elif end == "cancelled":
                await request(gateway.url, "POST", f"{PATH}/{batch_id}/cancel")
        assert answers[0].headers["x-bf-async-status"] == end
        assert answers[0].status == (409 if end == "cancelled" else 200)
        assert (trio.current_time() - asked_at >= 30) is (end == "pending")
        fake.release.set()


async def test_a_waiting_item_is_cancelled_as_any_job(http_clock: MockClock) -> None:
    fake = FakeProvider(stall_at="mid_stream")
    async with open_fake_gateway(fake, batches={"max_running_per_batch": 1}) as gateway:
        batch_id = (await create(gateway, one("a"), one("b"))).json["id"]
        await fake.until_called(1)
        waiting = (await request(gateway.url, "GET", "/v1/jobs?status=pending")).json["data"][0]["id"]
        job = (await request(gateway.url, "POST", f"/v1/jobs/{waiting}/cancel")).json
        assert job["status"] == "cancelled"
        fake.release.set()
        counts = (await ended(gateway, batch_id))["request_counts"]
        assert (counts["succeeded"], counts["canceled"]) == (1, 1)


async def read_on(call: Call) -> None:
    while await call.chunk():
        pass


# --- uploads ---------------------------------------------------------------------------------------


def head(length: int, key: str = "any") -> bytes:
    return (
        f"POST {PATH} HTTP/1.1\r\nhost: x\r\nx-api-key: {key}\r\n"
        f"content-type: application/json\r\ncontent-length: {length}\r\n\r\n"
    ).encode()


async def test_an_upload_that_takes_too_long_is_told_so(http_clock: MockClock) -> None:
    async with (
        open_fake_gateway(batches={"upload_timeout_s": 20}) as gateway,
        connect(gateway.url) as call,
    ):
        await call.stream.send_all(head(1000) + b'{"requests": [')
        with trio.fail_after(60):
            answer = await call.stream.receive_some(65536)
        assert b" 408 " in answer
        assert (await request(gateway.url, "GET", PATH)).json["data"] == []


async def test_a_client_that_leaves_in_the_middle_leaves_no_batch(http_clock: MockClock) -> None:
    async with open_fake_gateway() as gateway:
        item = orjson.dumps(one("a"))
        async with connect(gateway.url) as call:
            await call.stream.send_all(head(100_000) + b'{"requests": [' + item)
            await trio.sleep(1)
        await trio.sleep(2)
        assert (await request(gateway.url, "GET", PATH)).json["data"] == []
        assert (await request(gateway.url, "GET", "/v1/jobs")).json["data"] == []


@pytest.mark.parametrize("why", ["key", "length", "json"])
async def test_a_refused_upload_can_be_sent_to_its_end_and_the_reason_read(
    http_clock: MockClock, why: str
) -> None:
    size = 3 << 20
    async with (
        open_fake_gateway(
            keys=KEYS, batches={"max_body_bytes": 1 << 20 if why == "length" else 9 << 20}
        ) as gateway,
        connect(gateway.url) as call,
    ):
        await call.stream.send_all(head(size, "wrong" if why == "key" else "sk-bf-ann"))
        with trio.fail_after(30):
            await call.stream.send_all(b"[" * size)
            answer = await call.stream.receive_some(65536)
        status = {"key": b" 401 ", "length": b" 413 ", "json": b" 400 "}[why]
        assert status in answer


async def test_a_slow_upload_does_not_hold_others_up(http_clock: MockClock) -> None:
    async with open_fake_gateway() as gateway, connect(gateway.url) as call:
        body = orjson.dumps({"requests": [one("a"), one("b")]})
        await call.stream.send_all(head(len(body)))
        for start_at in range(0, len(body), 50):
            await call.stream.send_all(body[start_at : start_at + 50])
            await trio.sleep(1)
        assert (await create(gateway, one("c"))).status == 200
        answer = b""
        with trio.fail_after(30):
            while b"msgbatch_" not in answer:
                answer += await call.stream.receive_some(65536)
        assert b" 200 " in answer


async def test_results_of_a_batch_that_is_deleted_meanwhile_break_off(http_clock: MockClock) -> None:
    async with open_fake_gateway(FakeProvider(deltas=1, pad_bytes=20_000)) as gateway:
        made = [one(str(number)) for number in range(300)]
        batch_id = (await create(gateway, *made)).json["id"]
        await ended(gateway, batch_id)
        async with start(gateway.url, "GET", f"{PATH}/{batch_id}/results", {}) as call:
            await call.head()
            await request(gateway.url, "DELETE", f"{PATH}/{batch_id}")
            with pytest.raises(h11.RemoteProtocolError, match="incomplete"), trio.fail_after(30):
                await read_on(call)
