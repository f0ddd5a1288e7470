"""Change a member of a JSON object in its bytes and leave everything else as it was.

A request body goes upstream as the client wrote it: prompt caches depend on the order of its fields, and
parsing and writing it anew would change number spellings, escapes and duplicate keys. So only the value
that has to change is cut out and replaced.

The walk looks at the top level only and skips nested values by regular expressions, which keep no stack:
neither deep nesting nor a long string can exhaust anything. Grammar: RFC 8259.
"""

import json
import re
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any, NamedTuple

import orjson

_SPACE = re.compile(rb"[ \t\n\r]*+")
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
_SCALAR = re.compile(rb"[^ \t\n\r,}\]]++")
# All that changes no depth: text between brackets, whole strings, and containers that hold neither.
_LEVEL = re.compile(rb'(?:[^\[\]{}"]++|"(?:[^"\\]++|\\.)*+"|[\[{][^\[\]{}"]*+[\]}])*+', re.DOTALL)
_OPENING = frozenset(b"[{")


class _Member(NamedTuple):
    key: str
    begin: int
    """Where its key begins."""
    start: int
    """Where its value begins."""
    end: int
    """Just after its value."""


def set_model(body: bytes, model: str) -> bytes:
    """``body`` with its top-level ``model`` set to ``model``, added at the end where it is missing.

    ``body`` is a valid JSON object in UTF-8. Every other byte stays; a body that already says so is
    returned as it is, the same object. Raises ValueError for bytes that are no JSON object.
    """
    wanted = json.dumps(model).encode()
    return _set(body, "model", wanted, add=True)


def set_stream(body: bytes, stream: bool) -> bytes:
    """``body`` with its top-level ``stream`` set, under the same terms as :func:`set_model`.

    False is what an absent (or null) ``stream`` means: such a body is returned as it is.
    """
    return _set(body, "stream", b"true" if stream else b"false", add=stream)


def without_items(body: bytes, key: str, dropped: Callable[[Any], bool]) -> bytes:
    """``body`` without those items of its top-level array ``key`` that ``dropped`` says yes to.

    The member goes, too, when no item is left; what is no array, or empty, stays as it is. Of all other
    bytes only commas, and the space beside them, go with what they parted. Raises as :func:`set_model`.
    """
    members = list(_members(body))
    cuts: list[tuple[int, int]] = []
    emptied: set[int] = set()
    for index, member in enumerate(members):
        if member.key != key or body[member.start : member.start + 1] != b"[":
            continue
        items = list(_items(body, member.start))
        gone = {n for n, (start, end) in enumerate(items) if dropped(orjson.loads(body[start:end]))}
        if gone and len(gone) == len(items):
            emptied.add(index)
        else:
            cuts += _cuts(items, gone)
    cuts += _cuts([(member.begin, member.end) for member in members], emptied)
    pieces: list[bytes] = []
    done = 0
    for start, end in sorted(cuts):
        pieces.append(body[done:start])
        done = end
    return b"".join((*pieces, body[done:])) if pieces else body


def _cuts(spans: Sequence[tuple[int, int]], gone: Container[int]) -> list[tuple[int, int]]:
    """What to cut out so that these of the comma-separated spans go and what is left is still separated."""
    kept = [index for index in range(len(spans)) if index not in gone]
    if len(kept) == len(spans):
        return []
    if not kept:
        return [(spans[0][0], spans[-1][1])]
    cuts = [(spans[index][0], spans[index + 1][0]) for index in range(kept[-1]) if index in gone]
    if kept[-1] < len(spans) - 1:
        cuts.append((spans[kept[-1]][1], spans[-1][1]))
    return cuts


def _items(body: bytes, at: int) -> Iterator[tuple[int, int]]:
    """Where the items of the array that begins at ``at`` begin and end."""
    at = _skip(_SPACE, body, at + 1)
    if body[at : at + 1] == b"]":
        return
    while True:
        end = _value_end(body, at)
        yield at, end
        at = _skip(_SPACE, body, end)
        if body[at : at + 1] == b"]":
            return
        _expect(body, at, b",")
        at = _skip(_SPACE, body, at + 1)


def member(body: bytes, key: str) -> bytes:
    """The bytes of the value of a top-level member, the last one of that name.

    ``body`` is a valid JSON object in UTF-8. Raises KeyError where there is none.
    """
    found = [one for one in _members(body) if one.key == key]
    if not found:
        raise KeyError(key)
    return body[found[-1].start : found[-1].end]


def _set(body: bytes, key: str, wanted: bytes, *, add: bool) -> bytes:
    pieces: list[bytes] = []
    done = 0
    found = False
    last_end = 0
    for member in _members(body):
        last_end = member.end
        if member.key != key:
            continue
        found = True
        if not _same(body[member.start : member.end], wanted):
            pieces += (body[done : member.start], wanted)
            done = member.end
    if not found and add:
        added = json.dumps(key).encode() + b":" + wanted
        if last_end:
            pieces += (body[:last_end], b",", added)
            done = last_end
        else:
            done = body.index(b"{") + 1
            pieces += (body[:done], added)
    if not pieces:
        return body
    pieces.append(body[done:])
    return b"".join(pieces)


def _same(value: bytes, wanted: bytes) -> bool:
    if value == wanted or (wanted == b"false" and value == b"null"):
        return True
    # A string may be spelled with escapes and still be the one we want.
    return value[:1] == wanted[:1] == b'"' and bool(json.loads(value) == json.loads(wanted))


def _members(body: bytes) -> Iterator[_Member]:
    at = _skip(_SPACE, body, 0)
    _expect(body, at, b"{")
    at = _skip(_SPACE, body, at + 1)
    if body[at : at + 1] == b"}":
        return
    while True:
        begin = at
        key_end = _skip(_STRING, body, at)
        key = body[at + 1 : key_end - 1]
        name = json.loads(body[at:key_end]) if b"\\" in key else key.decode()
        at = _skip(_SPACE, body, key_end)
        _expect(body, at, b":")
        start = _skip(_SPACE, body, at + 1)
        end = _value_end(body, start)
        yield _Member(name, begin, start, end)
        at = _skip(_SPACE, body, end)
        if body[at : at + 1] == b"}":
            return
        _expect(body, at, b",")
        at = _skip(_SPACE, body, at + 1)


def _value_end(body: bytes, start: int) -> int:
    first = body[start : start + 1]
    if first == b'"':
        return _skip(_STRING, body, start)
    if first not in (b"{", b"["):
        return _skip(_SCALAR, body, start)
    depth, at = 1, start + 1
    while depth:
        at = _skip(_LEVEL, body, at)
        if at >= len(body):
            raise ValueError("not a JSON object: it ends inside a value")
        if body[at] == ord('"'):
            raise ValueError("not a JSON object: a string has no end")
        depth += 1 if body[at] in _OPENING else -1
        at += 1
    return at


def _skip(pattern: re.Pattern[bytes], body: bytes, at: int) -> int:
    match = pattern.match(body, at)
    if match is None:
        raise ValueError(f"not a JSON object: unexpected byte at {at}")
    return match.end()


def _expect(body: bytes, at: int, byte: bytes) -> None:
    if body[at : at + 1] != byte:
        raise ValueError(f"not a JSON object: {byte.decode()} expected at {at}")
