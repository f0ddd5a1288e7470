"""The echo provider: exact frames, exact times, scripted failures."""

from typing import Any

import orjson
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from actors.errors import UnsupportedError, UpstreamProtocolError, UpstreamStatusError
from actors.providers.base import ForwardCall, Frame, ProviderCall
from actors.providers.echo import MAX_FRAMES_AT_ONCE, EchoProvider, count_words, last_user_text
from actors.providers.options import EchoOptions


def echo(**options: Any) -> EchoProvider:
    return EchoProvider(EchoOptions(name="echo", **options))


def call(text: Any, **fields: Any) -> ProviderCall:
    body = {"model": "m", "max_tokens": 1000, "messages": [{"role": "user", "content": text}], **fields}
    return ProviderCall(body=orjson.dumps(body), fields=body, model="echo-1")


async def reads(provider: EchoProvider, request: ProviderCall) -> list[list[Frame]]:
    """Every read until the end, in order."""
    found = []
    async with provider.open_stream(request) as source:
        while frames := await source.receive():
            found.append(frames)
    return found


def texts(batches: list[list[Frame]]) -> list[str]:
    return [
        orjson.loads(f.data)["delta"]["text"] for b in batches for f in b if f.event == "content_block_delta"
    ]


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_the_words_join_to_the_text(text: str) -> None:
    async def main() -> list[str]:
        return texts(await reads(echo(), call(text)))

    words = trio.run(main)
    assert "".join(words) == text
    assert all(word.strip() or len(words) == 1 or word is words[0] for word in words)


async def test_the_stream_is_the_documented_one() -> None:
    (first, last) = await reads(echo(), call("to be"))
    assert [f.event for f in first + last] == [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    for frame in first + last:
        assert frame.wire == f"event: {frame.event}\ndata: ".encode() + frame.data + b"\n\n"
        assert orjson.loads(frame.data)["type"] == frame.event
    start = orjson.loads(first[0].data)["message"]
    assert start["model"] == "m"
    assert start["id"].startswith("msg_")
    assert orjson.loads(last[1].data)["usage"] == {"input_tokens": 2, "output_tokens": 2}


async def test_ids_are_unique_and_all_else_is_the_same() -> None:
    one, two = [orjson.loads((await echo().complete(call("a b"))).body) for _ in range(2)]
    assert one.pop("id") != two.pop("id")
    assert one == two


async def test_batches_are_bounded() -> None:
    batches = await reads(echo(frames=1000), call("a b c", max_tokens=10_000))
    assert max(map(len, batches)) == MAX_FRAMES_AT_ONCE
    assert texts(batches) == [("a ", "b ", "c ")[i % 3] for i in range(1000)]


async def test_exact_times(autojump_clock: MockClock) -> None:
    provider = echo(first_frame_delay_s=5, frame_delay_s=2)
    times = []
    start = trio.current_time()
    async with provider.open_stream(call("a b c")) as source:
        assert trio.current_time() == start
        while await source.receive():
            times.append(trio.current_time() - start)
    assert times == [5, 7, 9, 11, 11]
    start = trio.current_time()
    await provider.complete(call("a b c"))
    assert trio.current_time() - start == 11


async def test_max_tokens_cuts_the_answer() -> None:
    message = orjson.loads((await echo().complete(call("a b c", max_tokens=2))).body)
    assert message["content"] == [{"type": "text", "text": "a b "}]
    assert message["stop_reason"] == "max_tokens"
    assert message["usage"]["output_tokens"] == 2
    message = orjson.loads((await echo().complete(call("a b", max_tokens=2))).body)
    assert message["stop_reason"] == "end_turn"


async def test_an_empty_text_is_an_empty_block() -> None:
    message = orjson.loads((await echo().complete(call(""))).body)
    assert message["content"] == [{"type": "text", "text": ""}]
    assert texts(await reads(echo(), call(""))) == []
    assert texts(await reads(echo(frames=2), call(""))) == ["echo ", "echo "]


@pytest.mark.parametrize("status", [400, 404, 429, 500, 529])
async def test_fail_status(status: int, autojump_clock: MockClock) -> None:
    provider = echo(fail_status=status, first_frame_delay_s=3)
    start = trio.current_time()
    with pytest.raises(UpstreamStatusError) as plain:
        await provider.complete(call("a"))
    assert trio.current_time() - start == 3
    with pytest.raises(UpstreamStatusError) as stream:
        async with provider.open_stream(call("a")):
            pass
    assert plain.value.failure == stream.value.failure
    assert plain.value.status == status


async def test_fail_with_an_error_frame() -> None:
    provider = echo(fail_after_frames=1, fail_mode="error")
    batches = await reads(provider, call("a b"))
    assert [f.event for b in batches for f in b][-2:] == ["content_block_delta", "error"]
    assert texts(batches) == ["a "]
    assert orjson.loads(batches[-1][-1].data)["error"]["type"] == "overloaded_error"
    with pytest.raises(UpstreamStatusError) as caught:
        await provider.complete(call("a b"))
    assert (caught.value.status, caught.value.error_type) == (529, "overloaded_error")


async def test_fail_by_hanging_up() -> None:
    provider = echo(fail_after_frames=2, fail_mode="hangup")
    batches = await reads(provider, call("a b"))
    assert texts(batches) == ["a ", "b"]
    assert batches[-1][-1].event == "content_block_delta"
    with pytest.raises(UpstreamProtocolError):
        await provider.complete(call("a b"))


async def test_fail_by_silence(autojump_clock: MockClock) -> None:
    provider = echo(fail_after_frames=0, fail_mode="stall")
    async with provider.open_stream(call("a b")) as source:
        assert [f.event for f in await source.receive()] == ["message_start", "content_block_start"]
        with trio.move_on_after(1_000_000) as scope:
            await source.receive()
    assert scope.cancelled_caught
    with trio.move_on_after(1_000_000) as scope:
        await provider.complete(call("a b"))
    assert scope.cancelled_caught


async def test_a_failure_past_the_end_does_not_happen() -> None:
    batches = await reads(echo(fail_after_frames=3), call("a b"))
    assert batches[-1][-1].event == "message_stop"


def test_the_last_user_text() -> None:
    block = {"type": "text", "text": "b"}
    messages: list[Any] = [
        {"role": "user", "content": "a"},
        {"role": "user", "content": [block, {"type": "image"}, block]},
        {"role": "assistant", "content": "c"},
    ]
    assert last_user_text({"messages": messages}) == "bb"
    assert last_user_text({"messages": messages[:1]}) == "a"
    for odd in ({}, {"messages": None}, {"messages": [1, {"role": "user", "content": 5}]}):
        assert last_user_text(odd) == ""


def test_words_are_counted_however_deep_they_are() -> None:
    nested: Any = "two words"
    for _ in range(5000):
        nested = [{"type": "tool_result", "content": nested}]
    assert count_words({"system": "one", "messages": [{"role": "user", "content": nested}]}) == 3
    assert count_words({"messages": [{"role": "user", "content": [{"type": "image"}]}]}) == 1
    assert count_words({}) == 1


async def test_there_is_nothing_to_forward_to() -> None:
    with pytest.raises(UnsupportedError) as caught:
        await echo().forward(ForwardCall("POST", "/v1/messages/x", b"{}", ()))
    assert caught.value.status == 404
