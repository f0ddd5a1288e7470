"""Messages requests to Chat Completions requests: every line of the table."""

from typing import Any

import pytest

from actors.providers.openai.dialect import Dialect
from actors.providers.openai.mapping import BLOCKS, FIELDS, PLACES, SOURCES, Fate
from actors.providers.openai.request import MAX_USER_CHARS, translate_request
from tests.unit.openai_requests import HI, TOOL, problem, translated

PNG = {"type": "base64", "media_type": "image/png", "data": "aGk="}
PNG_PART = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}}


def messages(*turns: dict[str, Any], **options: Any) -> list[dict[str, Any]]:
    sent: list[dict[str, Any]] = translated(messages=list(turns), **options)["messages"]
    return sent


def user(*blocks: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": list(blocks)}


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value}


def result(id_: str, content: object = "ok", **more: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": id_, "content": content, **more}


# --- top-level fields ----------------------------------------------------------------------------


def test_what_has_a_counterpart() -> None:
    sent = translated(system="Be brief.", temperature=0.5, top_p=0.9, stop_sequences=["a", "b"])
    assert sent == {
        "model": "m",
        "messages": [{"role": "system", "content": "Be brief."}, HI],
        "max_tokens": 9,
        "temperature": 0.5,
        "top_p": 0.9,
        "stop": ["a", "b"],
        "stream": False,
    }


def test_a_stream_asks_for_usage() -> None:
    assert translated(stream=True)["stream_options"] == {"include_usage": True}
    assert "stream_options" not in translated(stream=True, dialect=Dialect(stream_usage=False))


def test_what_has_none_is_dropped() -> None:
    dropped: dict[str, Any] = {name: {"x": 1} for name, rule in FIELDS.items() if rule.fate is Fate.DROPPED}
    assert {"top_k", "cache_control"} <= dropped.keys()
    assert translated(**dropped, a_field_of_tomorrow=1) == translated()


def test_what_would_change_the_answer_is_refused() -> None:
    refused = [name for name, rule in FIELDS.items() if rule.fate is Fate.REFUSED]
    assert refused == ["container", "mcp_servers"]
    for name in refused:
        said: dict[str, Any] = {name: ["x"]}
        assert problem(**said).startswith(f"{name}: ")
        empty: tuple[Any, ...] = (None, [])
        for value in empty:
            unsaid: dict[str, Any] = {name: value}
            assert translated(**unsaid) == translated()


def test_every_mapped_field_is_read() -> None:
    # A table that promises what the code does not do would be worse than none.
    values: dict[str, Any] = {
        "messages": [user(text("x"))],
        "system": "s",
        "max_tokens": 7,
        "temperature": 1,
        "top_p": 1,
        "stop_sequences": ["x"],
        "tools": [TOOL],
        "thinking": {"type": "enabled", "budget_tokens": 99},
        "output_config": {"effort": "high"},
        "output_format": {"type": "json_schema", "schema": {}},
        "metadata": {"user_id": "u"},
    }
    elsewhere = {"model", "stream", "tool_choice"}
    assert values.keys() | elsewhere == {name for name, rule in FIELDS.items() if rule.fate is Fate.MAPPED}
    effort = Dialect(reasoning="reasoning_effort")
    for name, value in values.items():
        assert translated(dialect=effort, **{name: value}) != translated(dialect=effort)


def test_fields_passed_on_request() -> None:
    fields = {"model": "m", "messages": [HI], "top_k": 5, "seed": 1, "temperature": 0}
    sent = translate_request(
        fields,
        model="m",
        dialect=Dialect(),
        stream=False,
        passed_fields=("top_k", "seed", "min_p", "temperature"),
    )
    assert sent == {"model": "m", "messages": [HI], "temperature": 0, "top_k": 5, "seed": 1, "stream": False}


def test_a_long_user_id_is_hashed() -> None:
    # OpenAI: "string too long. Expected a string with maximum length 64".
    assert translated(metadata={"user_id": "u"})["user"] == "u"
    long = translated(metadata={"user_id": "u" * 65})["user"]
    assert len(long) == MAX_USER_CHARS
    assert (
        long
        == translated(metadata={"user_id": "u" * 65})["user"]
        != translated(metadata={"user_id": "u" * 66})["user"]
    )
    for metadata in (None, {}, {"user_id": None}, {"user_id": 7}):
        assert "user" not in translated(metadata=metadata)
    assert "user" not in translated(metadata={"user_id": "u"}, dialect=Dialect(takes_user=False))


# --- system and turns ----------------------------------------------------------------------------


def test_system_blocks() -> None:
    cached = {**text("a"), "cache_control": {"type": "ephemeral"}}
    assert translated(system=[cached, text("b")])["messages"][0] == {"role": "system", "content": "ab"}
    assert translated(system="")["messages"] == translated(system=[])["messages"] == [HI]
    assert problem(system=[{"type": "image", "source": PNG}]) == (
        "system.0: a block of type 'image' cannot stand in system content"
    )


def test_a_system_message_in_mid_conversation() -> None:
    turns: list[dict[str, Any]] = [HI, {"role": "system", "content": [text("Now"), text(" rhyme.")]}, HI]
    assert messages(*turns) == [HI, {"role": "system", "content": "Now rhyme."}, HI]


def test_text_alone_is_a_string() -> None:
    assert messages(user(text("a"), text("b"))) == [{"role": "user", "content": "a\nb"}]


def test_images() -> None:
    url = {"type": "image", "source": {"type": "url", "url": "https://x/y.png"}}
    (sent,) = messages(user(text("a"), {"type": "image", "source": PNG}, url))
    assert sent["content"] == [
        {"type": "text", "text": "a"},
        PNG_PART,
        {"type": "image_url", "image_url": {"url": "https://x/y.png"}},
    ]


def test_documents_with_text() -> None:
    plain = {"type": "document", "title": "T", "context": "C", "source": {"type": "text", "data": "D"}}
    string = {"type": "document", "source": {"type": "content", "content": "E"}}
    parts = {"type": "content", "content": [text("F"), {"type": "image", "source": PNG}]}
    (sent,) = messages(user(plain, string))
    assert sent["content"] == "T\nC\nD\nE"
    (sent,) = messages(user({"type": "document", "source": parts}))
    assert sent["content"] == [{"type": "text", "text": "F"}, PNG_PART]


def test_search_results() -> None:
    block = {"type": "search_result", "title": "T", "source": "https://x", "content": [text("a"), text("b")]}
    assert messages(user(block)) == [{"role": "user", "content": "T\nhttps://x\na\nb"}]


@pytest.mark.parametrize("key", sorted(key for key, rule in SOURCES.items() if rule.fate is Fate.REFUSED))
def test_other_sources_are_refused_by_name(key: tuple[str, str]) -> None:
    kind, source = key
    turn = user(text("a"), {"type": kind, "source": {"type": source}})
    shown = problem(messages=[HI, turn])
    assert shown.startswith(f"messages.1.content.1.source: the source type '{source}' cannot be used: ")


def test_a_tool_loop() -> None:
    turns: list[dict[str, Any]] = [
        HI,
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "s"},
                {"type": "redacted_thinking", "data": "x"},
                text("I see."),
                {"type": "tool_use", "id": "a", "name": "f", "input": {"x": "é"}},
                {"type": "tool_use", "id": "b", "name": "g", "input": {}},
            ],
        },
        user(result("b", [text("1"), text("2")]), result("a", "no", is_error=True), text("and?")),
    ]
    assert messages(*turns) == [
        HI,
        {
            "role": "assistant",
            "content": "I see.",
            "tool_calls": [
                {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x":"é"}'}},
                {"id": "b", "type": "function", "function": {"name": "g", "arguments": "{}"}},
            ],
        },
        {"role": "tool", "tool_call_id": "b", "content": "1\n2"},
        {"role": "tool", "tool_call_id": "a", "content": "Error: no"},
        {"role": "user", "content": "and?"},
    ]


def test_results_come_before_all_else_as_they_must() -> None:
    roles = [m["role"] for m in messages(user(text("a"), result("x"), text("b"), result("y")))]
    assert roles == ["tool", "tool", "user"]


def test_images_of_results_follow_in_a_user_message() -> None:
    picture = {"type": "image", "source": PNG}
    sent = messages(user(result("a", [text("see"), picture]), result("b", [picture]), text("so?")))
    assert sent[0] == {"role": "tool", "tool_call_id": "a", "content": "see"}
    assert sent[1]["content"] == "The result is in the images of the next user message."
    assert [part["type"] for part in sent[2]["content"]] == ["text", "image_url", "text", "image_url", "text"]
    assert "a" in sent[2]["content"][0]["text"]
    assert sent[2]["content"][-1]["text"] == "so?"


@pytest.mark.parametrize("content", [None, "", []])
def test_empty_results(content: object) -> None:
    assert messages(user(result("a", content)))[0]["content"] == ""
    assert messages(user(result("a", content, is_error=True)))[0]["content"] == "Error"


def test_calls_without_text_have_no_content() -> None:
    call = {"type": "tool_use", "id": "a", "name": "f", "input": None}
    (sent,) = messages({"role": "assistant", "content": [call]})
    assert sent["content"] is None
    assert messages({"role": "assistant", "content": []}) == [{"role": "assistant", "content": ""}]


def test_thinking_goes_back_where_it_is_wanted() -> None:
    turn = {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm"}, text("a")]}
    assert messages(turn) == [{"role": "assistant", "content": "a"}]
    (sent,) = messages(turn, dialect=Dialect(reasoning_history="reasoning_content"))
    assert sent["reasoning_content"] == "hm"


def test_ids_that_must_be_short() -> None:
    # Mistral: "must be a-z, A-Z, 0-9, with a length of 9".
    call = {"type": "tool_use", "id": "toolu_01", "name": "f", "input": {}}
    turns = [{"role": "assistant", "content": [call]}, user(result("toolu_01"), result("abcdefgh9"))]
    sent = messages(*turns, dialect=Dialect(short_call_ids=True))
    id_ = sent[0]["tool_calls"][0]["id"]
    assert len(id_) == 9
    assert [sent[1]["tool_call_id"], sent[2]["tool_call_id"]] == [id_, "abcdefgh9"]


@pytest.mark.parametrize(
    "kind", [kind for kind, rule in BLOCKS.items() if rule.fate is Fate.REFUSED] + ["tomorrow's"]
)
def test_other_blocks_are_refused_by_name(kind: str) -> None:
    for role in ("user", "assistant"):
        turn = {"role": role, "content": [text("a"), {"type": kind}]}
        assert problem(messages=[HI, HI, HI, turn]).startswith("messages.3.content.1: the block type ")
    nested = user(result("a", [{"type": kind}]))
    assert problem(messages=[nested]).startswith("messages.0.content.0.content.0: ")


def test_every_place_takes_what_the_table_says() -> None:
    known = {kind for kinds in PLACES.values() for kind in kinds}
    assert known == {kind for kind, rule in BLOCKS.items() if rule.fate is not Fate.REFUSED}


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"messages": "x"}, "messages"),
        ({"messages": ["x"]}, "messages.0"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages.0.content"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [user({"type": "text"})]}, "messages.0.content.0.text"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages.0.content.0"),
        ({"messages": [user({"type": "image"})]}, "messages.0.content.0.source"),
        (
            {"messages": [user({"type": "image", "source": {"type": "base64"}})]},
            "messages.0.content.0.source.media_type",
        ),
        ({"messages": [user({"type": "image", "source": {"type": "new"}})]}, "messages.0.content.0.source"),
        ({"messages": [user({"type": "tool_result"})]}, "messages.0.content.0.tool_use_id"),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_use"}]}]}, "messages.0.content.0.id"),
        ({"system": 7}, "system"),
        ({"tools": {}, "messages": [HI], "output_config": 7}, "output_config"),
        ({"tools": "x"}, "tools"),
        ({"tools": ["x"]}, "tools.0"),
        ({"tools": [TOOL, {}]}, "tools.1.name"),
        ({"tools": [TOOL], "tool_choice": "any"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "x"}}, "tool_choice.type"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"output_config": {"format": {"type": "x"}}}, "output_config.format.type"),
        ({"output_format": {"type": "json_schema"}}, "output_format.schema"),
    ],
)
def test_what_has_the_wrong_shape_is_named(fields: dict[str, Any], place: str) -> None:
    assert problem(**fields).startswith(f"{place}: ")
