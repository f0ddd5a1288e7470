"""The official SDK's tool loops and structured output, over a Chat Completions upstream."""

from collections.abc import AsyncIterator
from typing import Any

import anthropic
import orjson
import pytest
import trio
from anthropic import AsyncAnthropic
from anthropic.types import Message, MessageParam, ToolParam

from service.main import Gateway
from tests.e2e.daemon import running
from tests.fake_openai import DONE, call_piece, chunk, completion, tool_call, usage_chunk
from tests.fake_upstream import LAST_CHUNK, STREAM_HEAD, Exchange, FakeUpstream, answer, open_upstream

MODEL = "gpt-anything"
TEST_TIMEOUT_S = 20
TOOLS: list[ToolParam] = [
    {"name": "weather", "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}}},
    {"name": "clock", "description": "The time", "input_schema": {"type": "object"}},
]
QUESTION: MessageParam = {"role": "user", "content": "Weather in Paris, and what time is it?"}
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}


@pytest.fixture
async def upstream() -> AsyncIterator[FakeUpstream]:
    async with open_upstream(_speak) as upstream:
        yield upstream


@pytest.fixture
async def gateway(upstream: FakeUpstream) -> AsyncIterator[Gateway]:
    provider = {"name": "openai", "kind": "openai", "base_url": f"{upstream.url}/v1", "api_key": "sk-up"}
    with trio.fail_after(TEST_TIMEOUT_S):
        async with running(providers=[provider], jobs={"drain_s": 0}) as gateway:
            yield gateway


@pytest.fixture
async def client(gateway: Gateway) -> AsyncIterator[AsyncAnthropic]:
    async with AsyncAnthropic(base_url=gateway.url, api_key="any", max_retries=0) as client:
        yield client


def _check_conversation(messages: list[dict[str, Any]]) -> None:
    """What OpenAI answers with 400: calls without results, results without calls, anything in between."""
    open_calls: list[str] = []
    for message in messages:
        if message["role"] == "tool":
            open_calls.remove(message["tool_call_id"])
        else:
            assert not open_calls, messages
            open_calls = [call["id"] for call in message.get("tool_calls") or ()]
    assert not open_calls


async def _speak(exchange: Exchange) -> None:
    """Calls both tools at once, then says what they gave; JSON where a schema is asked for."""
    if exchange.request.path != "/v1/chat/completions":
        await exchange.send(answer(404, b"{}"))
        return
    asked = orjson.loads(exchange.request.body)
    _check_conversation(asked["messages"])
    results = [m["content"] for m in asked["messages"] if m["role"] == "tool"]
    if asked["messages"][-1]["content"] == "break off":
        await exchange.send(STREAM_HEAD)
        await exchange.send_chunk(chunk({"content": "I was about"}))
        await exchange.send(LAST_CHUNK)
        return
    message: dict[str, Any]
    deltas: list[dict[str, Any]]
    if "response_format" in asked:
        message, deltas = {"content": '{"city":"Paris"}'}, [{"content": '{"city":'}, {"content": '"Paris"}'}]
    elif results:
        message = {"content": " and ".join(results)}
        deltas = [message]
    else:
        calls = [tool_call("call_1", "weather", '{"city":"Paris"}'), tool_call("call_2", "clock", "")]
        message = {"content": "Let me see.", "tool_calls": calls}
        deltas = [
            {"role": "assistant", "content": "Let me "},
            {"content": "see."},
            call_piece(0, "", "call_1", "weather"),
            call_piece(1, "", "call_2", "clock"),
            call_piece(0, '{"city":'),
            call_piece(0, '"Paris"}'),
        ]
    if not asked["stream"]:
        await exchange.send(answer(200, orjson.dumps(completion(message))))
        return
    assert asked["stream_options"] == {"include_usage": True}
    await exchange.send(STREAM_HEAD)
    for piece in (*map(chunk, deltas), chunk(finish="stop"), usage_chunk(), DONE):
        await exchange.send_chunk(piece)
    await exchange.send(LAST_CHUNK)


async def ask(client: AsyncAnthropic, mode: str, **fields: Any) -> Message:
    """The Message, over each way of watching."""
    asked = {"model": MODEL, "max_tokens": 99, **fields}
    if mode == "stream":
        async with client.messages.stream(**asked) as stream:
            return await stream.get_final_message()
    if mode == "plain":
        message: Message = await client.messages.create(**asked)
        return message
    pending = await client.messages.create(**asked, extra_headers={"x-bf-async": "true"})
    done: Message = await client.messages.create(
        **asked, extra_headers={"x-bf-async-id": pending.id, "prefer": "wait=9"}
    )
    return done


@pytest.mark.parametrize("mode", ["plain", "stream", "async"])
async def test_a_tool_loop(client: AsyncAnthropic, upstream: FakeUpstream, mode: str) -> None:
    choice = {"type": "any", "disable_parallel_tool_use": False}
    first = await ask(client, mode, messages=[QUESTION], tools=TOOLS, tool_choice=choice)
    assert first.stop_reason == "tool_use"
    assert [block.type for block in first.content] == ["text", "tool_use", "tool_use"]
    weather, clock = (block for block in first.content if block.type == "tool_use")
    assert (weather.name, weather.input) == ("weather", {"city": "Paris"})
    assert (clock.name, clock.input) == ("clock", {})
    usage = first.usage
    assert (usage.input_tokens, usage.cache_read_input_tokens, usage.output_tokens) == (4, 8, 5)
    results: MessageParam = {
        "role": "user",
        "content": [
            {"type": "tool_result", "tool_use_id": weather.id, "content": "sunny"},
            {"type": "tool_result", "tool_use_id": clock.id, "content": "no clock here", "is_error": True},
        ],
    }
    turns = [QUESTION, {"role": "assistant", "content": first.content}, results]
    second = await ask(client, mode, messages=turns, tools=TOOLS)
    assert second.stop_reason == "end_turn"
    assert second.content[0].type == "text"
    assert second.content[0].text == "sunny and Error: no clock here"
    sent = orjson.loads(upstream.requests[0].body)
    assert (sent["tool_choice"], sent["parallel_tool_calls"]) == ("required", True)
    assert upstream.requests[0].headers["authorization"] == "Bearer sk-up"


@pytest.mark.parametrize("mode", ["plain", "stream", "async"])
async def test_structured_output(client: AsyncAnthropic, mode: str) -> None:
    config = {"format": {"type": "json_schema", "schema": SCHEMA}}
    message = await ask(client, mode, messages=[QUESTION], output_config=config)
    assert message.content[0].type == "text"
    assert orjson.loads(message.content[0].text) == {"city": "Paris"}


async def test_an_upstream_that_breaks_off_is_no_clean_end(client: AsyncAnthropic) -> None:
    broken: MessageParam = {"role": "user", "content": "break off"}
    seen: list[str] = []

    async def read() -> None:
        async with client.messages.stream(model=MODEL, max_tokens=9, messages=[broken]) as stream:
            async for piece in stream.text_stream:
                seen.append(piece)  # noqa: PERF401 - what came before the error is to be kept

    with pytest.raises(anthropic.APIStatusError, match="before it had finished") as caught:
        await read()
    assert seen == ["I was about"]
    assert caught.value.type == "api_error"


async def test_what_cannot_be_sent_is_a_400_that_names_it(client: AsyncAnthropic) -> None:
    pdf = {"type": "base64", "media_type": "application/pdf", "data": "aGk="}
    turn: Any = {
        "role": "user",
        "content": [{"type": "text", "text": "a"}, {"type": "document", "source": pdf}],
    }
    for mode in ("plain", "stream"):
        with pytest.raises(anthropic.BadRequestError, match=r"messages\.1\.content\.1\.source: "):
            await ask(client, mode, messages=[QUESTION, turn])
    with pytest.raises(anthropic.BadRequestError, match=r"tools\.0: "):
        await ask(client, "plain", messages=[QUESTION], tools=[{"type": "bash_20250124", "name": "bash"}])


async def test_a_count_that_is_estimated_says_so(client: AsyncAnthropic) -> None:
    raw = await client.messages.with_raw_response.count_tokens(model=MODEL, messages=[QUESTION], tools=TOOLS)
    assert raw.headers["x-bf-token-count"] == "estimated"
    assert (await raw.parse()).input_tokens > 20
