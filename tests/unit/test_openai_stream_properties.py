"""Whatever an upstream does, the frames are in the contract's order, and say what it said."""

import random
from typing import Any

import orjson
from hypothesis import given
from hypothesis import strategies as st

from actors.errors import ProviderError
from actors.providers.openai.response import estimated_usage, translate_response
from tests.fake_openai import (
    DONE,
    FOLDED_USAGE,
    USAGE,
    call_piece,
    check_order,
    chunk,
    completion,
    folded,
    tool_call,
    translate,
    usage_chunk,
)

TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
INPUTS = st.dictionaries(
    TEXT, st.one_of(TEXT, st.integers(-99, 99), st.none(), st.lists(TEXT, max_size=2)), max_size=3
)
CALLS = st.lists(INPUTS, max_size=4)
USAGE_WAYS = st.sampled_from(["late", "every chunk", "never", "with finish"])
FINISHES = st.sampled_from(["stop", "length", "content_filter"])


def cut(text: str, rng: random.Random) -> list[str]:
    """A text in pieces, some of them empty."""
    places = sorted(rng.randint(0, len(text)) for _ in range(rng.randint(0, 4)))
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


def merged(queues: list[list[Any]], rng: random.Random) -> list[Any]:
    """All items, in an order that keeps that of each queue."""
    queues = [list(queue) for queue in queues if queue]
    items = []
    while queues:
        queue = rng.choice(queues)
        items.append(queue.pop(0))
        queues = [queue for queue in queues if queue]
    return items


def call_deltas(index: int, arguments: str, rng: random.Random) -> list[dict[str, Any]]:
    pieces = cut(arguments, rng)
    first = call_piece(index, pieces[0], f"call_{index}", f"tool_{index}")
    return [first, *(call_piece(index, piece) for piece in pieces[1:])]


def stream_of(deltas: list[dict[str, Any]], finish: str, usage: str, rng: random.Random) -> list[bytes]:
    each: dict[str, Any] = {"usage": USAGE} if usage == "every chunk" else {}
    last: dict[str, Any] = {"usage": USAGE} if usage in ("every chunk", "with finish") else {}
    pieces = [chunk({"role": "assistant"}, **each), *(chunk(delta, **each) for delta in deltas)]
    pieces.append(chunk(finish=finish, **last))
    pieces += [usage_chunk()] * (usage == "late")
    pieces += [DONE] * rng.randint(0, 1)
    return merged([pieces, [b": keep-alive\n\n"] * rng.randint(0, 3)], rng)


def recut(pieces: list[bytes], rng: random.Random) -> list[bytes]:
    """The same bytes, cut anywhere."""
    data = b"".join(pieces)
    places = sorted(rng.randint(0, len(data)) for _ in range(rng.randint(0, 9)))
    return [data[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True)]


@given(TEXT, TEXT, CALLS, st.tuples(USAGE_WAYS, FINISHES), st.randoms())
def test_a_stream_folds_to_the_plain_answer(
    thinking: str, text: str, calls: list[dict[str, Any]], end: tuple[str, str], rng: random.Random
) -> None:
    usage, finish = end
    arguments = [orjson.dumps(input_).decode() for input_ in calls]
    deltas: list[dict[str, Any]] = [{"reasoning_content": piece} for piece in cut(thinking, rng)]
    deltas += [{"content": piece} for piece in cut(text, rng)]
    deltas += merged([call_deltas(i, a, rng) for i, a in enumerate(arguments)], rng)
    # Calls stand in the order in which they began.
    pieces = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
    begun: list[int] = [piece["index"] for piece in pieces if "id" in piece]
    message: dict[str, Any] = {"content": text, "reasoning_content": thinking}
    message["tool_calls"] = [tool_call(f"call_{i}", f"tool_{i}", arguments[i]) for i in begun]
    expected = translate_response(completion(message, finish), model="m")
    if usage == "never":
        chars = sum(map(len, [thinking, text, *arguments]))
        expected["usage"] = estimated_usage(7, chars)
    else:
        assert expected["usage"] == FOLDED_USAGE
    assert folded(translate(recut(stream_of(deltas, finish, usage, rng), rng))) == expected


def said(content: list[dict[str, Any]]) -> tuple[str, str, list[Any]]:
    """What was thought and said, and the inputs of the calls by name."""
    thinking = "".join(block["thinking"] for block in content if block["type"] == "thinking")
    text = "".join(block["text"] for block in content if block["type"] == "text")
    calls = {block["name"]: block["input"] for block in content if block["type"] == "tool_use"}
    return thinking, text, sorted(calls.items())


@given(TEXT, TEXT, CALLS, USAGE_WAYS, st.randoms())
def test_pieces_in_any_order_lose_nothing(
    thinking: str, text: str, calls: list[dict[str, Any]], usage: str, rng: random.Random
) -> None:
    queues: list[list[Any]] = [
        [{"reasoning": piece} for piece in cut(thinking, rng)],
        [{"content": piece} for piece in cut(text, rng)],
        *(call_deltas(i, orjson.dumps(input_).decode(), rng) for i, input_ in enumerate(calls)),
    ]
    message = folded(translate(stream_of(merged(queues, rng), "stop", usage, rng)))
    named = [(f"tool_{i}", input_) for i, input_ in enumerate(calls)]
    assert said(message["content"]) == (thinking, text, named)
    assert message["stop_reason"] == ("tool_use" if calls else "end_turn")


ODD: list[Any] = [0, [], {}, "x"]
DELTAS = st.one_of(
    st.builds(lambda text: {"content": text}, TEXT),
    st.builds(lambda text: {"reasoning": text}, TEXT),
    st.builds(lambda text: {"refusal": text}, TEXT),
    st.builds(
        call_piece,
        st.one_of(st.none(), st.integers(0, 2)),
        st.sampled_from([None, "", "{", '{"a":', "1}", "{}", "[", '"', "null"]),
        st.sampled_from([None, "", "a", "b"]),
        st.sampled_from([None, "", "f", "g"]),
    ),
    st.dictionaries(st.sampled_from(["content", "tool_calls", "reasoning", "refusal"]), st.sampled_from(ODD)),
)


@given(st.lists(st.builds(chunk, DELTAS, st.sampled_from([None, None, None, "stop", "length", ""]))))
def test_nonsense_is_in_order_or_an_error(pieces: list[bytes]) -> None:
    try:
        frames = translate([*pieces, DONE])
    except (ProviderError, ValueError):
        return
    check_order(frames)
