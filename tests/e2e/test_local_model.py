"""A real model, from the client's socket to llama.cpp and back."""

from collections.abc import AsyncIterator
from typing import Any

import orjson
import pytest
import trio

from actors.providers.local import default_weights, local_available
from service.main import Gateway
from tests.e2e.daemon import running
from tests.e2e.wire import Answer, ask, connect, post, request

REASON = local_available()
MODEL = "claude-by-any-name"
ASK = {
    "model": MODEL,
    "max_tokens": 40,
    "temperature": 0,
    "messages": [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}],
}
TEST_TIMEOUT_S = 55

pytestmark = [
    pytest.mark.local_model,
    pytest.mark.skipif(REASON is not None, reason=REASON or ""),
]


@pytest.fixture
async def gateway() -> AsyncIterator[Gateway]:
    provider = {"name": "local", "kind": "local", "n_ctx": 512, "n_parallel": 2}
    with trio.fail_after(TEST_TIMEOUT_S):
        async with running(providers=[provider]) as gateway:
            yield gateway


def shown(answer: Answer) -> bytes:
    return b"\n".join(f"{name}: {value}".encode() for name, value in answer.headers) + answer.body


def check_message(message: dict[str, Any]) -> None:
    assert "Paris" in "".join(block["text"] for block in message["content"])
    assert (message["type"], message["role"], message["model"]) == ("message", "assistant", MODEL)
    assert message["id"].startswith("msg_")
    assert message["stop_reason"] in ("end_turn", "max_tokens")
    # A prompt the model has just read is counted as the Messages API counts a cached one.
    usage = message["usage"]
    assert usage["input_tokens"] + usage.get("cache_read_input_tokens", 0) > 5
    assert usage["output_tokens"] > 3


async def test_plain_stream_and_async_know_the_capital_of_france(gateway: Gateway) -> None:
    answers = [await ask(gateway.url, post(ASK))]
    check_message(answers[0].json())

    answers.append(await ask(gateway.url, post({**ASK, "stream": True})))
    frames = [frame.split(b"\ndata: ") for frame in answers[1].body.split(b"\n\n") if frame]
    names = [name.removeprefix(b"event: ").decode() for name, _ in frames if name != b"event: ping"]
    events = [orjson.loads(data) for name, data in frames if name != b"event: ping"]
    assert [event["type"] for event in events] == names
    assert (names[0], names[-2:]) == ("message_start", ["message_delta", "message_stop"])
    assert events[0]["message"]["model"] == MODEL
    deltas = [event["delta"]["text"] for event in events if event["type"] == "content_block_delta"]
    assert len(deltas) > 1
    assert "Paris" in "".join(deltas)

    async with connect(gateway.url) as wire:
        answers.append(await wire.ask(post(ASK, ("x-bf-async", "true"))))
        pending = answers[-1].json()
        assert (pending["model"], pending["content"]) == (MODEL, [])
        poll = post(b"", ("x-bf-async-id", pending["id"]), ("prefer", "wait=40"))
        answers.append(await wire.ask(poll))
        check_message(answers[-1].json())
        for what in ("", "/events", "/stream"):
            job = request("GET", f"/v1/jobs/{pending['id']}{what}")
            answers.append(await wire.ask(job, method="GET"))
        answers.append(await wire.ask(post(ASK, target="/v1/messages/count_tokens")))
        assert answers[-1].json()["input_tokens"] > 5
        answers.append(await wire.ask(request("GET", "/v1/models"), method="GET"))
        answers.append(await wire.ask(post({**ASK, "messages": [{"role": "user", "content": "x " * 900}]})))
        assert answers[-1].status == 400

    weights = default_weights()
    assert weights is not None
    for answer in answers:
        assert weights.name.encode() not in shown(answer)
        assert str(weights.parent).encode() not in shown(answer)
        assert b".gguf" not in shown(answer)
