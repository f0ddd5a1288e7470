"""The Message that a stream spells out: a fold of Anthropic stream frames.

Order of a stream (https://docs.anthropic.com/en/api/messages-streaming)::

    message_start
      ( content_block_start  content_block_delta*  content_block_stop )*     blocks may be interleaved
    message_delta+
    message_stop

``ping`` may stand anywhere. Event types we do not know may stand anywhere between ``message_start`` and
``message_stop``; they are left out, as are delta types we do not know: the API grows.

The result equals what the plain call would have answered. Numbers are as orjson reads them: integers
beyond 64 bits become floats.
"""

from enum import IntEnum
from typing import Any

import orjson
from pydantic_core import from_json

from events.errors import BadFrameError

# Delta types whose string is appended to what the block has. The delta and the block name it alike.
_APPENDED = {
    "text_delta": "text",
    "thinking_delta": "thinking",
    "signature_delta": "signature",
    "input_json_delta": "partial_json",
}
# Parts of a message_delta that are not fields of the Message under the same name.
_NOT_TOP_LEVEL = frozenset({"type", "content", "usage", "delta"})


class _Phase(IntEnum):
    NEW = 0
    CONTENT = 1
    ENDING = 2
    STOPPED = 3


class _Block:
    """A content block that is still open."""

    __slots__ = ("citations", "pieces", "start")

    def __init__(self, start: dict[str, Any]) -> None:
        self.start = start
        self.pieces: dict[str, list[str]] = {}
        self.citations: list[Any] = []

    def finish(self) -> dict[str, Any]:
        """The whole block. Raises BadFrameError when its streamed input is not JSON."""
        block = self.start
        for name, pieces in self.pieces.items():
            text = "".join(pieces)
            if name == "partial_json":
                block["input"] = parse_input(text, block.get("input"))
            else:
                before = block.get(name)
                block[name] = before + text if isinstance(before, str) else text
        if self.citations:
            before = block.get("citations")
            block["citations"] = [*before, *self.citations] if isinstance(before, list) else self.citations
        return block


class MessageFold:
    """Folds the frames of one stream.

    With ``keep_content=False`` it checks the order and follows the usage, and stores no content; it then
    raises as it would otherwise, except that streamed tool input is not parsed.
    """

    def __init__(self, *, keep_content: bool = True) -> None:
        self._keep_content = keep_content
        self._phase = _Phase.NEW
        self._content_started = False
        self._message: dict[str, Any] = {}
        self._usage: dict[str, Any] = {}
        self._first_blocks: list[Any] = []
        self._used: set[int] = set()
        self._open: dict[int, _Block | None] = {}
        self._done: dict[int, dict[str, Any]] = {}

    @property
    def started(self) -> bool:
        """Whether ``message_start`` was seen."""
        return self._phase is not _Phase.NEW

    @property
    def finished(self) -> bool:
        """Whether ``message_stop`` was seen."""
        return self._phase is _Phase.STOPPED

    @property
    def content_started(self) -> bool:
        """Whether the first ``content_block_start``, or what follows the content, was seen."""
        return self._content_started

    @property
    def usage(self) -> dict[str, Any]:
        """A copy of the usage so far.

        That of ``message_start``, overridden key by key by each ``message_delta``, whose counts are
        cumulative; null overrides nothing. Can always be written as JSON.
        """
        return dict(self._usage)

    @property
    def model(self) -> str:
        """The model as the upstream names it; empty while unknown."""
        return _text(self._message.get("model"))

    @property
    def message_id(self) -> str:
        """The upstream's id of the Message; empty while unknown."""
        return _text(self._message.get("id"))

    def apply(self, event: str, data: bytes) -> None:
        """Take the next frame.

        Raises BadFrameError, and nothing else, when ``data`` is not a JSON object, has the wrong shape
        where we read it, or comes out of order. ``error`` frames are not for the fold: the caller ends the
        attempt. A fold that has raised is of no more use, but for :attr:`usage`.
        """
        try:
            frame = orjson.loads(data)
        except orjson.JSONDecodeError:
            raise BadFrameError("a frame's data is not JSON") from None
        if not isinstance(frame, dict):
            raise BadFrameError("a frame's data is not a JSON object")
        # Nearly all frames are deltas.
        if event == "content_block_delta":
            self._block_delta(frame)
            return
        match event:
            case "content_block_start":
                self._expect(_Phase.CONTENT, event, frame)
                self._block_start(frame)
            case "content_block_stop":
                self._expect(_Phase.CONTENT, event, frame)
                self._block_stop(frame)
            case "message_start":
                self._expect(_Phase.NEW, event, frame)
                self._message_start(frame)
            case "message_delta":
                self._expect(max(self._phase, _Phase.CONTENT), event, frame)
                self._message_delta(frame)
            case "message_stop":
                self._expect(_Phase.ENDING, event, frame)
                self._phase = _Phase.STOPPED
            case "error":
                raise BadFrameError("an error frame is no part of a Message")
            case "ping":
                pass
            case _ if self._phase in (_Phase.NEW, _Phase.STOPPED):
                raise BadFrameError("a frame of unknown type before message_start or after message_stop")

    def message(self) -> dict[str, Any]:
        """The finished Message.

        The outer object is the caller's; what is inside is shared with the fold. Raises BadFrameError
        before ``message_stop``, ValueError without ``keep_content``.
        """
        if not self._keep_content:
            raise ValueError("the content was not kept")
        if not self.finished:
            raise BadFrameError("the stream has no message_stop")
        blocks = [self._done[index] for index in sorted(self._done)]
        return {**self._message, "content": [*self._first_blocks, *blocks], "usage": dict(self._usage)}

    def message_json(self) -> bytes:
        """The finished Message as JSON. Raises as :meth:`message`; BadFrameError if too deeply nested."""
        return _dump(self.message())

    def _expect(self, phase: _Phase, event: str, frame: dict[str, Any]) -> None:
        if self._phase is not phase or self._phase is _Phase.STOPPED:
            raise BadFrameError(f"{event} out of order")
        if frame.get("type", event) != event:
            raise BadFrameError(f"the data of a {event} frame names another type")

    def _message_start(self, frame: dict[str, Any]) -> None:
        message = _object(frame, "message")
        content = message.get("content")
        if content is not None and not isinstance(content, list):
            raise BadFrameError("content is not a list")
        self._merge_usage(message)
        if self._keep_content:
            self._first_blocks = content or []
        # The keys stay where they came, so that the finished Message has the upstream's order.
        self._message = {**message, "content": None, "usage": None}
        self._phase = _Phase.CONTENT

    def _block_start(self, frame: dict[str, Any]) -> None:
        index = _index(frame)
        block = _object(frame, "content_block")
        kind = block.get("type")
        if not isinstance(kind, str):
            raise BadFrameError("a content block has no type")
        if index in self._used:
            raise BadFrameError("two content blocks with one index")
        self._used.add(index)
        self._content_started = True
        if kind == "fallback":
            self._serve_by(block.get("to"))
        self._open[index] = _Block(block) if self._keep_content else None

    def _serve_by(self, to: object) -> None:
        """A plain answer carries the model that served it in the end; in a stream this block names it."""
        if isinstance(to, dict) and isinstance(to.get("model"), str):
            self._message["model"] = to["model"]

    def _block_delta(self, frame: dict[str, Any]) -> None:
        if self._phase is not _Phase.CONTENT or frame.get("type") != "content_block_delta":
            self._expect(_Phase.CONTENT, "content_block_delta", frame)
        index = frame.get("index")
        if type(index) is not int or index not in self._open:
            index = self._open_index(frame)
        delta = frame.get("delta")
        if not isinstance(delta, dict):
            delta = _object(frame, "delta")
        kind = delta.get("type")
        if not isinstance(kind, str):
            raise BadFrameError("a delta has no type")
        block = self._open[index]
        name = _APPENDED.get(kind)
        if name is not None:
            piece = delta.get(name)
            if not isinstance(piece, str):
                raise BadFrameError(f"{kind} without its string")
            if block is not None:
                if (pieces := block.pieces.get(name)) is None:
                    pieces = block.pieces[name] = []
                pieces.append(piece)
        elif kind == "citations_delta":
            if "citation" not in delta:
                raise BadFrameError("citations_delta without a citation")
            if block is not None:
                block.citations.append(delta["citation"])
        elif kind == "compaction_delta" and block is not None:
            block.start |= {key: value for key, value in delta.items() if key != "type"}

    def _block_stop(self, frame: dict[str, Any]) -> None:
        index = self._open_index(frame)
        block = self._open.pop(index)
        if block is not None:
            self._done[index] = block.finish()

    def _message_delta(self, frame: dict[str, Any]) -> None:
        if self._open:
            raise BadFrameError("message_delta while a content block is open")
        delta = _object(frame, "delta")
        self._merge_usage(frame)
        self._phase = _Phase.ENDING
        self._content_started = True
        if self._keep_content:
            _overlay(self._message, frame)
            _overlay(self._message, delta)

    def _merge_usage(self, holder: dict[str, Any]) -> None:
        usage = holder.get("usage")
        if usage is None:
            return
        if not isinstance(usage, dict):
            raise BadFrameError("usage is not an object")
        # Usage ends in events, a few levels deep: what could not be written there is refused here.
        _dump([[[[usage]]]])
        _overlay(self._usage, usage, skip=frozenset())

    def _open_index(self, frame: dict[str, Any]) -> int:
        index = _index(frame)
        if index not in self._open:
            raise BadFrameError("the content block is not open")
        return index


def _overlay(
    target: dict[str, Any], source: dict[str, Any], *, skip: frozenset[str] = _NOT_TOP_LEVEL
) -> None:
    """Set what ``source`` says; null only where ``target`` knows nothing."""
    for key, value in source.items():
        if key not in skip and (value is not None or key not in target):
            target[key] = value


def parse_input(text: str, before: object = None) -> Any:
    """The tool input that streamed pieces spell; without any, what the block started with, or ``{}``.

    Input that ``max_tokens`` cut off is read as far as it goes, as the official SDKs read it. Raises
    BadFrameError for what is no JSON.
    """
    if not text:
        return {} if before is None else before
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        pass
    try:
        return from_json(text, allow_partial=True)
    except ValueError:
        raise BadFrameError("the streamed tool input is not JSON") from None


def _dump(value: object) -> bytes:
    try:
        return orjson.dumps(value)
    except orjson.JSONEncodeError:
        # orjson reads 1024 levels and writes 254; nothing else that it has read can fail here.
        raise BadFrameError("the Message is nested too deeply") from None


def _object(holder: dict[str, Any], key: str) -> dict[str, Any]:
    value = holder.get(key)
    if not isinstance(value, dict):
        raise BadFrameError(f"{key} is not an object")
    return value


def _index(frame: dict[str, Any]) -> int:
    index = frame.get("index")
    if type(index) is not int or index < 0:
        raise BadFrameError("index is not a whole number")
    return index


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""
