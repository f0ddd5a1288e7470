"""A reply's stream, as the framework wants a body."""

from collections.abc import AsyncIterator
from types import TracebackType

from quart.wrappers.response import ResponseBody

from service.http import ReplyStream


class StreamedBody(ResponseBody):
    """Lets Quart iterate a reply's stream. Closing is the exchange's business, not the iterator's."""

    def __init__(self, stream: ReplyStream) -> None:
        self._stream = stream

    async def __aenter__(self) -> "StreamedBody":
        return self

    async def __aexit__(
        self, exc_type: type[BaseException], exc_value: BaseException, tb: TracebackType
    ) -> None:
        return None

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._stream.__aiter__()
