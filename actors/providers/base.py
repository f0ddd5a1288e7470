"""The provider port: what a job needs of whoever answers it.

An adapter maps every foreign error to a :class:`~actors.errors.ProviderError` at this boundary, by
type and status, never by message text. Cancelling any call closes its upstream connection before the
cancellation leaves the adapter; an adapter keeps no task alive after its call returned.
"""

from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from events.types import Headers, Usage


class Frame(NamedTuple):
    """One server-sent event."""

    event: str
    """The SSE event name; for a frame without one, the ``type`` of its data."""
    data: bytes
    """The JSON text."""
    wire: bytes
    """``event: NAME\\ndata: JSON\\n\\n``: the upstream's own bytes where they have this form."""


@dataclass(frozen=True, slots=True)
class ProviderCall:
    """One call to an upstream."""

    body: bytes
    """The client's bytes."""
    fields: Mapping[str, Any]
    """The same, parsed once. Read only."""
    model: str
    """The upstream's name for the model (a route may rename it); what goes on the wire."""
    headers: Headers = ()
    """``anthropic-*`` headers to pass on."""
    key_name: str = ""
    """Which of the provider's keys to use; empty: it picks one, if it has any."""

    @property
    def requested_model(self) -> str:
        """The model as the client named it."""
        return str(self.fields.get("model", self.model))


@dataclass(frozen=True, slots=True)
class Completion:
    """A plain answer."""

    body: bytes
    """The Message as JSON, the upstream's bytes where it speaks our protocol. Known to parse to an object."""
    usage: Usage = field(default_factory=dict)
    upstream_request_id: str | None = None


@dataclass(frozen=True, slots=True)
class TokenCount:
    """The answer of ``count_tokens``."""

    input_tokens: int
    estimated: bool = False


@dataclass(frozen=True, slots=True)
class ForwardCall:
    """A request of the wildcard below ``/v1/messages/``, passed on as it came."""

    method: str
    path: str
    """Path below the upstream's base URL, for example ``/v1/messages/foo``; no query, no ``..`` segment."""
    body: bytes
    headers: Headers


@dataclass(frozen=True, slots=True)
class ForwardAnswer:
    """The upstream's answer to a :class:`ForwardCall`, error statuses included."""

    status: int
    body: bytes
    headers: Headers
    """End-to-end headers that may be shown (content-type, request-id, retry and rate limit headers)."""


class FrameSource(Protocol):
    """An open upstream stream."""

    upstream_request_id: str | None

    async def receive(self) -> list[Frame]:
        """The frames of the next read, at least one, in order; an empty list once the upstream has ended.

        Frames are passed as they come: ``error`` and ``ping`` frames too, and no order is checked here.
        Raises :class:`~actors.errors.ProviderError` when the connection breaks, a time bound runs out or
        a size bound is passed.
        """
        ...


class Provider(Protocol):
    """A named upstream."""

    @property
    def name(self) -> str:
        """Its name in the configuration; the ``provider`` of ``provider/model``."""
        ...

    @property
    def kind(self) -> str:
        """``echo``, ``local``, ``anthropic`` or ``openai``."""
        ...

    async def complete(self, call: ProviderCall) -> Completion:
        """Ask for a plain answer (``stream`` false upstream). Raises ProviderError."""
        ...

    def open_stream(self, call: ProviderCall) -> AbstractAsyncContextManager[FrameSource]:
        """Ask for a stream (``stream`` true upstream).

        Entering returns once the upstream has answered 200 with an event stream, and raises ProviderError
        otherwise. Leaving closes the connection, whatever was read.
        """
        ...

    async def count_tokens(self, call: ProviderCall) -> TokenCount:
        """Count the input tokens of a request. Raises ProviderError."""
        ...

    async def forward(self, call: ForwardCall) -> ForwardAnswer:
        """Pass a request on. Raises :class:`~actors.errors.UnsupportedError` where it cannot be."""
        ...
