"""The chunks of a Chat Completions stream to the frames of a Messages stream, without I/O.

What an upstream sends is a bag of pieces: text, thinking and tool calls in any order, calls side by side by
their index, usage before, after, in every chunk or never. What leaves is in the contract's order, one block
at a time, each opened and closed once::

    message_start ( content_block_start content_block_delta* content_block_stop )* message_delta message_stop

How it works: blocks stand in a queue in the order in which they began. The first is open, and its pieces
leave at once; those of the others wait. A text or thinking block is over when anything else begins, a tool
call when something else begins and its arguments are a whole JSON object, or else at the end. So calls that
come one after the other are streamed as they come, and those that are interleaved are put in order.

What ends the message is kept back until the upstream has ended, since usage may follow the finish reason.

https://platform.openai.com/docs/api-reference/chat-streaming, https://docs.anthropic.com/en/api/messages-streaming
"""

from collections import deque
from collections.abc import Container, Mapping
from typing import Any

import orjson

from actors.errors import UpstreamProtocolError
from actors.providers.base import Frame
from actors.providers.openai.errors import interruption, stream_error
from actors.providers.openai.response import (
    arguments_of,
    estimated_usage,
    message_id,
    model_of,
    object_text,
    reasoning_of,
    split_content,
    stop_of,
    tool_id,
    usage_of,
)
from actors.providers.upstream_errors import Scrubber

_DONE = b"[DONE]"
_MESSAGE_STOP = b'{"type":"message_stop"}'
_NO_USAGE = {"cache_read_input_tokens": 0, "input_tokens": 0, "output_tokens": 0}
_EMPTY_BLOCKS: dict[str, dict[str, Any]] = {
    "text": {"type": "text", "text": ""},
    "thinking": {"type": "thinking", "thinking": "", "signature": ""},
}
_DELTA_HEAD = b'{"type":"content_block_delta","index":%d,"delta":{"type":%b'
_DELTAS = {
    "text": b'"text_delta","text":',
    "thinking": b'"thinking_delta","thinking":',
    "tool": b'"input_json_delta","partial_json":',
}


class _Block:
    """A content block that is not closed."""

    __slots__ = ("closed", "head", "kind", "name", "passing", "pieces", "upstream_id", "waiting")

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.upstream_id = ""
        self.name = ""
        self.head = b""
        """What a delta begins with; empty until the block is open."""
        self.waiting: list[str] = []
        """Pieces that have not left."""
        self.pieces: list[str] = []
        """Of a tool call: all its arguments."""
        self.passing: bool | None = True if kind != "tool" else None
        """Whether pieces leave as they come. Of a tool call: whether it is an object; None: not seen yet."""
        self.closed = False

    @property
    def whole(self) -> bool:
        """Whether it needs nothing more."""
        if self.kind != "tool" or self.closed:
            return True
        text = "".join(self.pieces)
        try:
            return bool(self.name) and text.rstrip().endswith("}") and isinstance(orjson.loads(text), dict)
        except orjson.JSONDecodeError:
            return False


class StreamTranslator:
    """Translates one stream. Chunks go into :meth:`feed`; :meth:`finish` says the end.

    Each raises ProviderError where the upstream tells an error or breaks its protocol; the frames returned
    before stand, and the translator is then of no more use.
    """

    def __init__(self, *, model: str, scrub: Scrubber, stop_sequences: Container[str] = ()) -> None:
        """``model`` is what the Message names where the upstream names none."""
        self.done = False
        """``[DONE]`` was seen; nothing after it is read."""
        self._model = model
        self._scrub = scrub
        self._stop_sequences = stop_sequences
        self._started = False
        self._finish: Mapping[str, Any] | None = None
        self._usage: dict[str, Any] | None = None
        self._refused = False
        self._chars = 0
        self._next_index = 0
        self._queue: deque[_Block] = deque()
        self._last_call: _Block | None = None
        self._by_id: dict[str, _Block] = {}
        self._by_index: dict[int, _Block] = {}
        self._used_ids: set[str] = set()

    @property
    def complete(self) -> bool:
        """Whether the upstream may end here: it gave a finish reason, or said ``[DONE]``."""
        return self._started and (self.done or self._finish is not None)

    @property
    def started(self) -> bool:
        """Whether there is a message at all."""
        return self._started

    def usage(self, *, input_tokens: int = 0) -> dict[str, Any]:
        """What was used so far: as told by the upstream, else an estimate (of ``input_tokens``, too)."""
        return self._usage or estimated_usage(input_tokens, self._chars)

    @property
    def counted(self) -> bool:
        """Whether the upstream told a usage."""
        return self._usage is not None

    def feed(self, event: str, data: bytes) -> list[Frame]:
        """Take one server-sent event; the frames that can leave now."""
        if self.done:
            return []
        if data == _DONE or data.strip() == _DONE:
            self.done = True
            return []
        chunk = _parse(data)
        if event == "error" or chunk.get("error") or chunk.get("object") == "error":
            raise stream_error(chunk, self._scrub)
        if (chunk.get("usage") or "x_groq" in chunk) and (usage := usage_of(chunk)):
            self._usage = usage
        choices = chunk.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices else None
        if not isinstance(choice, dict):
            return []
        frames: list[Frame] = []
        if not self._started:
            self._start(chunk, frames)
        delta = choice.get("delta")
        if isinstance(delta, dict):
            self._delta(delta, frames)
        if choice.get("finish_reason") and self._finish is None:
            if (given_up := interruption(choice)) is not None:
                raise given_up
            self._finish = choice
        return frames

    def finish(self, *, input_tokens: int = 0) -> list[Frame]:
        """The upstream has ended: what is left to say. Call it once, when :attr:`complete`.

        ``input_tokens`` is an estimate for an upstream that never told a usage.
        """
        if not self._started:
            raise UpstreamProtocolError("the upstream ended its stream before it had begun")
        frames: list[Frame] = []
        while self._queue:
            self._open(frames)
            self._close(frames)
        stop_reason, stop_sequence = stop_of(
            self._finish or {},
            has_tools=self._last_call is not None,
            refused=self._refused,
            stop_sequences=self._stop_sequences,
        )
        end = {
            "type": "message_delta",
            "delta": {"stop_reason": stop_reason, "stop_sequence": stop_sequence},
            "usage": self.usage(input_tokens=input_tokens),
        }
        frames.append(_frame("message_delta", orjson.dumps(end)))
        frames.append(_frame("message_stop", _MESSAGE_STOP))
        return frames

    # -- pieces ----------------------------------------------------------------------------------

    def _start(self, chunk: Mapping[str, Any], frames: list[Frame]) -> None:
        self._started = True
        message: dict[str, Any] = {
            "id": message_id(chunk.get("id")),
            "type": "message",
            "role": "assistant",
            "content": [],
            "model": model_of(chunk, self._model),
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {**(self._usage or _NO_USAGE), "output_tokens": 0},
        }
        frames.append(_frame("message_start", orjson.dumps({"type": "message_start", "message": message})))

    def _delta(self, delta: Mapping[str, Any], frames: list[Frame]) -> None:
        thinking = reasoning_of(delta)
        content = delta.get("content")
        if content and not isinstance(content, str):
            more, content = split_content(content)
            thinking += more
        if thinking:
            self._say("thinking", thinking, frames)
        if content:
            self._say("text", content, frames)
        refusal = delta.get("refusal")
        if refusal and isinstance(refusal, str):
            self._refused = True
            self._say("text", refusal, frames)
        calls = delta.get("tool_calls")
        if calls and isinstance(calls, list):
            for call in calls:
                self._call(call, frames)

    def _say(self, kind: str, piece: str, frames: list[Frame]) -> None:
        block = self._queue[-1] if self._queue else None
        if block is None or block.kind != kind:
            block = self._append(_Block(kind), frames)
        self._chars += len(piece)
        self._put(block, piece, frames)

    def _call(self, call: object, frames: list[Frame]) -> None:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(call, dict) or not isinstance(function, dict):
            raise UpstreamProtocolError("the upstream sent a tool call without a function")
        id_, name = _text(call.get("id")), _text(function.get("name"))
        index = call.get("index")
        block = self._find(index, id_, name)
        if block is None:
            block = _Block("tool")
            block.upstream_id, block.name = id_, name
            self._last_call = block
            self._by_id.setdefault(id_, block)
            if isinstance(index, int):
                self._by_index[index] = block
            self._append(block, frames)
        elif not block.name and name:
            block.name = name
            block.upstream_id = block.upstream_id or id_
            self._advance(frames)
        if piece := arguments_of(function):
            if block.closed:
                if piece.strip():
                    raise UpstreamProtocolError("the upstream went on with a tool call that was over")
                return
            block.pieces.append(piece)
            self._chars += len(piece)
            self._put(block, piece, frames)

    def _find(self, index: object, id_: str, name: str) -> _Block | None:
        """The call that a piece belongs to; None for a new one.

        Some send no index, and Gemini and Ollama one index for all: there another id, or a name after whole
        arguments, begins a call.
        """
        if isinstance(index, int):
            block = self._by_index.get(index)
            if block is None or not name:
                return block
            if id_ and block.upstream_id:
                return block if id_ == block.upstream_id else None
            return None if not id_ and block.name and block.whole else block
        if id_:
            known = self._by_id.get(id_)
            return known if known or name else self._last_call
        return None if name else self._last_call

    # -- the queue -------------------------------------------------------------------------------

    def _append(self, block: _Block, frames: list[Frame]) -> _Block:
        self._queue.append(block)
        self._advance(frames)
        return block

    def _advance(self, frames: list[Frame]) -> None:
        """Close what is over, and open what comes next."""
        while len(self._queue) > 1 and self._queue[0].whole:
            self._open(frames)
            self._close(frames)
        first = self._queue[0]
        if first.kind != "tool" or first.name:
            self._open(frames)

    def _open(self, frames: list[Frame]) -> None:
        """Open the first block, unless it is, and let its pieces go."""
        block = self._queue[0]
        if block.head:
            return
        if block.kind == "tool":
            if not block.name:
                raise UpstreamProtocolError("the upstream sent a tool call without a name")
            id_ = tool_id(block.upstream_id, self._used_ids)
            start = {"type": "tool_use", "id": id_, "name": block.name, "input": {}}
        else:
            start = _EMPTY_BLOCKS[block.kind]
        index = self._next_index
        self._next_index += 1
        block.head = _DELTA_HEAD % (index, _DELTAS[block.kind])
        data = orjson.dumps({"type": "content_block_start", "index": index, "content_block": start})
        frames.append(_frame("content_block_start", data))
        if block.waiting and block.passing:
            waiting, block.waiting = "".join(block.waiting), []
            self._put(block, waiting, frames)

    def _put(self, block: _Block, piece: str, frames: list[Frame]) -> None:
        """Let a piece go, if its block is open and, for a tool call, is an object."""
        if block.passing is None and (begun := piece.lstrip()):
            block.passing = begun.startswith("{")
        if not block.head or not block.passing:
            block.waiting.append(piece)
            return
        if block.waiting:
            piece, block.waiting = "".join([*block.waiting, piece]), []
        frames.append(_frame("content_block_delta", block.head + orjson.dumps(piece) + b"}}"))

    def _close(self, frames: list[Frame]) -> None:
        """Close the first block, which is open."""
        block = self._queue.popleft()
        if not block.passing and (text := object_text("".join(block.waiting))):
            frames.append(_frame("content_block_delta", block.head + orjson.dumps(text) + b"}}"))
        block.closed = True
        block.waiting, block.pieces = [], []
        index = self._next_index - 1
        frames.append(
            _frame("content_block_stop", b'{"type":"content_block_stop","index":%d}' % index),
        )


def _frame(event: str, data: bytes) -> Frame:
    return Frame(event, data, b"event: %b\ndata: %b\n\n" % (event.encode(), data))


def _parse(data: bytes) -> Mapping[str, Any]:
    try:
        chunk = orjson.loads(data)
    except orjson.JSONDecodeError:
        raise UpstreamProtocolError("the upstream sent a chunk that is not JSON") from None
    if not isinstance(chunk, dict):
        raise UpstreamProtocolError("the upstream sent a chunk that is not a JSON object")
    return chunk


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""
