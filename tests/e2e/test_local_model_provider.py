"""The local provider against llama.cpp and the small model it ships with, for real."""

import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import orjson
import pytest
import trio

from actors.errors import ProviderError, UpstreamStatusError
from actors.providers.base import Provider, ProviderCall
from actors.providers.local import Engine, LocalProvider, default_weights, local_available
from actors.providers.openai.provider import OpenaiProvider
from actors.providers.options import LocalOptions, OpenaiOptions
from actors.providers.registry import open_providers
from actors.timers import Timers
from tests.contracts.test_provider import ProviderContract, call, fold, frames_of

REASON = local_available()
needs_model = pytest.mark.skipif(REASON is not None, reason=REASON or "")


QUESTION = {"role": "user", "content": "What is the capital of France? Answer in one sentence."}
CONVERSATIONS: list[dict[str, Any]] = [
    {"messages": [QUESTION]},
    {"messages": [QUESTION], "max_tokens": 3},
    {
        "system": [{"type": "text", "text": "Be brief."}, {"type": "text", "text": "Be kind."}],
        "messages": [
            {
                "role": "user",
                "content": [{"type": "text", "text": "Hello."}, {"type": "text", "text": "Hi."}],
            },
            {
                "role": "assistant",
                "content": [{"type": "text", "text": "Hi."}, {"type": "text", "text": "Yes?"}],
            },
            {"role": "user", "content": "What is one and one?"},
        ],
    },
]


def options(**more: Any) -> LocalOptions:
    return LocalOptions.model_validate({"name": "p", "n_ctx": 512, "n_parallel": 2} | more)


@pytest.mark.local_model
@needs_model
class TestLocal(ProviderContract):
    # llama.cpp reuses a prompt it has seen, and then counts input tokens otherwise.
    deterministic = False

    @pytest.fixture
    async def provider(self, timers: Timers) -> AsyncIterator[Provider]:
        provider = LocalProvider(options(), timers=timers)
        yield provider
        await provider.aclose()

    async def test_it_knows_the_capital_of_france(self, provider: Provider) -> None:
        question = call("What is the capital of France? Answer in one sentence.")
        completion = await provider.complete(question)
        assert "Paris" in orjson.loads(completion.body)["content"][0]["text"]
        assert "Paris" in fold(await frames_of(provider, question)).message()["content"][0]["text"]

    async def test_nothing_shows_where_the_weights_are(self, provider: Provider) -> None:
        shown = (await provider.complete(call())).body
        for frame in await frames_of(provider, call()):
            shown += frame.wire
        path = default_weights()
        assert path is not None
        assert path.name.encode() not in shown
        assert str(path.parent).encode() not in shown
        assert b"chatcmpl" not in shown

    async def test_a_prompt_beyond_the_context_is_the_clients_error(self, provider: Provider) -> None:
        long = call("word " * 2000)
        with pytest.raises(UpstreamStatusError, match="exceeds the available context size") as plain:
            await provider.complete(long)
        assert (plain.value.status, plain.value.error_type) == (400, "invalid_request_error")
        with pytest.raises(UpstreamStatusError, match="exceeds the available context size"):
            await frames_of(provider, long)

    async def test_leaving_a_stream_stops_the_model(self, provider: Provider) -> None:
        endless = call("Count from one to a thousand.", max_tokens=400)
        # More than there are slots: each must be free again when its reader has left.
        for _ in range(3):
            async with provider.open_stream(endless) as source:
                assert await source.receive()
        with trio.fail_after(20):
            assert fold(await frames_of(provider, call())).finished

    async def test_both_kinds_of_provider_give_one_message(self, provider: Provider, timers: Timers) -> None:
        assert isinstance(provider, LocalProvider)
        await provider.start()
        engine = provider._engine
        assert engine is not None
        given = {"name": "p", "base_url": f"{engine.base_url}/v1", "api_key": engine.key}
        openai = OpenaiProvider(
            OpenaiOptions.model_validate({**given, "max_idle_connections": 0}), timers=timers, trust_env=False
        )
        for fields in CONVERSATIONS:
            asked = {"model": "local", "max_tokens": 12, "temperature": 0, **fields}
            request = ProviderCall(body=orjson.dumps(asked), fields=asked, model="local")
            counts = [await kind.count_tokens(request) for kind in (provider, openai)]
            assert counts[0] == counts[1]
            messages = []
            for kind in (provider, openai):
                messages.append(orjson.loads((await kind.complete(request)).body))
                messages.append(fold(await frames_of(kind, request)).message())
            for message in messages:
                usage = message["usage"]
                # How much of a prompt was cached depends on the calls before.
                usage["input_tokens"] += usage.pop("cache_read_input_tokens")
                assert usage["input_tokens"] == counts[0].input_tokens
                assert message.pop("id").startswith("msg_")
            assert messages == [messages[0]] * 4
            assert messages[0]["content"][0]["text"]
        await openai.aclose()

    async def test_it_can_be_closed_while_it_answers(self, provider: Provider) -> None:
        assert isinstance(provider, LocalProvider)
        async with provider.open_stream(call(max_tokens=400)) as source:
            assert await source.receive()
            with trio.fail_after(10):
                await provider.aclose()


@pytest.mark.local_model
@needs_model
async def test_an_eager_one_is_loaded_before_it_is_needed() -> None:
    before = threading.active_count()
    async with open_providers([options(start="eager")], timers=Timers()) as providers:
        provider = providers["p"]
        assert isinstance(provider, LocalProvider)
        assert provider._inner is not None
    with pytest.raises(ProviderError):
        await provider.complete(call())
    assert threading.active_count() <= before + 4  # trio keeps a few workers


@pytest.mark.local_model
@needs_model
async def test_a_file_that_is_no_model_is_an_error_and_may_be_tried_again(tmp_path: Path) -> None:
    path = tmp_path / "weights.gguf"
    path.write_bytes(b"GGUF" + b"\0" * 1000)
    provider = LocalProvider(options(model_path=path), timers=Timers())
    for _ in range(2):
        with pytest.raises(ProviderError, match="could not be loaded") as caught:
            await provider.complete(call())
        assert str(path) not in caught.value.message
    await provider.aclose()


class Loads:
    """Stands in for llama.cpp: counts, and lets go when told."""

    def __init__(self, *results: Engine | Exception) -> None:
        self.results = list(results)
        self.count = 0
        self.go = threading.Event()

    def __call__(self, options: LocalOptions) -> Engine:
        self.count += 1
        assert self.go.wait(10)
        result = self.results.pop(0)
        if isinstance(result, Exception):
            raise result
        return result


async def test_calls_at_once_load_once() -> None:
    load = Loads(Engine(object(), "http://127.0.0.1:9", "k"))
    load.go.set()
    provider = LocalProvider(options(), timers=Timers(), load=load)
    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(provider.start)
    assert load.count == 1
    await provider.aclose()


async def test_a_cancelled_start_is_not_lost() -> None:
    load = Loads(Engine(object(), "http://127.0.0.1:9", "k"))
    provider = LocalProvider(options(), timers=Timers(), load=load)
    with trio.fail_after(0.5), trio.move_on_after(0.05) as scope:
        await provider.start()
    assert scope.cancelled_caught
    load.go.set()
    await provider.start()
    assert load.count == 1
    await provider.aclose()


async def test_a_failed_start_is_tried_again() -> None:
    load = Loads(RuntimeError("/secret/path"), Engine(object(), "http://127.0.0.1:9", "k"))
    load.go.set()
    provider = LocalProvider(options(), timers=Timers(), load=load)
    with pytest.raises(ProviderError) as caught:
        await provider.start()
    assert "/secret/path" not in caught.value.message
    await provider.start()
    await provider.aclose()


async def test_a_stopped_one_does_not_start() -> None:
    load = Loads()
    provider = LocalProvider(options(), timers=Timers(), load=load)
    await provider.aclose()
    with pytest.raises(ProviderError, match="stopped"):
        await provider.start()
    assert load.count == 0
