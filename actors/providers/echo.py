"""The provider that needs nothing: it streams the last user text back, word by word.

Deterministic but for the message id, and cheap, since scenarios, faults and benchmarks run on it. What it
counts as tokens are words: runs of anything but white space.
"""

import re
import secrets
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from itertools import islice
from typing import Any

import orjson
import trio

from actors.errors import UnsupportedError, UpstreamProtocolError, UpstreamStatusError
from actors.providers.base import (
    Completion,
    ForwardAnswer,
    ForwardCall,
    Frame,
    FrameSource,
    ProviderCall,
    TokenCount,
)
from actors.providers.options import EchoOptions

MAX_FRAMES_AT_ONCE = 64
"""Frames that leave in one ``receive`` where no delay separates them."""

_WORD = re.compile(r"\S+\s*|\s+")
_FALLBACK_WORD = "echo "
_ERROR_TEXT = "echo was told to fail here"
_ERROR_TYPE = "overloaded_error"
_ERROR_STATUS = 529


def _frame(event: str, data: bytes) -> Frame:
    return Frame(event, data, b"event: " + event.encode() + b"\ndata: " + data + b"\n\n")


_BLOCK_START = _frame(
    "content_block_start",
    b'{"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}}',
)
_BLOCK_STOP = _frame("content_block_stop", b'{"type":"content_block_stop","index":0}')
_MESSAGE_STOP = _frame("message_stop", b'{"type":"message_stop"}')
_ERROR = _frame(
    "error",
    orjson.dumps({"type": "error", "error": {"type": _ERROR_TYPE, "message": _ERROR_TEXT}}),
)
_DELTA_START = b'{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":'
_DELTA_END = b"}}"


class EchoProvider:
    """Answers with the last user text. Satisfies :class:`actors.providers.base.Provider`.

    With ``frames`` the words go round until that many were sent. ``max_tokens`` cuts either, with
    ``stop_reason`` ``max_tokens``. An empty text is answered by an empty block. A script that fails after
    more deltas than the answer has never fails. Plain calls take as long as streams and fail as they do.
    """

    kind = "echo"

    def __init__(self, options: EchoOptions) -> None:
        self.name = options.name
        self._options = options

    async def complete(self, call: ProviderCall) -> Completion:
        """The Message that the fold of :meth:`open_stream` gives, id apart.

        A scripted failure in mid-stream is here an overloaded_error (529), an UpstreamProtocolError for
        ``hangup``, and no answer at all for ``stall``.
        """
        await self._begin()
        plan = _Plan(call.fields, self._options)
        words = list(plan.words())
        await trio.sleep(self._options.frame_delay_s * len(words))
        if plan.fails:
            await self._fail_plain()
        usage = {"input_tokens": plan.input_tokens, "output_tokens": len(words)}
        message = {
            **_message(call.requested_model),
            "content": [{"type": "text", "text": "".join(words)}],
            "stop_reason": plan.stop_reason,
            "usage": usage,
        }
        return Completion(orjson.dumps(message), usage)

    @asynccontextmanager
    async def open_stream(self, call: ProviderCall) -> AsyncIterator[FrameSource]:
        """``message_start`` leaves after ``first_frame_delay_s``, each delta ``frame_delay_s`` later."""
        if self._options.fail_status is not None:
            await self._begin()
        yield _EchoFrames(call, self._options)

    async def count_tokens(self, call: ProviderCall) -> TokenCount:
        """The number of words, at least 1."""
        return TokenCount(count_words(call.fields))

    async def forward(self, call: ForwardCall) -> ForwardAnswer:
        """Always UnsupportedError."""
        raise UnsupportedError(f"the provider {self.name} has no such path")

    async def _begin(self) -> None:
        await trio.sleep(self._options.first_frame_delay_s)
        status = self._options.fail_status
        if status is not None:
            raise UpstreamStatusError(f"echo was told to fail with status {status}", status=status)

    async def _fail_plain(self) -> None:
        match self._options.fail_mode:
            case "error":
                raise UpstreamStatusError(_ERROR_TEXT, status=_ERROR_STATUS, error_type=_ERROR_TYPE)
            case "hangup":
                raise UpstreamProtocolError("the upstream broke off in the middle of its answer")
            case "stall":
                await trio.sleep_forever()


class _Plan:
    """What one call will be answered with."""

    def __init__(self, fields: Mapping[str, Any], options: EchoOptions) -> None:
        self.input_tokens = count_words(fields)
        self.stop_reason = "end_turn"
        self.fails = False
        self._text = last_user_text(fields)
        limit = fields.get("max_tokens")
        self._limit = limit if isinstance(limit, int) and limit >= 0 else None
        self._frames = options.frames
        self._fail_after = options.fail_after_frames

    def words(self) -> Iterator[str]:
        """The deltas, up to where the answer ends; ``stop_reason`` and ``fails`` are right after the last."""
        sent = 0
        for word in self._all_words():
            if sent in (self._fail_after, self._limit):
                self.fails = sent == self._fail_after
                self.stop_reason = "max_tokens"
                return
            yield word
            sent += 1
        self.fails = sent == self._fail_after

    def _all_words(self) -> Iterator[str]:
        if self._frames is None:
            return (match.group() for match in _WORD.finditer(self._text))
        words = [word + " " for word in self._text.split()] or [_FALLBACK_WORD]
        return (words[i % len(words)] for i in range(self._frames))


class _EchoFrames:
    """A :class:`FrameSource`; makes its frames as they are asked for, so a long answer costs no memory."""

    upstream_request_id: str | None = None

    def __init__(self, call: ProviderCall, options: EchoOptions) -> None:
        self._options = options
        self._plan = _Plan(call.fields, options)
        self._model = call.requested_model
        self._deltas = map(_delta, self._plan.words())
        self._sent = 0
        self._state = "start"

    async def receive(self) -> list[Frame]:
        if self._state == "start":
            await trio.sleep(self._options.first_frame_delay_s)
            self._state = "deltas"
            if self._options.frame_delay_s > 0:
                return self._start()
            return [*self._start(), *self._next_deltas(MAX_FRAMES_AT_ONCE - 2)]
        await trio.lowlevel.checkpoint()
        if self._state == "deltas":
            return await self._more()
        return []

    def _start(self) -> list[Frame]:
        usage = {"input_tokens": self._plan.input_tokens, "output_tokens": 0}
        message = {**_message(self._model), "usage": usage}
        data = orjson.dumps({"type": "message_start", "message": message})
        return [_frame("message_start", data), _BLOCK_START]

    def _next_deltas(self, at_most: int) -> list[Frame]:
        deltas = list(islice(self._deltas, at_most))
        self._sent += len(deltas)
        return deltas

    async def _more(self) -> list[Frame]:
        delay_s = self._options.frame_delay_s
        deltas = self._next_deltas(1 if delay_s else MAX_FRAMES_AT_ONCE)
        if deltas:
            await trio.sleep(delay_s)
            return deltas
        self._state = "ended"
        if self._plan.fails:
            return await self._fail()
        delta = {
            "type": "message_delta",
            "delta": {"stop_reason": self._plan.stop_reason, "stop_sequence": None},
            "usage": {"input_tokens": self._plan.input_tokens, "output_tokens": self._sent},
        }
        return [_BLOCK_STOP, _frame("message_delta", orjson.dumps(delta)), _MESSAGE_STOP]

    async def _fail(self) -> list[Frame]:
        if self._options.fail_mode == "stall":
            await trio.sleep_forever()
        return [_ERROR] if self._options.fail_mode == "error" else []


def last_user_text(fields: Mapping[str, Any]) -> str:
    """The text of the last message of the user: a string, or its text blocks one after the other."""
    messages = fields.get("messages")
    for message in reversed(messages if isinstance(messages, list) else []):
        if not isinstance(message, dict) or message.get("role") != "user":
            continue
        content = message.get("content")
        if isinstance(content, str):
            return content
        blocks = content if isinstance(content, list) else []
        texts = (block.get("text") for block in blocks if isinstance(block, dict))
        return "".join(text for text in texts if isinstance(text, str))
    return ""


def count_words(fields: Mapping[str, Any]) -> int:
    """The words of system prompt and messages; a block without text counts as one. At least 1."""
    words = 0
    # A list instead of recursion: the nesting is the client's.
    todo: list[Any] = [fields.get("system"), fields.get("messages")]
    while todo:
        item = todo.pop()
        if isinstance(item, str):
            words += len(item.split())
        elif isinstance(item, list):
            todo += item
        elif isinstance(item, dict):
            inner = item.get("text", item.get("content"))
            if inner is None:
                words += 1
            else:
                todo.append(inner)
    return max(words, 1)


def _message(model: str) -> dict[str, Any]:
    return {
        # Unique and not a counter: ids of different runs meet in a durable log.
        "id": "msg_" + secrets.token_hex(12),
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
    }


def _delta(word: str) -> Frame:
    return _frame("content_block_delta", _DELTA_START + orjson.dumps(word) + _DELTA_END)
