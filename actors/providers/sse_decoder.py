"""Server-sent events, bytes in and frames out, without I/O.

Follows the WHATWG HTML standard, section 9.2.6 "Interpreting an event stream"
(https://html.spec.whatwg.org/multipage/server-sent-events.html), with two additions of this protocol:
a frame without ``event:`` is named after the ``type`` of its JSON, and ``id`` and ``retry`` mean nothing.

How it works: line ends become LF as bytes arrive, which needs one bit of memory (did the last byte say
CR?). After that a frame is what stands between blank lines, and a canonical one, as nearly all of them
are, is known without taking its lines apart. Every byte is searched and copied a constant number of
times, however the stream is cut.
"""

import orjson

from actors.errors import UpstreamProtocolError
from actors.providers.base import Frame

_BOM = b"\xef\xbb\xbf"
_LF = 0x0A
_DEFAULT_EVENT = "message"
_NAMES = {
    b"event: " + name.encode(): name
    for name in (
        "content_block_delta",
        "content_block_start",
        "content_block_stop",
        "message_delta",
        "message_start",
        "message_stop",
        "ping",
    )
}
"""First lines that nearly all frames have."""
_new = tuple.__new__


class SSEDecoder:
    """Decodes one event stream.

    ``max_frame_bytes`` bounds one frame: its lines with LF line ends, comments included, without the
    blank line that ends it. No more than this is ever held between two calls of :meth:`feed`.
    With ``named=False`` a frame without ``event:`` is a ``message``, as the standard has it, which spares
    parsing its data, and has no ``wire``: for streams that are translated.
    """

    def __init__(self, max_frame_bytes: int, *, named: bool = True) -> None:
        if max_frame_bytes < 1:
            raise ValueError("max_frame_bytes is at least 1")
        self._max_frame_bytes = max_frame_bytes
        self._decode = _decode_block if named else _decode_unnamed
        self._head: bytes | None = b""
        self._after_cr = False
        self._held = bytearray()
        self._too_large = False
        self._closed = False

    @property
    def pending(self) -> bool:
        """Whether a frame with data has begun and its blank line has not come.

        Stays readable after :meth:`close`, where it tells that the stream ended inside a frame.
        """
        return any(line.partition(b":")[0] == b"data" for line in bytes(self._held).split(b"\n"))

    def feed(self, data: bytes) -> list[Frame]:
        """Take the bytes of one read; return the frames they complete, in order.

        Raises UpstreamProtocolError for a frame over the bound, once the frames before it were returned:
        if this call completes some, the next call of :meth:`feed` or :meth:`close` raises. Nothing is
        decoded after that. Raises ValueError after :meth:`close`.
        """
        if self._closed:
            raise ValueError("the decoder is closed")
        self._refuse_too_large()
        text = self._normalise(data)
        if self._held:
            if not self._ends_held_frame(text):
                self._hold(text)
                self._refuse_too_large()
                return []
            text = bytes(self._held) + text
            self._held.clear()
        frames: list[Frame] = []
        blocks = text.split(b"\n\n")
        rest = blocks.pop()
        decode, bound = self._decode, self._max_frame_bytes
        for block in blocks:
            if len(block) > bound and self._is_too_large(block):
                self._too_large = True
                break
            frame = decode(block)
            if frame is not None:
                frames.append(frame)
        else:
            self._hold(rest)
        if not frames:
            self._refuse_too_large()
        return frames

    def close(self) -> None:
        """The stream has ended. As the standard says, a frame without its blank line is discarded.

        Raises UpstreamProtocolError where :meth:`feed` would have.
        """
        self._closed = True
        self._refuse_too_large()

    def _normalise(self, data: bytes) -> bytes:
        """The bytes with LF line ends and without the byte order mark."""
        if self._head is not None:
            data = self._head + data
            if len(data) < len(_BOM) and _BOM.startswith(data):
                self._head = data
                return b""
            self._head = None
            data = data.removeprefix(_BOM)
        if self._after_cr and data:
            self._after_cr = False
            data = data.removeprefix(b"\n")
        if b"\r" in data:
            # Dispatch need not wait for the LF of a CRLF: the CR alone ends the line.
            self._after_cr = data.endswith(b"\r")
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        return data

    def _ends_held_frame(self, text: bytes) -> bool:
        return b"\n\n" in text or (self._held[-1] == _LF and text.startswith(b"\n"))

    def _is_too_large(self, block: bytes) -> bool:
        """Whether a block, whole or not, is over the bound. LFs at its ends may belong to blank lines."""
        return len(block.strip(b"\n")) > self._max_frame_bytes

    def _hold(self, text: bytes) -> None:
        """Keep the beginning of a frame, unless it is over the bound already."""
        if not text:  # the LF of a CRLF that was cut in two
            return
        outer = len(self._held) + len(text)
        # A held LF at the front is the rest of blank lines, one at the back may become one.
        blank = self._held.startswith(b"\n") if self._held else text.startswith(b"\n")
        inner = outer - blank - (outer > 1 and text.endswith(b"\n"))
        if inner > self._max_frame_bytes:
            self._too_large = True
            return
        self._held += text

    def _refuse_too_large(self) -> None:
        if self._too_large:
            self._held.clear()
            raise UpstreamProtocolError(
                f"the upstream sent a frame of more than {self._max_frame_bytes} bytes"
            )


def encode_frame(event: str, data: bytes) -> bytes:
    r"""One frame for the wire: ``event: NAME\ndata: JSON\n\n``.

    Data of several lines becomes several ``data:`` lines, which a decoder joins with LF; a CR or CRLF in
    it is a line end like LF. Raises ValueError for an event name of several lines.
    """
    if "\n" in event or "\r" in event:
        raise ValueError("an event name has one line")
    if b"\r" in data:
        data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    if b"\n" in data:
        data = data.replace(b"\n", b"\ndata: ")
    return b"event: %b\ndata: %b\n\n" % (event.encode(), data)


def _decode_block(block: bytes) -> Frame | None:
    """A frame of the lines in ``block``; None when they carry no data."""
    first, _, data = block.partition(b"\ndata: ")
    name = _NAMES.get(first)
    if name is None and first.startswith(b"event: ") and len(first) > len(b"event: ") and b"\n" not in first:
        name = first[7:].decode("utf-8", "replace")
    if name is None or not data or b"\n" in data:
        return _decode_lines(block)
    # As Frame(...) does it, without its way through Python.
    return _new(Frame, (name, data, block + b"\n\n"))


def _decode_unnamed(block: bytes) -> Frame | None:
    """The same, without a look into the data."""
    if block.startswith(b"data: ") and b"\n" not in block:
        return Frame(_DEFAULT_EVENT, block[6:], b"")
    name, data = _fields(block)
    return Frame(name or _DEFAULT_EVENT, b"\n".join(data), b"") if data else None


def _decode_lines(block: bytes) -> Frame | None:
    event, lines = _fields(block)
    if not lines:
        return None
    data = b"\n".join(lines)
    if len(lines) > 1 or not event:
        parsed, is_json = _parse(data)
        if is_json:
            # In JSON a bare LF stands only between tokens, so the frame fits one data line unchanged.
            data = data.replace(b"\n", b" ")
        event = event or _type_of(parsed)
    return Frame(event, data, encode_frame(event, data))


def _fields(block: bytes) -> tuple[str, list[bytes]]:
    """The event name, empty if there is none, and the data lines."""
    name = b""
    lines: list[bytes] = []
    for line in block.split(b"\n"):
        field, _, value = line.partition(b":")
        if field == b"data":
            lines.append(value.removeprefix(b" "))
        elif field == b"event":
            name = value.removeprefix(b" ")
    return name.decode("utf-8", "replace"), lines


def _parse(data: bytes) -> tuple[object, bool]:
    try:
        return orjson.loads(data), True
    except orjson.JSONDecodeError:
        return None, False


def _type_of(parsed: object) -> str:
    """The event name that JSON data gives itself, where it can stand on an ``event:`` line."""
    name = parsed.get("type") if isinstance(parsed, dict) else None
    if not isinstance(name, str) or not name or "\n" in name or "\r" in name:
        return _DEFAULT_EVENT
    return name
