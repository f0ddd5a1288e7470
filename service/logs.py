"""Log lines: structlog, configured per gateway and never globally.

Every line has a stable ``action`` (``job.accepted``), to search by; the event text is for people. Lines go
to one stream, whole and in order, from any thread. A stream that is gone (a closed pipe) loses lines and
stops nothing.
"""

import json
import logging
import re
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TextIO

import orjson
import structlog
from hypercorn.logging import Logger as HypercornLogger
from structlog.typing import EventDict, FilteringBoundLogger, WrappedLogger

from service.settings import LoggingSettings

if TYPE_CHECKING:
    from hypercorn.config import Config
    from hypercorn.typing import ResponseSummary, WWWScope

__all__ = ["FilteringBoundLogger", "hypercorn_logger", "make_logger"]

MASK = "***"
UNNAMED_ACTION = "unnamed"

_SECRET_NAMES = frozenset(
    {
        "api_key",
        "authorization",
        "cookie",
        "credential",
        "credentials",
        "key",
        "password",
        "proxy_authorization",
        "secret",
        "set_cookie",
        "token",
        "x_api_key",
        "x_bf_vk",
        "x_goog_api_key",
    }
)
# Keys as this gateway and its upstreams shape them, wherever they stand in a text.
_SECRET_TEXT = re.compile(
    r"\b(?:sk-[A-Za-z0-9_-]{8,}|whsec_[A-Za-z0-9+/=]{8,}|(?i:bearer|basic)\s+[A-Za-z0-9+/=._~-]{8,})"
)
_MAX_REDACT_DEPTH = 4
"""Nesting looked into; what is deeper is dropped."""


class _LineWriter:
    """What structlog writes to: one line per call."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()

    def msg(self, line: str) -> None:
        try:
            with self._lock:
                self._stream.write(line + "\n")
                self._stream.flush()
        except (OSError, ValueError):
            # Nobody reads any more (ValueError: the stream was closed). There is nowhere left to say so.
            return

    log = debug = info = warning = error = critical = msg


def _redact(value: object, depth: int) -> object:
    if isinstance(value, str):
        return _SECRET_TEXT.sub(MASK, value)
    if depth > _MAX_REDACT_DEPTH:
        return "..."
    if isinstance(value, Mapping):
        return {name: _redact_named(name, item, depth + 1) for name, item in value.items()}
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str):
        return (value[0], _redact_named(value[0], value[1], depth + 1))
    if isinstance(value, list | tuple):
        return [_redact(item, depth + 1) for item in value]
    if isinstance(value, bytes):
        return _redact(value.decode(errors="replace"), depth)
    return value


def _redact_named(name: object, value: object, depth: int) -> object:
    if isinstance(name, str) and name.lower().replace("-", "_") in _SECRET_NAMES:
        return MASK
    return _redact(value, depth)


def redact(_logger: WrappedLogger, _method: str, event_dict: EventDict) -> EventDict:
    """Mask secrets (structlog processor): by the name of a field or header, and by the look of a text."""
    return {name: _redact_named(name, value, 0) for name, value in event_dict.items()}


def _name_action(_logger: WrappedLogger, _method: str, event_dict: EventDict) -> EventDict:
    event_dict.setdefault("action", UNNAMED_ACTION)
    return event_dict


def _render_json(_logger: WrappedLogger, _method: str, event_dict: EventDict) -> str:
    try:
        return orjson.dumps(event_dict, default=repr, option=orjson.OPT_NON_STR_KEYS).decode()
    except TypeError:
        # What orjson cannot say (lone surrogates, integers beyond 64 bits) still has to be logged.
        return json.dumps({str(name): value for name, value in event_dict.items()}, default=repr)


def make_logger(settings: LoggingSettings, stream: TextIO) -> FilteringBoundLogger:
    """A logger that writes to ``stream``; ``format = "auto"`` is console on a terminal and JSON otherwise.

    Times are ISO 8601 in UTC. An exception (``log.exception``, ``exc_info=True``) is rendered as its
    traceback, without local variables.
    """
    terminal = stream.isatty()
    console = settings.format == "console" or (settings.format == "auto" and terminal)
    renderer = (
        structlog.dev.ConsoleRenderer(colors=terminal, exception_formatter=structlog.dev.plain_traceback)
        if console
        else _render_json
    )
    level = logging.getLevelNamesMapping()[settings.level.upper()]
    logger: FilteringBoundLogger = structlog.wrap_logger(
        _LineWriter(stream),
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _name_action,
            structlog.processors.format_exc_info,
            redact,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        context_class=dict,
        cache_logger_on_first_use=True,
    ).bind()
    return logger


def hypercorn_logger(log: FilteringBoundLogger) -> type[HypercornLogger]:
    """A class for hypercorn's ``Config.logger_class`` that writes to ``log``, with ``http.*`` actions.

    Accesses go out at debug level (the routes log what matters), without the query string; hypercorn's own
    "Running on" too, since the daemon says itself where it listens.
    """

    class BoundHypercornLogger(HypercornLogger):
        def __init__(self, config: "Config | None" = None) -> None:
            # The base would set up handlers of the logging module; nothing of it is wanted.
            self.access_logger = None
            self.error_logger = None

        async def access(
            self, request: "WWWScope", response: "ResponseSummary | None", request_time: float
        ) -> None:
            if log.is_enabled_for(logging.DEBUG):
                log.debug(
                    "http access",
                    action="http.access",
                    method=request.get("method", "GET"),
                    path=request["path"],
                    status=response["status"] if response else None,
                    duration_s=round(request_time, 6),
                )

        async def critical(self, message: str, *args: Any, **kwargs: Any) -> None:
            self._write(logging.CRITICAL, message, args)

        async def error(self, message: str, *args: Any, **kwargs: Any) -> None:
            self._write(logging.ERROR, message, args)

        async def warning(self, message: str, *args: Any, **kwargs: Any) -> None:
            self._write(logging.WARNING, message, args)

        async def info(self, message: str, *args: Any, **kwargs: Any) -> None:
            self._write(logging.DEBUG, message, args)

        async def debug(self, message: str, *args: Any, **kwargs: Any) -> None:
            self._write(logging.DEBUG, message, args)

        async def exception(self, message: str, *args: Any, **kwargs: Any) -> None:
            self._write(logging.ERROR, message, args, exc_info=True)

        async def log(self, level: int, message: str, *args: Any, **kwargs: Any) -> None:
            self._write(level, message, args)

        def _write(self, level: int, message: str, args: tuple[Any, ...], *, exc_info: bool = False) -> None:
            text = message % args if args else message
            extra = {"exc_info": True} if exc_info else {}
            log.log(level, text, action="http.server", **extra)

    return BoundHypercornLogger
