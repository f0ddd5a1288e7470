"""The body of a batch, taken apart while it arrives: ``{"requests": [{...}, {...}]}``, each as its own bytes.

No incremental JSON reader we know gives the bytes of a value, and prompt caches depend on them (see
:mod:`actors.providers.splice`). So only the frame is read here, the object and the array around the
requests, with the values in it skipped by their brackets; each is then parsed, and so checked, by orjson.
Held in memory is one request at most, beside what came with the last chunk. Grammar: RFC 8259.
"""

import re
from enum import Enum, auto
from typing import NamedTuple

import orjson

from service.errors import InvalidRequestError

MAX_OTHER_BYTES = 64 * 1024
"""Of a member of the body that is not ``requests``, and of a key."""

_SPACE = re.compile(rb"[ \t\n\r]*+")
_IN_STRING = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)
_SCALAR = re.compile(rb"[^ \t\n\r,}\]]*+")
# All that changes no depth: text between brackets, whole strings, and containers that hold neither.
_LEVEL = re.compile(rb'(?:[^\[\]{}"]++|"(?:[^"\\]++|\\.)*+"|[\[{][^\[\]{}"]*+[\]}])*+', re.DOTALL)
_OPENING = frozenset(b"[{")
_QUOTE = ord('"')


class _At(Enum):
    """What comes next."""

    OBJECT = auto()
    FIRST_KEY = auto()
    KEY = auto()
    COLON = auto()
    VALUE = auto()
    AFTER_VALUE = auto()
    FIRST_REQUEST = auto()
    REQUEST = auto()
    AFTER_REQUEST = auto()
    END = auto()


class RawRequest(NamedTuple):
    """One element of ``requests``."""

    place: int
    """Counted from 0."""
    raw: bytes
    """Not checked in any way but that its brackets match."""


class RequestTooLargeError(InvalidRequestError):
    """One request is larger than a Messages call may be."""

    status = 413


class BatchBodyReader:
    """Sans-I/O: bytes in, requests out. All errors are the client's."""

    def __init__(self, *, max_request_bytes: int) -> None:
        self._max_request_bytes = max_request_bytes
        self._buffer = bytearray()
        self._at = _At.OBJECT
        self._key = ""
        self._index = 0
        self._found = False
        # Where in the value under way the scan is, how deep, and whether within a string.
        self._scanned = 0
        self._depth = 0
        self._in_string = False

    def feed(self, chunk: bytes) -> list[RawRequest]:
        """Take the next bytes; the requests that they complete.

        Raises InvalidRequestError for what is no JSON object with one array ``requests``, and
        RequestTooLargeError.
        """
        self._buffer += chunk
        requests: list[RawRequest] = []
        start = 0
        while True:
            start = _end(_SPACE, self._buffer, start)
            if start == len(self._buffer):
                break
            end = self._step(start, requests)
            if end is None:
                break
            start = end
        del self._buffer[:start]
        return requests

    def finish(self) -> int:
        """The body is over; how many requests it had. Raises InvalidRequestError where it breaks off."""
        if self._at is not _At.END or self._buffer:
            raise _invalid("it breaks off")
        if not self._found:
            raise InvalidRequestError("requests: Field required")
        return self._index

    def _step(self, start: int, requests: list[RawRequest]) -> int | None:
        """Read what begins at ``start``; where it ends, None when not all of it is here."""
        byte = bytes(self._buffer[start : start + 1])
        match self._at:
            case _At.OBJECT:
                self._expect(byte, b"{", _At.FIRST_KEY)
            case _At.FIRST_KEY | _At.KEY:
                if byte == b"}" and self._at is _At.FIRST_KEY:
                    self._at = _At.END
                else:
                    return self._read_key(start)
            case _At.COLON:
                self._expect(byte, b":", _At.VALUE)
            case _At.VALUE:
                return self._read_value(start)
            case _At.AFTER_VALUE:
                self._one_of(byte, {b",": _At.KEY, b"}": _At.END})
            case _At.FIRST_REQUEST | _At.REQUEST:
                if byte == b"]" and self._at is _At.FIRST_REQUEST:
                    self._at = _At.AFTER_VALUE
                else:
                    return self._read_request(start, requests)
            case _At.AFTER_REQUEST:
                self._one_of(byte, {b",": _At.REQUEST, b"]": _At.AFTER_VALUE})
            case _At.END:
                raise _invalid("more follows after its end")
        return start + 1

    def _expect(self, byte: bytes, wanted: bytes, then: _At) -> None:
        self._one_of(byte, {wanted: then})

    def _one_of(self, byte: bytes, wanted: dict[bytes, _At]) -> None:
        if byte not in wanted:
            raise _invalid(f"{' or '.join(one.decode() for one in wanted)} expected")
        self._at = wanted[byte]

    def _read_key(self, start: int) -> int | None:
        if self._buffer[start] != _QUOTE:
            raise _invalid("a key expected")
        end = self._value_end(start, MAX_OTHER_BYTES)
        if end is not None:
            self._key = _loaded(bytes(self._buffer[start:end]))
            self._at = _At.COLON
        return end

    def _read_value(self, start: int) -> int | None:
        if self._key == "requests":
            if self._found:
                raise InvalidRequestError("requests: it is given twice")
            if self._buffer[start] != ord("["):
                raise InvalidRequestError("requests: Input should be a valid list")
            self._found = True
            self._at = _At.FIRST_REQUEST
            return start + 1
        end = self._value_end(start, MAX_OTHER_BYTES)
        if end is not None:
            _loaded(bytes(self._buffer[start:end]))
            self._at = _At.AFTER_VALUE
        return end

    def _read_request(self, start: int, requests: list[RawRequest]) -> int | None:
        if self._buffer[start] != ord("{"):
            raise InvalidRequestError(f"requests.{self._index}: Input should be an object")
        end = self._value_end(start, self._max_request_bytes)
        if end is not None:
            requests.append(RawRequest(self._index, bytes(self._buffer[start:end])))
            self._index += 1
            self._at = _At.AFTER_REQUEST
        return end

    def _value_end(self, start: int, max_bytes: int) -> int | None:
        """Just after the value at ``start``; None, and where to go on is noted, when it is not all here."""
        end = self._scan(start)
        if (len(self._buffer) if end is None else end) - start > max_bytes:
            place = f"requests.{self._index}" if self._found and self._key == "requests" else "the body"
            raise RequestTooLargeError(f"{place}: a value is larger than {max_bytes} bytes")
        if end is not None:
            self._scanned = self._depth = 0
        return end

    def _scan(self, start: int) -> int | None:
        buffer, size = self._buffer, len(self._buffer)
        at = start + self._scanned
        if not self._scanned and buffer[start] not in _OPENING and buffer[start] != _QUOTE:
            end = _end(_SCALAR, buffer, start)
            # A number may go on in the next chunk.
            return end if end < size else None
        while at < size:
            if self._in_string:
                at = _end(_IN_STRING, buffer, at)
                if at == size or buffer[at] != _QUOTE:
                    # The end of the chunk, perhaps in the middle of an escape.
                    break
                self._in_string = False
                at += 1
            else:
                if self._depth:
                    at = _end(_LEVEL, buffer, at)
                if at == size:
                    break
                if buffer[at] == _QUOTE:
                    self._in_string = True
                else:
                    self._depth += 1 if buffer[at] in _OPENING else -1
                at += 1
            if not self._depth and not self._in_string:
                return at
        self._scanned = at - start
        return None


def _end(pattern: re.Pattern[bytes], buffer: bytearray, at: int) -> int:
    match = pattern.match(buffer, at)
    return match.end() if match else at


def _loaded(raw: bytes) -> str:
    """A key, or any other value, parsed and so checked."""
    try:
        return str(orjson.loads(raw))
    except orjson.JSONDecodeError as error:
        raise _invalid(str(error)) from None


def _invalid(problem: str) -> InvalidRequestError:
    return InvalidRequestError(f"the request body is not valid JSON: {problem}")
