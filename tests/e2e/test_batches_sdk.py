"""``client.messages.batches`` of the official SDK against the whole daemon, the beta namespace included."""

from collections.abc import AsyncIterator
from typing import Any

import anthropic
import pytest
import trio
from anthropic import AsyncAnthropic

from service.main import Gateway
from tests.e2e.daemon import running

TEST_TIMEOUT_S = 30
PROVIDERS: list[dict[str, object]] = [
    {"name": "echo", "kind": "echo"},
    {"name": "slow", "kind": "echo", "first_frame_delay_s": 30},
    {"name": "broke", "kind": "echo", "fail_status": 402},
]


@pytest.fixture
async def gateway(tmp_path: Any) -> AsyncIterator[Gateway]:
    with trio.fail_after(TEST_TIMEOUT_S):
        log = {"url": f"sqlite:///{tmp_path}/events.db"}
        async with running(providers=PROVIDERS, jobs={"drain_s": 0}, log=log) as gateway:
            yield gateway


@pytest.fixture(params=["", "/anthropic"])
async def client(request: pytest.FixtureRequest, gateway: Gateway) -> AsyncIterator[AsyncAnthropic]:
    base_url = gateway.url + request.param
    async with AsyncAnthropic(base_url=base_url, api_key="any", max_retries=0) as client:
        yield client


def asking(custom_id: str, model: str = "echo", **more: object) -> Any:
    message = {"role": "user", "content": f"hello {custom_id}"}
    return {"custom_id": custom_id, "params": {"model": model, "max_tokens": 9, "messages": [message]} | more}


async def ended(batches: Any, batch_id: str) -> Any:
    while (batch := await batches.retrieve(batch_id)).processing_status != "ended":  # noqa: ASYNC110 - as clients do
        await trio.sleep(0.02)
    return batch


@pytest.mark.parametrize("namespace", ["messages", "beta"])
async def test_a_batch_from_create_to_delete(client: AsyncAnthropic, namespace: str) -> None:
    batches: Any = client.messages.batches if namespace == "messages" else client.beta.messages.batches
    made = await batches.create(
        requests=[asking("one"), asking("two", messages=[]), asking("three", "broke/echo")]
    )
    assert made.request_counts.processing + made.request_counts.errored == 3
    assert (made.expires_at - made.created_at).total_seconds() == 86_400
    batch = await ended(batches, made.id)
    counts = batch.request_counts
    assert (counts.succeeded, counts.errored, counts.processing) == (1, 2, 0)
    results = {one.custom_id: one.result async for one in await batches.results(made.id)}
    assert results["one"].type == "succeeded"
    assert results["one"].message.content[0].text
    assert results["two"].error.error.type == "invalid_request_error"
    assert results["three"].error.error.type == "billing_error"
    assert [one.id async for one in batches.list(limit=1)] == [made.id]
    assert (await batches.cancel(made.id)).processing_status == "ended"
    assert (await batches.delete(made.id)).type == "message_batch_deleted"
    with pytest.raises(anthropic.NotFoundError):
        await batches.retrieve(made.id)


async def test_a_batch_cancelled_in_the_middle(client: AsyncAnthropic) -> None:
    batches = client.messages.batches
    made = await batches.create(requests=[asking(str(number), "slow/echo") for number in range(20)])
    with pytest.raises(anthropic.AnthropicError, match="results_url"):
        await batches.results(made.id)
    with pytest.raises(anthropic.ConflictError):
        await batches.delete(made.id)
    assert (await batches.cancel(made.id)).processing_status in ("canceling", "ended")
    batch = await ended(batches, made.id)
    assert batch.request_counts.canceled == 20
    assert batch.cancel_initiated_at is not None
    types = [one.result.type async for one in await batches.results(made.id)]
    assert types == ["canceled"] * 20


async def test_lists_are_walked_in_both_directions(client: AsyncAnthropic) -> None:
    batches = client.messages.batches
    ids = [(await batches.create(requests=[asking("one")])).id for _ in range(5)]
    assert [one.id async for one in batches.list(limit=2)] == ids[::-1]
    before = [one.id async for one in batches.list(limit=2, before_id=ids[0])]
    assert sorted(before) == sorted(ids[1:])
