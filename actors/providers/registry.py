"""Builds every configured provider once, and closes them all."""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from random import Random
from types import MappingProxyType
from typing import Any, Protocol

from actors.providers.anthropic import AnthropicProvider
from actors.providers.base import Provider
from actors.providers.echo import EchoProvider
from actors.providers.local import LocalProvider
from actors.providers.openai.provider import OpenaiProvider
from actors.providers.options import (
    AnthropicOptions,
    EchoOptions,
    LocalOptions,
    OpenaiOptions,
    ProviderOptions,
)
from actors.timers import Timers


class Log(Protocol):
    """What is asked of a logger; structlog's bound loggers have it."""

    def info(self, event: str, **fields: Any) -> object:
        """Write a line."""
        ...


@asynccontextmanager
async def open_providers(
    options: Sequence[ProviderOptions],
    *,
    timers: Timers,
    log: Log | None = None,
    random: Random | None = None,
) -> AsyncIterator[Mapping[str, Provider]]:
    """The providers by name, in the order of the configuration; closed on leaving, each within a bound.

    No upstream is called here, but a local model with ``start = "eager"`` is loaded before this enters.
    ``timers`` keep the time bounds of calls, and are run by the caller while there are any. ``random`` draws
    among a provider's keys. Raises ValueError for a name used twice, ProviderError for a
    local model that does not load.
    """
    providers: dict[str, Provider] = {}
    async with AsyncExitStack() as stack:
        for option in options:
            if option.name in providers:
                raise ValueError(f"two providers are named {option.name!r}")
            providers[option.name] = await _open(option, stack, timers, random)
            if log is not None:
                log.info("provider ready", action="provider.ready", provider=option.name, kind=option.kind)
        yield MappingProxyType(providers)


async def _open(
    options: ProviderOptions, stack: AsyncExitStack, timers: Timers, random: Random | None
) -> Provider:
    match options:
        case EchoOptions():
            return EchoProvider(options)
        case AnthropicOptions():
            anthropic = AnthropicProvider(options, timers=timers, random=random)
            stack.push_async_callback(anthropic.aclose)
            return anthropic
        case OpenaiOptions():
            openai = OpenaiProvider(options, timers=timers, random=random)
            stack.push_async_callback(openai.aclose)
            return openai
        case LocalOptions():
            local = LocalProvider(options, timers=timers)
            stack.push_async_callback(local.aclose)
            if options.start == "eager":
                await local.start()
            return local
