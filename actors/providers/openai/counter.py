"""The upstream's own token counter, where it has one.

Asked in this order, until one answers with a count::

    llama.cpp          POST {base}/chat/completions/input_tokens   the chat request
    vLLM               POST {root}/tokenize                        messages and tools
    llama.cpp, older   POST {root}/apply-template, then POST {root}/tokenize with the prompt it gives

All three apply the model's chat template, so what they count is what the model will read. ``{root}`` is the
base URL without a ``/v1`` at its end.

https://github.com/ggml-org/llama.cpp/blob/master/tools/server/README.md,
https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html#tokenizer-api
"""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import orjson
import trio

from actors.errors import ProviderError
from actors.providers.transport import Transport
from events.types import Headers

COUNT_TIMEOUT_S = 10.0
"""How long a count may take, all questions together; it is estimated then."""
REMEMBERED_S = 600.0
"""How long it is remembered which way of counting the upstream has, or that it has none."""

_MISSING = frozenset({404, 405, 410, 501})
"""Statuses that say that there is no such endpoint."""

Ask = Callable[[Mapping[str, Any], Headers], Awaitable[int]]


class _NoCounterError(Exception):
    """The upstream does not count in this way."""


class UpstreamCounter:
    """Counts by one upstream, and remembers how."""

    def __init__(self, transport: Transport, *, base_path: str, query: str) -> None:
        """``base_path`` is what follows the root, such as ``/v1``; ``query`` goes with every call."""
        self._transport = transport
        self._base_path = base_path
        self._query = query
        self._ways: tuple[Ask, ...] = (self._input_tokens, self._tokenize_chat, self._tokenize_prompt)
        self._known: tuple[Ask, ...] = self._ways
        self._known_until = 0.0

    async def count(self, request: Mapping[str, Any], headers: Headers) -> int | None:
        """The tokens of a chat request; None where the upstream cannot tell, in time or at all.

        ``headers`` present the key. Raises nothing of the upstream's. Cancelling closes the connection.
        """
        now = trio.current_time()
        known = self._known if now < self._known_until else self._ways
        with trio.move_on_after(COUNT_TIMEOUT_S):
            try:
                for way in known:
                    try:
                        count = await way(request, (*headers, ("accept", "application/json")))
                    except _NoCounterError:
                        continue
                    self._remember((way,), now)
                    return count
            except ProviderError:
                return None
            self._remember((), now)
        return None

    def _remember(self, ways: tuple[Ask, ...], now: float) -> None:
        if ways != self._known or now >= self._known_until:
            self._known, self._known_until = ways, now + REMEMBERED_S

    async def _input_tokens(self, request: Mapping[str, Any], headers: Headers) -> int:
        asked = {name: value for name, value in request.items() if name != "stream"}
        answer = await self._ask(f"{self._base_path}/chat/completions/input_tokens", asked, headers)
        return _count(answer.get("input_tokens"))

    async def _tokenize_chat(self, request: Mapping[str, Any], headers: Headers) -> int:
        answer = await self._ask("/tokenize", {"model": request["model"], **_chat(request)}, headers)
        return _count(answer.get("count"))

    async def _tokenize_prompt(self, request: Mapping[str, Any], headers: Headers) -> int:
        prompt = (await self._ask("/apply-template", _chat(request), headers)).get("prompt")
        if not isinstance(prompt, str):
            raise _NoCounterError
        asked = {"content": prompt, "add_special": True, "parse_special": True}
        tokens = (await self._ask("/tokenize", asked, headers)).get("tokens")
        return _count(len(tokens) if isinstance(tokens, list) else None)

    async def _ask(self, path: str, asked: Mapping[str, Any], headers: Headers) -> Mapping[str, Any]:
        body = orjson.dumps(asked)
        answer = await self._transport.request("POST", path + self._query, headers=headers, body=body)
        if answer.status != 200:
            if answer.status in _MISSING:
                raise _NoCounterError
            raise ProviderError(f"the upstream's counter answered with status {answer.status}")
        try:
            parsed = orjson.loads(answer.body)
        except orjson.JSONDecodeError:
            raise _NoCounterError from None
        if not isinstance(parsed, dict):
            raise _NoCounterError
        return parsed


def _chat(request: Mapping[str, Any]) -> Mapping[str, Any]:
    chat = {"messages": request["messages"], "add_generation_prompt": True}
    return chat | {"tools": request["tools"]} if "tools" in request else chat


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise _NoCounterError
    return value
