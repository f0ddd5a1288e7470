"""How many tokens a request has, told without its model: an estimate, by OpenAI's newest vocabulary.

The vocabulary is inside the package ``splintr-rs``; nothing is fetched. Counted is what the model reads: the
messages, the tools and the schema of the answer. Models with other vocabularies count otherwise, by a fifth
or so for English text.
"""

import base64
import binascii
import io
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import orjson
from imagesize import get as image_size
from splintr import AnyTokenizer, Tokenizer

ENCODING = "o200k_base"
MESSAGE_TOKENS = 4
"""What stands around each message, by https://cookbook.openai.com/examples/how_to_count_tokens_with_tiktoken."""
ANSWER_TOKENS = 3
"""What the answer is primed with."""
PIECE_CHARS = 65_536
"""Of text counted at once: the interpreter is free in between."""
IMAGE_BASE_TOKENS = 85
"""Of an image, and"""
IMAGE_TILE_TOKENS = 170
"""of each of its tiles: https://platform.openai.com/docs/guides/images-vision#calculating-costs"""
IMAGE_TILE_PIXELS = 512
IMAGE_LONG_SIDE_PIXELS = 2048
"""To which an image is scaled down first,"""
IMAGE_SHORT_SIDE_PIXELS = 768
"""and then to this."""
UNKNOWN_IMAGE_PIXELS = (1024, 1024)
"""The size an image is taken to have that is behind a URL or cannot be read."""
HEADER_CHARS = 1_000_000
"""Of a base64 image: what is decoded to read its size. Metadata may stand before it."""


def estimate_tokens(request: Mapping[str, Any]) -> int:
    """Of a Chat Completions request, at least 1. Takes about 10 ms a megabyte of prose; for a thread."""
    total = ANSWER_TOKENS
    for message in request["messages"]:
        total += MESSAGE_TOKENS + sum(_part_tokens(part) for part in _parts_of(message))
    for name in ("tools", "response_format"):
        if name in request:
            total += _text_tokens(orjson.dumps(request[name]).decode())
    return max(1, total)


def _parts_of(message: Mapping[str, Any]) -> Iterator[str | Mapping[str, Any]]:
    content = message.get("content")
    if isinstance(content, str):
        yield content
    else:
        yield from content or ()
    for call in message.get("tool_calls") or ():
        yield call["function"]["name"]
        yield call["function"]["arguments"]
    for name in ("reasoning_content", "reasoning"):
        if name in message:
            yield message[name]


def _part_tokens(part: str | Mapping[str, Any]) -> int:
    if isinstance(part, str):
        return _text_tokens(part)
    if part["type"] == "image_url":
        return _image_tokens(part["image_url"]["url"])
    return _text_tokens(part["text"])


def _text_tokens(text: str) -> int:
    encode = _tokenizer().encode
    return sum(len(encode(text[at : at + PIECE_CHARS])) for at in range(0, len(text), PIECE_CHARS))


def _image_tokens(url: str) -> int:
    width, height = _image_pixels(url)
    shrink = min(1.0, IMAGE_LONG_SIDE_PIXELS / max(width, height))
    width, height = width * shrink, height * shrink
    shrink = min(1.0, IMAGE_SHORT_SIDE_PIXELS / min(width, height))
    tiles = _tiles(width * shrink) * _tiles(height * shrink)
    return IMAGE_BASE_TOKENS + IMAGE_TILE_TOKENS * tiles


def _tiles(pixels: float) -> int:
    return max(1, -(-round(pixels) // IMAGE_TILE_PIXELS))


def _image_pixels(url: str) -> tuple[float, float]:
    if not url.startswith("data:"):
        return UNKNOWN_IMAGE_PIXELS
    start = url.find(",") + 1
    try:
        head = base64.b64decode(url[start : start + HEADER_CHARS])
        width, height = image_size(io.BytesIO(head))
    except (binascii.Error, ValueError, OSError):
        return UNKNOWN_IMAGE_PIXELS
    return (width, height) if width > 0 and height > 0 else UNKNOWN_IMAGE_PIXELS


@cache
def _tokenizer() -> AnyTokenizer:
    """Made at the first estimate: it takes 60 ms and 30 MB."""
    return Tokenizer.from_pretrained(ENCODING)
