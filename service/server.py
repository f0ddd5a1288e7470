"""Who listens, accepts connections and ends them.

Why not ``hypercorn.trio.serve``: there one connection's unexpected error ends the server, and connections
cannot be cut at a deadline (see :mod:`service.connection`). HTTP/1.1 only: no TLS here, hence no ALPN, and
cleartext HTTP/2 is not offered.
"""

import socket
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import structlog
import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ASGIFramework

from service.connection import Connection
from service.direct import DirectApp


def listen(host: str, port: int, *, backlog: int, send_timeout_s: float) -> list[socket.socket]:
    """Listening sockets for ``host`` (every address it resolves to). Raises OSError.

    ``send_timeout_s`` becomes TCP_USER_TIMEOUT, which accepted sockets inherit: a peer that takes nothing
    for so long is cut off by the kernel.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    sockets: list[socket.socket] = []
    try:
        for family, kind, protocol, _, address in dict.fromkeys(found):
            sock = socket.socket(family, kind, protocol)
            sockets.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if hasattr(socket, "TCP_USER_TIMEOUT"):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(send_timeout_s * 1000))
            sock.bind(address)
            sock.listen(backlog)
            # Port 0 was asked for: the other addresses listen on the one that was given.
            port = sock.getsockname()[1]
    except OSError:
        for sock in sockets:
            sock.close()
        raise
    return sockets


class Server:
    """Accepts connections for an application until told to stop."""

    def __init__(
        self,
        app: ASGIFramework,
        config: Config,
        sockets: Sequence[socket.socket],
        *,
        direct_app: DirectApp,
        logger: structlog.typing.FilteringBoundLogger,
    ) -> None:
        self._direct_app = direct_app
        self._app = ASGIWrapper(app)
        self._config = config
        self._sockets = sockets
        self._logger = logger
        self._context = WorkerContext(None)
        self._stop = trio.Event()
        self._scope = trio.CancelScope()
        self._connections: set[Connection] = set()

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until :meth:`stop`, then until its deadline or the last connection's end."""
        listeners = [trio.SocketListener(trio.socket.from_stdlib_socket(sock)) for sock in self._sockets]
        with self._scope:
            async with trio.open_nursery() as connections, trio.open_nursery() as accepting:
                accepting.start_soon(
                    partial(trio.serve_listeners, self._serve, listeners, handler_nursery=connections)
                )
                task_status.started()
                await self._stop.wait()
                accepting.cancel_scope.cancel()

    def stop(self, *, deadline: float) -> None:
        """Accept nothing more, close idle connections, and cut those left at ``deadline`` (trio time)."""
        self._stop.set()
        self._scope.deadline = deadline

    async def close_idle(self) -> None:
        """Connections with no request under way close now, the others after their answer."""
        await self._context.terminated.set()
        for connection in self._connections:
            connection.close_if_idle()

    async def _serve(self, stream: trio.SocketStream) -> None:
        """One connection; whatever it raises stays here."""
        connection = Connection(
            self._app,
            self._config,
            self._context,
            cast(Any, {}),
            cast(Any, stream),
            direct_app=self._direct_app,
        )
        self._connections.add(connection)
        try:
            await connection.run()
        except Exception:
            self._logger.exception("connection failed", action="http.connection_failed")
        finally:
            self._connections.discard(connection)
