from collections.abc import Sequence
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from events.errors import BadFrameError
from events.message import MessageFold
from tests.unit.message_streams import Frames, Json, block, ending, start, streams
from tests.unit.strategies import json_values, texts, unhurried


def fold(frames: Sequence[Json], *, keep_content: bool = True) -> MessageFold:
    folded = MessageFold(keep_content=keep_content)
    for frame in frames:
        folded.apply(frame["type"], orjson.dumps(frame))
    return folded


def refused(frames: Sequence[Json], *, keep_content: bool) -> str | None:
    try:
        fold(frames, keep_content=keep_content)
    except BadFrameError as exc:
        return str(exc)
    return None


@unhurried
@given(streams())
def test_the_fold_gives_the_message_back(drawn: tuple[Json, Frames]) -> None:
    message, frames = drawn
    folded = fold(frames)
    assert folded.finished
    assert folded.message() == message
    assert orjson.loads(folded.message_json()) == message
    assert (folded.usage, folded.model, folded.message_id) == (
        message["usage"],
        message["model"],
        message["id"],
    )


@unhurried
@given(streams())
def test_without_content_only_that_is_missing(drawn: tuple[Json, Frames]) -> None:
    message, frames = drawn
    folded = fold(frames, keep_content=False)
    assert folded.finished
    assert (folded.usage, folded.model) == (message["usage"], message["model"])
    assert folded._done == {}
    with pytest.raises(ValueError, match="not kept"):
        folded.message()


# --- the order of a stream, told another way -----------------------------------------------------------


def legal(frames: Frames) -> bool:
    """Whether the frames are the beginning of a legal stream."""
    told = [frame for frame in frames if frame["type"] != "ping"]
    kinds = [frame["type"] for frame in told]
    if not told:
        return True
    if kinds[0] != "message_start" or kinds.count("message_start") > 1:
        return False
    if "message_stop" in kinds and (
        kinds.index("message_stop") != len(kinds) - 1 or "message_delta" not in kinds
    ):
        return False
    content = [i for i, kind in enumerate(kinds) if kind.startswith("content_block_")]
    if "message_delta" in kinds and content and content[-1] > kinds.index("message_delta"):
        return False
    for index in {told[i]["index"] for i in content}:
        steps = [kinds[i].removeprefix("content_block_") for i in content if told[i]["index"] == index]
        if steps[0] != "start" or "start" in steps[1:] or "stop" in steps[:-1]:
            return False
        if "message_delta" in kinds and steps[-1] != "stop":
            return False
    return True


@unhurried
@given(streams(), st.data())
def test_exactly_the_legal_orders_are_taken(drawn: tuple[Json, Frames], data: st.DataObject) -> None:
    frames = drawn[1]
    match data.draw(st.sampled_from(["shuffle", "swap", "drop", "repeat", "cut"])):
        case "shuffle":
            frames = data.draw(st.permutations(frames))
        case "swap":
            i, j = (data.draw(st.integers(0, len(frames) - 1)) for _ in range(2))
            frames[i], frames[j] = frames[j], frames[i]
        case "drop":
            del frames[data.draw(st.integers(0, len(frames) - 1))]
        case "repeat":
            i, j = (data.draw(st.integers(0, len(frames) - 1)) for _ in range(2))
            frames.insert(j, frames[i])
        case "cut":
            del frames[data.draw(st.integers(0, len(frames))) :]
    assert (refused(frames, keep_content=False) is None) == legal(frames)
    with_content = refused(frames, keep_content=True)
    if legal(frames):
        # Pieces of tool input in another order are legal, but need not be JSON any more.
        assert with_content is None or "input is not JSON" in with_content
    else:
        assert with_content is not None


KINDS = [
    "message_start",
    "content_block_start",
    "content_block_delta",
    "content_block_stop",
    "message_delta",
    "message_stop",
    "ping",
    "error",
    "event_of_next_year",
]
DELTAS = ["text_delta", "thinking_delta", "signature_delta", "input_json_delta", "citations_delta"]
inner = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from([*DELTAS, "compaction_delta", "text", "fallback"]) | json_values,
        "text": json_values,
        "thinking": json_values,
        "partial_json": st.just('{"a":') | json_values,
        "citation": json_values,
        "citations": json_values,
        "input": json_values,
        "to": json_values | st.just({"model": "n"}),
        "content": json_values,
        "usage": json_values,
        "id": json_values,
        "model": json_values,
        "stop_reason": json_values,
    },
)
shapes = json_values | st.fixed_dictionaries(
    {},
    optional={
        "type": json_values,
        "index": st.just(0) | json_values,
        "message": inner | json_values,
        "content_block": inner | json_values,
        "delta": inner | json_values,
        "usage": json_values,
        "content": json_values,
    },
)
wild = st.lists(
    st.tuples(st.sampled_from(KINDS) | texts, shapes.map(orjson.dumps) | st.binary(max_size=8)), max_size=12
)


@unhurried
@given(wild, st.booleans(), st.booleans())
def test_whatever_comes_only_bad_frames_are_raised(
    frames: list[tuple[str, bytes]], begun: bool, in_block: bool
) -> None:
    keeping, checking = MessageFold(), MessageFold(keep_content=False)
    opening: Frames = [start(), block(0, {"type": "text", "text": ""})[0]]
    for frame in opening[: begun + (begun and in_block)]:
        keeping.apply(frame["type"], orjson.dumps(frame))
        checking.apply(frame["type"], orjson.dumps(frame))
    for event, data in frames:
        errors = []
        for folded in (keeping, checking):
            try:
                folded.apply(event, data)
            except BadFrameError as exc:
                errors.append(str(exc))
        if errors:
            assert len(set(errors)) == 1
            assert len(errors) == 2 or "input is not JSON" in errors[0]
            return
        orjson.dumps(keeping.usage)
        assert keeping.usage == checking.usage
        if keeping.finished:
            assert isinstance(keeping.message()["content"], list)


# --- examples ------------------------------------------------------------------------------------------


def test_progress_is_told() -> None:
    folded = MessageFold()
    seen = []
    for frame in [start(), {"type": "ping"}, *block(0, {"type": "text", "text": ""}), *ending()]:
        folded.apply(frame["type"], orjson.dumps(frame))
        seen.append((folded.started, folded.content_started, folded.finished))
    assert seen == [
        (True, False, False),
        (True, False, False),
        (True, True, False),
        (True, True, False),
        (True, True, False),
        (True, True, True),
    ]


def test_an_empty_answer_counts_as_content_started_once_it_ends() -> None:
    folded = fold([start(), ending()[0]])
    assert folded.content_started


def test_usage_is_cumulative_and_null_overrides_nothing() -> None:
    folded = fold([start(input_tokens=5, output_tokens=1, cache_read_input_tokens=None)])
    assert folded.usage == {"input_tokens": 5, "output_tokens": 1, "cache_read_input_tokens": None}
    later = ending(output_tokens=9, input_tokens=None)[0]
    folded.apply("message_delta", orjson.dumps(later))
    assert folded.usage == {"input_tokens": 5, "output_tokens": 9, "cache_read_input_tokens": None}
    folded.usage["output_tokens"] = 0
    assert folded.usage["output_tokens"] == 9


def test_gaps_and_late_indexes_come_out_in_order() -> None:
    frames = [start(), *block(7, {"type": "text", "text": "b"}), *block(2, {"type": "text", "text": "a"})]
    assert [b["text"] for b in fold([*frames, *ending()]).message()["content"]] == ["a", "b"]


def test_an_index_is_used_once() -> None:
    twice = block(0, {"type": "text", "text": "a"}) * 2
    with pytest.raises(BadFrameError, match="one index"):
        fold([start(), *twice, *ending()])


@pytest.mark.parametrize(
    ("begin", "pieces", "wanted"),
    [
        ({"input": {}}, [], {}),
        ({"input": {}}, ["", ""], {}),
        ({}, [""], {}),
        ({"input": None}, [""], {}),
        ({"input": {"a": 1}}, [""], {"a": 1}),
        ({"input": {}}, ["", '{"a"', ":[1,", "2]}"], {"a": [1, 2]}),
    ],
)
def test_tool_input(begin: Json, pieces: list[str], wanted: Json) -> None:
    deltas = [{"type": "input_json_delta", "partial_json": piece} for piece in pieces]
    frames = [start(), *block(0, {"type": "tool_use", "id": "t", "name": "n", **begin}, *deltas), *ending()]
    (tool,) = fold(frames).message()["content"]
    assert tool.get("input", {}) == wanted


def test_tool_input_that_is_not_json_is_refused_at_the_stop() -> None:
    broken = block(0, {"type": "tool_use", "input": {}}, {"type": "input_json_delta", "partial_json": "a{"})
    folded = fold([start(), *broken[:-1]])
    with pytest.raises(BadFrameError, match="tool input is not JSON"):
        folded.apply("content_block_stop", orjson.dumps(broken[-1]))
    assert fold([start(), *broken, *ending()], keep_content=False).finished


def test_tool_input_that_was_cut_off_is_read_as_far_as_it_goes() -> None:
    cut = {"type": "input_json_delta", "partial_json": '{"city": "Paris", "days": [1, 2, {"no'}
    folded = fold([start(), *block(0, {"type": "tool_use", "id": "t", "input": {}}, cut), *ending()])
    assert folded.message()["content"][0]["input"] == {"city": "Paris", "days": [1, 2, {}]}


def test_a_fallback_block_names_the_model_that_served() -> None:
    fallback = {"type": "fallback", "from": {"model": "m"}, "to": {"model": "n"}}
    folded = fold([start(), *block(0, fallback), *ending()])
    assert (folded.model, folded.message()["model"]) == ("n", "n")
    assert folded.message()["content"] == [fallback]


def test_a_delta_cannot_replace_what_is_not_its_own() -> None:
    last = {
        "type": "message_delta",
        "delta": {"stop_reason": "end_turn", "type": "x", "content": "x", "usage": 1},
    }
    message = fold([start(output_tokens=1), last, {"type": "message_stop"}]).message()
    assert (message["type"], message["content"], message["usage"]) == ("message", [], {"output_tokens": 1})


def test_a_message_is_there_only_at_the_end() -> None:
    with pytest.raises(BadFrameError, match="no message_stop"):
        fold([start(), ending()[0]]).message()


def test_an_error_frame_is_not_for_the_fold() -> None:
    with pytest.raises(BadFrameError, match="error frame"):
        fold([start(), {"type": "error", "error": {"type": "api_error", "message": "x"}}])


def test_the_event_and_its_data_must_agree() -> None:
    with pytest.raises(BadFrameError, match="another type"):
        MessageFold().apply("message_start", orjson.dumps({**start(), "type": "message_stop"}))


def nested(depth: int) -> Any:
    return orjson.loads(b"[" * depth + b"]" * depth)


def test_depth_that_cannot_be_written_is_a_bad_frame() -> None:
    data = b'{"type":"message_start","message":{"usage":{"x":' + b"[" * 252 + b"]" * 252 + b"}}}"
    with pytest.raises(BadFrameError, match="too deeply"):
        MessageFold().apply("message_start", data)
    folded = fold([start()])
    deep = b'{"index":0,"content_block":{"type":"odd","x":' + b"[" * 300 + b"]" * 300 + b"}}"
    folded.apply("content_block_start", deep)
    for frame in [{"type": "content_block_stop", "index": 0}, *ending()]:
        folded.apply(frame["type"], orjson.dumps(frame))
    assert folded.message()["content"][0]["x"] == nested(300)
    with pytest.raises(BadFrameError, match="too deeply"):
        folded.message_json()
