"""What every provider promises, whoever answers. See :mod:`actors.providers.base`."""

from collections.abc import AsyncIterator
from typing import Any, ClassVar

import orjson
import pytest
import trio

from actors.errors import (
    ProviderError,
    UnsupportedError,
    UpstreamConnectionError,
    UpstreamStatusError,
)
from actors.providers.anthropic import AnthropicProvider
from actors.providers.base import ForwardCall, Frame, Provider, ProviderCall
from actors.providers.echo import EchoProvider
from actors.providers.openai.provider import OpenaiProvider
from actors.providers.options import AnthropicOptions, EchoOptions, OpenaiOptions, ProviderOptions
from actors.providers.registry import open_providers
from actors.timers import Timers
from events.message import MessageFold
from tests import fake_openai
from tests.fake_upstream import (
    LAST_CHUNK,
    STREAM_HEAD,
    Exchange,
    FakeUpstream,
    answer,
    message,
    message_frames,
    open_upstream,
)

MODEL = "the-model-asked-for"


def call(text: str = "say this back", *, upstream_model: str = MODEL, **fields: Any) -> ProviderCall:
    """A call whose body has fields no one knows, in an order of its own."""
    everything = {
        "max_tokens": 20,
        "messages": [{"role": "user", "content": text}],
        "model": MODEL,
        "temperature": 0,
        **fields,
    }
    return ProviderCall(body=orjson.dumps(everything), fields=everything, model=upstream_model)


async def frames_of(provider: Provider, request: ProviderCall) -> list[Frame]:
    """All frames of a stream; every read but the last has some."""
    frames: list[Frame] = []
    async with provider.open_stream(request) as source:
        while batch := await source.receive():
            frames += batch
        assert await source.receive() == []
    return frames


def fold(frames: list[Frame]) -> MessageFold:
    """The fold of a stream; raises for an illegal order."""
    folded = MessageFold()
    for frame in frames:
        folded.apply(frame.event, frame.data)
    return folded


class ProviderContract:
    """Every adapter's test class inherits these and gives the fixture ``provider``."""

    deterministic: ClassVar[bool] = True
    """Whether two calls get the same answer, id apart."""
    fixed_ids: ClassVar[bool] = False
    """Whether whoever answers gives one id to all its Messages."""

    async def test_has_a_name_and_a_kind(self, provider: Provider) -> None:
        assert provider.name == "p"
        assert provider.kind in {"echo", "local", "anthropic", "openai"}

    async def test_a_plain_answer_is_a_message(self, provider: Provider) -> None:
        completion = await provider.complete(call())
        body = orjson.loads(completion.body)
        assert body["type"] == "message"
        assert body["role"] == "assistant"
        assert body["id"].startswith("msg_")
        assert body["model"] == MODEL
        assert body["stop_reason"] in {"end_turn", "max_tokens"}
        assert [block["type"] for block in body["content"]] == ["text"]
        assert completion.usage == body["usage"]
        assert completion.usage["input_tokens"] > 0
        assert completion.usage["output_tokens"] > 0

    async def test_a_stream_folds_to_a_message(self, provider: Provider) -> None:
        folded = fold(await frames_of(provider, call()))
        assert folded.finished
        assert folded.model == MODEL
        assert folded.message_id.startswith("msg_")
        assert folded.usage["input_tokens"] > 0
        assert folded.usage["output_tokens"] > 0

    async def test_frames_say_what_is_on_the_wire(self, provider: Provider) -> None:
        for frame in await frames_of(provider, call()):
            assert frame.wire == b"event: %b\ndata: %b\n\n" % (frame.event.encode(), frame.data)
            assert orjson.loads(frame.data)["type"] == frame.event

    async def test_the_plain_answer_is_the_fold_of_the_stream(self, provider: Provider) -> None:
        plain = orjson.loads((await provider.complete(call())).body)
        folded = fold(await frames_of(provider, call())).message()
        assert plain.keys() == folded.keys()
        assert plain["usage"].keys() == folded["usage"].keys()
        assert plain["id"] != folded["id"] or self.fixed_ids
        compared = plain.keys() - {"id"} if self.deterministic else {"type", "role", "model"}
        assert {key: folded[key] for key in compared} == {key: plain[key] for key in compared}

    async def test_whether_to_stream_is_the_adapters_affair(self, provider: Provider) -> None:
        completion = await provider.complete(call(stream=True))
        assert orjson.loads(completion.body)["type"] == "message"
        assert fold(await frames_of(provider, call(stream=False))).finished

    async def test_tokens_are_counted(self, provider: Provider) -> None:
        short = await provider.count_tokens(call("one"))
        long = await provider.count_tokens(call("one two three four five six"))
        assert 0 < short.input_tokens < long.input_tokens

    async def test_a_stream_may_be_left_at_any_time(self, provider: Provider) -> None:
        async with provider.open_stream(call()):
            pass
        async with provider.open_stream(call()) as source:
            assert (await source.receive())[0].event == "message_start"
        assert fold(await frames_of(provider, call())).finished

    async def test_a_cancelled_call_ends_at_once(self, provider: Provider) -> None:
        await provider.count_tokens(call())  # whatever is slow at the first call is done
        for ask in (provider.complete, lambda request: frames_of(provider, request)):
            with trio.CancelScope() as scope, trio.fail_after(5):
                scope.cancel()
                await ask(call())
            assert scope.cancelled_caught
        assert fold(await frames_of(provider, call())).finished

    async def test_calls_do_not_wait_for_each_other(self, provider: Provider) -> None:
        async with provider.open_stream(call()) as one, provider.open_stream(call()) as two:
            assert await two.receive()
            assert await one.receive()

    async def test_forwarding_works_or_is_unsupported(self, provider: Provider) -> None:
        try:
            status = (await provider.forward(ForwardCall("POST", "/v1/messages/other", b"{}", ()))).status
        except UnsupportedError as error:
            status = error.status
        assert status == 404


class TestEcho(ProviderContract):
    @pytest.fixture
    def provider(self) -> Provider:
        return EchoProvider(EchoOptions(name="p"))


class TestAnthropic(ProviderContract):
    fixed_ids = True

    @pytest.fixture
    async def upstream(self) -> AsyncIterator[FakeUpstream]:
        async with open_upstream(_speak) as upstream:
            yield upstream

    @pytest.fixture
    async def provider(self, upstream: FakeUpstream, timers: Timers) -> AsyncIterator[Provider]:
        provider = AnthropicProvider(options_for(upstream), timers=timers, trust_env=False)
        yield provider
        await provider.aclose()

    async def test_the_body_is_the_clients_but_for_two_values(
        self, provider: Provider, upstream: FakeUpstream
    ) -> None:
        body = b'{ "model":"a","max_tokens": 1.0e1 ,"x-new":[1, {"stream":0}],"messages":[], "stream":true}'
        request = ProviderCall(body=body, fields=orjson.loads(body), model="b")
        await provider.complete(request)
        renamed = body.replace(b'"a"', b'"b"')
        assert upstream.requests[-1].body == renamed.replace(b"true", b"false")
        await frames_of(provider, request)
        assert upstream.requests[-1].body == renamed
        await provider.count_tokens(request)
        assert upstream.requests[-1].body == renamed
        assert [r.path for r in upstream.requests] == [
            "/v1/messages",
            "/v1/messages",
            "/v1/messages/count_tokens",
        ]

    async def test_headers(self, upstream: FakeUpstream, timers: Timers) -> None:
        given = (("anthropic-beta", "a,b"), ("Anthropic-Beta", "c"), ("x-api-key", "mine"), ("cookie", "d"))
        request = ProviderCall(body=call().body, fields=call().fields, model=MODEL, headers=given)
        for auth, name, value in (
            ("x-api-key", "x-api-key", "sk-1"),
            ("bearer", "authorization", "Bearer sk-1"),
        ):
            provider = AnthropicProvider(options_for(upstream, auth=auth), timers=timers, trust_env=False)
            await provider.complete(request)
            await provider.aclose()
            sent = upstream.requests[-1].headers
            assert sent.pop(name) == value
            assert sent.pop("user-agent").startswith("messagesd/")
            assert sent.pop("host") == upstream.url.removeprefix("http://")
            assert sent == {
                "accept": "application/json",
                "accept-encoding": "identity",
                "anthropic-beta": "c",  # the fake keeps the last of two
                "anthropic-version": "2023-06-01",
                "content-length": str(len(request.body)),
                "content-type": "application/json",
            }

    async def test_the_clients_version_wins(self, provider: Provider, upstream: FakeUpstream) -> None:
        given = (("anthropic-version", "2024-01-01"),)
        await provider.complete(
            ProviderCall(body=call().body, fields=call().fields, model=MODEL, headers=given)
        )
        assert upstream.requests[-1].headers["anthropic-version"] == "2024-01-01"

    async def test_an_odd_header_is_the_clients_fault(
        self, provider: Provider, upstream: FakeUpstream
    ) -> None:
        for odd in (
            ("anthropic-beta", "a\r\nx: y"),
            ("anthropic-b\u00e9", "a"),
            ("anthropic-beta", "\u20ac"),
        ):
            request = ProviderCall(body=b"{}", fields={}, model=MODEL, headers=(odd,))
            with pytest.raises(ProviderError) as caught:
                await provider.complete(request)
            assert caught.value.status == 400
        assert upstream.connections == 0

    async def test_proxies_come_from_the_environment(
        self, upstream: FakeUpstream, timers: Timers, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HTTP_PROXY", upstream.url)
        monkeypatch.setenv("NO_PROXY", "")
        for trust, error in ((True, UpstreamStatusError), (False, UpstreamConnectionError)):
            options = options_for(upstream, base_url="http://upstream.invalid")
            provider = AnthropicProvider(options, timers=timers, trust_env=trust)
            # The fake, used as a proxy, sees the whole URL, which it does not know.
            with pytest.raises(error):
                await provider.complete(call())
            await provider.aclose()
        assert [request.path for request in upstream.requests] == ["http://upstream.invalid/v1/messages"]

    async def test_the_request_id_is_kept(self, provider: Provider) -> None:
        assert (await provider.complete(call())).upstream_request_id == "req_fake"
        async with provider.open_stream(call()) as source:
            assert source.upstream_request_id == "req_fake"


class TestOpenai(ProviderContract):
    fixed_ids = True

    @pytest.fixture
    async def upstream(self) -> AsyncIterator[FakeUpstream]:
        async with open_upstream(fake_openai.speak) as upstream:
            yield upstream

    @pytest.fixture
    async def provider(self, upstream: FakeUpstream, timers: Timers) -> AsyncIterator[Provider]:
        provider = OpenaiProvider(openai_options(upstream), timers=timers, trust_env=False)
        yield provider
        await provider.aclose()

    async def test_the_upstream_is_called_by_its_own_name_for_the_model(
        self, provider: Provider, upstream: FakeUpstream
    ) -> None:
        await provider.complete(call(upstream_model="theirs"))
        await frames_of(provider, call(upstream_model="theirs"))
        assert [orjson.loads(request.body)["model"] for request in upstream.requests] == ["theirs"] * 2

    @pytest.mark.parametrize(
        ("auth", "name", "value"), [("auto", "authorization", "Bearer sk-1"), ("api-key", "api-key", "sk-1")]
    )
    async def test_headers_and_the_query_of_the_base_url(
        self, upstream: FakeUpstream, timers: Timers, auth: str, name: str, value: str
    ) -> None:
        # Azure: https://learn.microsoft.com/azure/ai-services/openai/reference
        base_url = f"{upstream.url}/v1/?api-version=2024-10-21"
        provider = OpenaiProvider(
            openai_options(upstream, base_url=base_url, auth=auth), timers=timers, trust_env=False
        )
        given = (("anthropic-beta", "a"), ("x-api-key", "mine"))
        request = ProviderCall(body=call().body, fields=call().fields, model=MODEL, headers=given)
        await provider.complete(request)
        await provider.aclose()
        assert upstream.requests[-1].path == "/v1/chat/completions?api-version=2024-10-21"
        sent = upstream.requests[-1].headers
        assert sent.pop(name) == value
        assert sent.pop("user-agent").startswith("messagesd/")
        assert sent.keys() == {"accept", "accept-encoding", "content-length", "content-type", "host"}

    async def test_what_is_nested_too_deeply_to_be_written_is_the_clients_fault(
        self, provider: Provider, upstream: FakeUpstream
    ) -> None:
        deep = orjson.loads(b'{"a":' * 300 + b"1" + b"}" * 300)
        used = {"type": "tool_use", "id": "a", "name": "f", "input": deep}
        for part in (
            {"tools": [{"name": "f", "input_schema": deep}]},
            {"messages": [{"role": "assistant", "content": [used]}]},
        ):
            request = ProviderCall(body=b"{}", fields={**call().fields, **part}, model=MODEL)
            for ask in (provider.complete, provider.count_tokens):
                with pytest.raises(ProviderError, match="nested too deeply") as caught:
                    await ask(request)
                assert caught.value.status == 400
        assert upstream.connections == 0

    async def test_a_refused_request_never_leaves(self, provider: Provider, upstream: FakeUpstream) -> None:
        refused = call(tools=[{"type": "web_search_20250305", "name": "web_search"}])
        for ask in (provider.complete, provider.count_tokens, lambda request: frames_of(provider, request)):
            with pytest.raises(UnsupportedError, match=r"^tools\.0: ") as caught:
                await ask(refused)
            assert caught.value.status == 400
        assert upstream.connections == 0

    async def test_the_request_id_is_kept(self, provider: Provider) -> None:
        assert (await provider.complete(call())).upstream_request_id == "req_fake"
        async with provider.open_stream(call()) as source:
            assert source.upstream_request_id == "req_fake"

    async def test_a_connection_is_used_again_after_a_stream(
        self, provider: Provider, upstream: FakeUpstream
    ) -> None:
        for _ in range(3):
            await frames_of(provider, call())
        assert upstream.connections == 1


def openai_options(upstream: FakeUpstream, **options: Any) -> OpenaiOptions:
    return OpenaiOptions.model_validate(
        {"name": "p", "base_url": f"{upstream.url}/v1", "api_key": "sk-1"} | options
    )


def options_for(upstream: FakeUpstream, **options: Any) -> AnthropicOptions:
    return AnthropicOptions.model_validate(
        {"name": "p", "base_url": upstream.url, "api_key": "sk-1"} | options
    )


async def _speak(exchange: Exchange) -> None:
    """The Messages API, as far as the contract needs it."""
    exchange.keep_alive()
    asked = orjson.loads(exchange.request.body)
    text = asked["messages"][-1]["content"] if asked.get("messages") else "nothing asked"
    if exchange.request.path == "/v1/messages/count_tokens":
        await exchange.send(answer(200, orjson.dumps({"input_tokens": len(text.split())})))
    elif exchange.request.path != "/v1/messages":
        await exchange.send(answer(404, b"{}"))
    elif asked.get("stream"):
        await exchange.send(STREAM_HEAD)
        for piece in message_frames(text, asked["model"]):
            await exchange.send_chunk(piece)
        await exchange.send(LAST_CHUNK)
    else:
        body = orjson.dumps(message(text, asked["model"]))
        await exchange.send(answer(200, body, "application/json", "request-id: req_fake"))


class Lines:
    """A logger that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def info(self, event: str, **fields: Any) -> None:
        self.lines.append(fields)


async def test_open_providers_builds_all_and_closes_them() -> None:
    async with open_upstream(_speak) as upstream:
        log = Lines()
        openai = openai_options(upstream, name="o")
        options: list[ProviderOptions] = [options_for(upstream), EchoOptions(name="e"), openai]
        async with open_providers(options, timers=Timers(), log=log) as providers:
            kinds = {name: p.kind for name, p in providers.items()}
            assert kinds == {"p": "anthropic", "e": "echo", "o": "openai"}
            await providers["p"].complete(call())
            assert upstream.open == 1
            anthropic = providers["p"]
        with trio.fail_after(0.5):
            await upstream.wait_open(0)
        with pytest.raises(UpstreamConnectionError):
            await anthropic.complete(call())
        assert [line["provider"] for line in log.lines] == ["p", "e", "o"]
        assert {line["action"] for line in log.lines} == {"provider.ready"}


async def test_open_providers_refuses_a_name_twice() -> None:
    with pytest.raises(ValueError, match="'e'"):
        async with open_providers([EchoOptions(name="e"), EchoOptions(name="e")], timers=Timers()):
            pass
