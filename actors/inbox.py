"""The inbox of an actor: a bounded channel of commands, and which of them ended the work."""

from collections.abc import Awaitable, Callable

import trio

from actors.commands import Command, DetachJob, Ending

INBOX_COMMANDS = 8
"""Commands an inbox holds. A command that finds it full is dropped: eight others already end the job."""


class Inbox:
    """Commands to one actor. Anybody puts; the actor alone takes out."""

    def __init__(self) -> None:
        self._ending: Ending | None = None
        self._send, self._receive = trio.open_memory_channel[Command](INBOX_COMMANDS)

    def put(self, command: Command) -> bool:
        """Put a command in; False when the inbox is full or closed. Never blocks."""
        try:
            self._send.send_nowait(command)
        except (trio.WouldBlock, trio.ClosedResourceError, trio.BrokenResourceError):
            return False
        return True

    async def listen(self, detach: Callable[[DetachJob], Awaitable[None]]) -> None:
        """Take commands out as they come, for ever; ``detach`` carries out the one that ends nothing."""
        async for command in self._receive:
            if not isinstance(command, DetachJob):
                self._ending = self._ending or command
                continue
            try:
                await detach(command)
            finally:
                command.done.set()

    def drain(self) -> Ending | None:
        """Empty the inbox; the first command that ended the work, if any did."""
        while True:
            try:
                command = self._receive.receive_nowait()
            except (trio.WouldBlock, trio.EndOfChannel, trio.ClosedResourceError):
                return self._ending
            if isinstance(command, DetachJob):
                command.done.set()
            else:
                self._ending = self._ending or command

    def close(self) -> None:
        """Take nothing more."""
        self.drain()
        self._send.close()
        self._receive.close()
