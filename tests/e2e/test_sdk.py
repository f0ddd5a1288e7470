"""The official Python SDK against the whole daemon, over real sockets."""

from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

import anthropic
import pytest
import trio
from anthropic import Anthropic, AsyncAnthropic
from anthropic.types import MessageParam

from actors.providers.options import EchoOptions
from service.main import Gateway
from tests.e2e.daemon import running

TEXT = "the quick brown fox"
MODEL = "claude-anything"
WORDS = 50
HELLO: list[MessageParam] = [{"role": "user", "content": TEXT}]
TEST_TIMEOUT_S = 20
RETRY_AFTER_S = 1.0
"""What an overloaded gateway says when it is full."""

LISTED = ["claude-anything", "claude-other", "claude-third"]
PROVIDERS: list[dict[str, object]] = [
    {"name": "echo", "kind": "echo", "models": LISTED},
    {"name": "slow", "kind": "echo", "first_frame_delay_s": 30},
    {"name": "soon", "kind": "echo", "first_frame_delay_s": 0.2},
    {"name": "breaks", "kind": "echo", "fail_after_frames": 2},
    {"name": "hangs-up", "kind": "echo", "fail_after_frames": 2, "fail_mode": "hangup"},
    *({"name": f"s{status}", "kind": "echo", "fail_status": status} for status in range(400, 530)),
]


@pytest.fixture
async def gateway() -> AsyncIterator[Gateway]:
    with trio.fail_after(TEST_TIMEOUT_S):
        async with running(providers=PROVIDERS, jobs={"drain_s": 0}) as gateway:
            yield gateway


@pytest.fixture(params=["", "/anthropic", "/anthropic/"])
def base_path(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def client(gateway: Gateway) -> AsyncIterator[AsyncAnthropic]:
    async with AsyncAnthropic(base_url=gateway.url, api_key="any", max_retries=0) as client:
        yield client


def text_of(message: Any) -> str:
    return "".join(block.text for block in message.content)


# --- the three modes, with both clients ------------------------------------------------------------


async def test_every_mode(gateway: Gateway, base_path: str) -> None:
    async with AsyncAnthropic(base_url=gateway.url + base_path, api_key="any", max_retries=0) as client:
        create = partial(client.messages.create, model=MODEL, max_tokens=WORDS, messages=HELLO)
        message = await create()
        assert (text_of(message), message.model, message.role) == (TEXT, MODEL, "assistant")
        assert (message.stop_reason, message.usage.output_tokens) == ("end_turn", 4)
        assert message._request_id is not None
        assert message._request_id.startswith("req_")

        async with client.messages.stream(model=MODEL, max_tokens=WORDS, messages=HELLO) as stream:
            assert [piece async for piece in stream.text_stream] == ["the ", "quick ", "brown ", "fox"]
            final = await stream.get_final_message()
        assert (text_of(final), final.usage.output_tokens, final.stop_reason) == (TEXT, 4, "end_turn")

        events = [
            event.type
            async for event in await client.messages.create(
                model=MODEL, max_tokens=WORDS, messages=HELLO, stream=True
            )
        ]
        assert events[:2] == ["message_start", "content_block_start"]
        assert events[-3:] == ["content_block_stop", "message_delta", "message_stop"]

        pending = await create(extra_headers={"x-bf-async": "true"})
        assert (pending.content, pending.stop_reason) == ([], None)
        wait = {"x-bf-async-id": pending.id, "prefer": "wait=5"}
        done = await create(extra_headers=wait)
        assert (text_of(done), done.stop_reason) == (TEXT, "end_turn")
        assert done.id != pending.id
        assert (await client.messages.count_tokens(model=MODEL, messages=HELLO)).input_tokens == 4


def use_sync_client(url: str) -> None:
    with Anthropic(base_url=url, api_key="any", max_retries=0) as client:
        create = partial(client.messages.create, model=MODEL, max_tokens=WORDS, messages=HELLO)
        assert text_of(create()) == TEXT
        with client.messages.stream(model=MODEL, max_tokens=WORDS, messages=HELLO) as stream:
            assert "".join(stream.text_stream) == TEXT
            assert text_of(stream.get_final_message()) == TEXT
        raw = client.messages.with_raw_response.create(
            model=MODEL, max_tokens=WORDS, messages=HELLO, extra_headers={"x-bf-async": "true"}
        )
        assert raw.headers["x-bf-async-id"] == raw.parse().id
        assert text_of(create(extra_headers={"x-bf-async-id": raw.parse().id, "prefer": "wait=5"})) == TEXT
        with pytest.raises(anthropic.NotFoundError):
            create(extra_headers={"x-bf-async-id": "unknown"})


async def test_the_sync_client(gateway: Gateway, base_path: str) -> None:
    await trio.to_thread.run_sync(use_sync_client, gateway.url + base_path)


async def test_a_job_from_pending_to_expired(gateway: Gateway, client: AsyncAnthropic) -> None:
    create = client.messages.with_raw_response.create
    raw = await create(
        model="soon/x",
        max_tokens=WORDS,
        messages=HELLO,
        extra_headers={"x-bf-async": "true", "x-bf-async-job-result-ttl": "1"},
    )
    job_id = raw.headers["x-bf-async-id"]
    assert raw.headers["x-bf-async-status"] == "pending"
    # A poll needs no body; the SDK insists on one.
    poll = partial(
        create, model="not read", max_tokens=1, messages=[], extra_headers={"x-bf-async-id": job_id}
    )
    under_way = await poll()
    assert under_way.headers["x-bf-async-status"] in ("pending", "processing")
    assert under_way.headers["retry-after"] == "1"
    actor = gateway.supervisor.actor(job_id, None)
    assert actor is not None
    await actor.ended.wait()
    done = await poll()
    assert done.headers["x-bf-async-status"] == "completed"
    assert text_of(await done.parse()) == TEXT
    await trio.sleep(1.1)
    with pytest.raises(anthropic.NotFoundError) as caught:
        await poll()
    assert caught.value.response.headers["request-id"] == caught.value.request_id


async def test_a_job_can_be_listed_watched_and_deleted_by_the_generic_calls(client: AsyncAnthropic) -> None:
    create = partial(client.messages.create, model=MODEL, max_tokens=WORDS, messages=HELLO)
    job_id = (await create(extra_headers={"x-bf-async": "true"})).id
    await create(extra_headers={"x-bf-async-id": job_id, "prefer": "wait=5"})
    job = await client.get(f"/v1/jobs/{job_id}", cast_to=object)
    assert isinstance(job, dict)
    assert (job["id"], job["status"]) == (job_id, "completed")
    deleted = await client.delete(f"/v1/jobs/{job_id}", cast_to=object)
    assert deleted == {"id": job_id, "type": "job_deleted"}
    with pytest.raises(anthropic.NotFoundError):
        await client.get(f"/v1/jobs/{job_id}", cast_to=object)


# --- the other resources ---------------------------------------------------------------------------


async def test_models(client: AsyncAnthropic) -> None:
    listed = [model.id async for model in client.models.list(limit=2)]
    assert {*LISTED, *(f"echo/{name}" for name in LISTED)} <= set(listed)
    assert len(listed) == len(set(listed)) > 3
    model = await client.models.retrieve(listed[1])
    assert (model.id, model.type) == (listed[1], "model")
    with pytest.raises(anthropic.NotFoundError):
        await client.models.retrieve("no-such-model")


async def test_the_beta_namespace(client: AsyncAnthropic) -> None:
    message = await client.beta.messages.create(
        model=MODEL,
        max_tokens=WORDS,
        messages=[{"role": "user", "content": TEXT}],
        betas=["interleaved-thinking-2025-05-14", "not-known-2099-01-01"],
    )
    assert text_of(message) == TEXT
    counted = await client.beta.messages.count_tokens(
        model=MODEL, messages=[{"role": "user", "content": TEXT}], betas=["x"]
    )
    assert counted.input_tokens == 4
    async with client.beta.messages.stream(
        model=MODEL, max_tokens=WORDS, messages=[{"role": "user", "content": TEXT}], betas=["x"]
    ) as stream:
        assert await stream.get_final_text() == TEXT


async def test_fields_that_no_strict_validator_would_pass(client: AsyncAnthropic, gateway: Gateway) -> None:
    tool = {
        "name": "get weather!",
        "description": "",
        "input_schema": {"type": "object", "properties": {"x": {"$ref": "#/nowhere"}}, "required": 7},
        "cache_control": {"type": "ephemeral", "ttl": "1h"},
        "eager_input_streaming": True,
    }
    odd: dict[str, Any] = {
        "tools": [tool, {"type": "web_search_20990101", "name": "web_search", "max_uses": None}],
        "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
        "system": [{"type": "text", "text": "be brief", "cache_control": {"type": "ephemeral"}}],
        "thinking": {"type": "enabled", "budget_tokens": 1024},
        "metadata": {"user_id": "u", "more": [1, 2.5, None]},
        "stop_sequences": [],
        "service_tier": "auto",
        "temperature": 2,
        "context_management": {"edits": [{"type": "clear_tool_uses_20990101"}]},
        "a_field_of_next_year": {"nested": {"deep": [[[]]]}},
    }
    blocks = [
        {"type": "text", "text": TEXT, "citations": None},
        {"type": "image", "source": {"type": "url", "url": "https://example.com/x.png"}},
        {
            "type": "tool_result",
            "tool_use_id": "t",
            "content": [{"type": "tool_reference", "tool_name": "x"}],
        },
        {"type": "block_of_next_year", "payload": {"a": 1}},
    ]
    messages: Any = [
        {"role": "user", "content": "before"},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "x", "input": {}}]},
        {"role": "system", "content": "in the middle"},
        {"role": "user", "content": blocks, "unknown": True},
    ]
    raw = await client.messages.with_raw_response.create(
        model=MODEL, max_tokens=WORDS, messages=messages, extra_body=odd
    )
    assert text_of(await raw.parse()) == TEXT
    async with client.messages.stream(
        model=MODEL, max_tokens=WORDS, messages=messages, extra_body=odd
    ) as stream:
        assert await stream.get_final_text() == TEXT
    counted = await client.messages.count_tokens(model=MODEL, messages=messages, extra_body=odd)
    assert counted.input_tokens > 4


# --- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "error_class", "error_type"),
    [
        (400, anthropic.BadRequestError, "invalid_request_error"),
        (401, anthropic.AuthenticationError, "authentication_error"),
        (402, anthropic.APIStatusError, "billing_error"),
        (403, anthropic.PermissionDeniedError, "permission_error"),
        (404, anthropic.NotFoundError, "not_found_error"),
        (409, anthropic.ConflictError, "conflict_error"),
        (413, anthropic.APIStatusError, "request_too_large"),
        (422, anthropic.UnprocessableEntityError, "invalid_request_error"),
        (429, anthropic.RateLimitError, "rate_limit_error"),
        (500, anthropic.InternalServerError, "api_error"),
        (504, anthropic.InternalServerError, "timeout_error"),
        (529, anthropic.InternalServerError, "overloaded_error"),
    ],
)
async def test_an_upstream_error_becomes_the_right_exception(
    client: AsyncAnthropic, status: int, error_class: type[anthropic.APIStatusError], error_type: str
) -> None:
    create = partial(client.messages.create, model=f"s{status}/x", max_tokens=WORDS, messages=HELLO)
    for stream in (False, True):
        with pytest.raises(error_class) as caught:
            await create(stream=stream)
        error = caught.value
        assert (error.status_code, error.type) == (status, error_type)
        assert isinstance(error.body, dict)
        assert error.body["request_id"] == error.request_id
    pending = await create(extra_headers={"x-bf-async": "true"})
    with pytest.raises(error_class) as caught:
        await create(extra_headers={"x-bf-async-id": pending.id, "prefer": "wait=5"})
    # The poll's own answer is what the job's was: asking again would not change it.
    assert caught.value.response.headers["x-should-retry"] == "false"
    assert caught.value.type == error_type


async def test_our_own_errors(client: AsyncAnthropic) -> None:
    create = partial(client.messages.create, model=MODEL, max_tokens=WORDS, messages=HELLO)
    with pytest.raises(anthropic.BadRequestError, match="messages"):
        await create(messages=[])
    with pytest.raises(anthropic.BadRequestError, match="x-bf-async"):
        await create(extra_headers={"x-bf-async": "maybe"})
    with pytest.raises(anthropic.BadRequestError, match="stream"):
        await create(stream=True, extra_headers={"x-bf-async": "true"})
    with pytest.raises(anthropic.NotFoundError):
        await create(extra_headers={"x-bf-async-id": "x"})
    pending = await create(model="slow/x", extra_headers={"x-bf-async": "true"})
    with pytest.raises(anthropic.ConflictError):
        await client.delete(f"/v1/jobs/{pending.id}", cast_to=object)
    cancelled = await client.post(f"/v1/jobs/{pending.id}/cancel", cast_to=object)
    assert isinstance(cancelled, dict)
    assert cancelled["status"] == "cancelled"
    with pytest.raises(anthropic.ConflictError, match="cancelled"):
        await create(extra_headers={"x-bf-async-id": pending.id})


@pytest.mark.parametrize("provider", ["breaks", "hangs-up"])
async def test_a_stream_that_breaks_in_the_middle(client: AsyncAnthropic, provider: str) -> None:
    seen: list[str] = []

    async def read() -> None:
        async with client.messages.stream(model=f"{provider}/x", max_tokens=WORDS, messages=HELLO) as stream:
            async for piece in stream.text_stream:
                seen.append(piece)  # noqa: PERF401 - what came before the error is to be kept

    with pytest.raises(anthropic.APIStatusError) as caught:
        await read()
    assert seen == ["the ", "quick "]
    assert caught.value.type == ("overloaded_error" if provider == "breaks" else "api_error")


# --- what the SDK does by itself -------------------------------------------------------------------


async def count_calls(gateway: Gateway, act: Callable[[AsyncAnthropic], Any], *, max_retries: int = 2) -> int:
    """How many requests it takes the SDK until ``act`` fails."""
    calls = 0
    async with AsyncAnthropic(base_url=gateway.url, api_key="any", max_retries=max_retries) as client:

        async def count(_request: Any) -> None:
            nonlocal calls
            calls += 1

        client._client.event_hooks["request"].append(count)
        with pytest.raises(anthropic.APIStatusError):
            await act(client)
    return calls


async def test_what_is_tried_again_and_what_is_not(gateway: Gateway) -> None:
    def ask(model: str, **headers: str) -> Callable[[AsyncAnthropic], Any]:
        return lambda client: client.messages.create(
            model=model, max_tokens=WORDS, messages=HELLO, extra_headers=headers
        )

    assert await count_calls(gateway, ask("s400/x")) == 1
    assert await count_calls(gateway, ask("s529/x"), max_retries=1) == 2
    async with AsyncAnthropic(base_url=gateway.url, api_key="any") as client:
        jobs = [
            await client.messages.create(
                model=model, max_tokens=WORDS, messages=HELLO, extra_headers={"x-bf-async": "true"}
            )
            for model in ("s529/x", "slow/x")
        ]
        await client.post(f"/v1/jobs/{jobs[1].id}/cancel", cast_to=object)
    for job in jobs:
        poll = {"x-bf-async-id": job.id, "prefer": "wait=5"}
        assert await count_calls(gateway, ask("x", **poll)) == 1


async def test_a_full_gateway_is_tried_again_when_it_says() -> None:
    providers = [EchoOptions(name="echo", first_frame_delay_s=0.5).model_dump()]
    with trio.fail_after(TEST_TIMEOUT_S):
        async with (
            running(providers=providers, jobs={"max_in_flight": 1}) as gateway,
            AsyncAnthropic(base_url=gateway.url, api_key="any") as patient,
            trio.open_nursery() as nursery,
        ):
            create = partial(patient.messages.create, model=MODEL, max_tokens=WORDS, messages=HELLO)
            nursery.start_soon(create)
            while not gateway.supervisor.in_flight:  # noqa: ASYNC110 - the gateway has no such event
                await trio.sleep(0.01)
            impatient = patient.with_options(max_retries=0)
            with pytest.raises(anthropic.InternalServerError) as caught:
                await impatient.messages.create(model=MODEL, max_tokens=WORDS, messages=HELLO)
            assert (caught.value.status_code, caught.value.type) == (529, "overloaded_error")
            assert caught.value.response.headers["retry-after"] == f"{RETRY_AFTER_S:g}"
            started = trio.current_time()
            assert text_of(await create()) == TEXT
            # Its own first wait would have been half as long at most.
            assert trio.current_time() - started >= RETRY_AFTER_S
