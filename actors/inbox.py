"""The inbox of an actor: a bounded queue of commands, and which of them ended the work.

Not a memory channel: every job has an inbox, and making a channel costs more than all that most of them see.
"""

from collections import deque
from collections.abc import Awaitable, Callable

import trio

from actors.commands import Command, DetachJob, Ending

INBOX_COMMANDS = 8
"""Commands an inbox holds. A command that finds it full is dropped: eight others already end the job."""


class Inbox:
    """Commands to one actor. Anybody puts; the actor alone takes out."""

    __slots__ = ("_came", "_closed", "_commands", "_ending")

    def __init__(self) -> None:
        self._ending: Ending | None = None
        self._commands: deque[Command] = deque()
        self._came: trio.Event | None = None
        self._closed = False

    def put(self, command: Command) -> bool:
        """Put a command in; False when the inbox is full or closed. Never blocks."""
        if self._closed or len(self._commands) == INBOX_COMMANDS:
            return False
        self._commands.append(command)
        if self._came is not None:
            self._came.set()
        return True

    async def listen(self, detach: Callable[[DetachJob], Awaitable[None]]) -> None:
        """Take commands out as they come, for ever; ``detach`` carries out the one that ends nothing."""
        while True:
            self._came = trio.Event()
            while self._commands:
                command = self._commands.popleft()
                if not isinstance(command, DetachJob):
                    self._ending = self._ending or command
                    continue
                try:
                    await detach(command)
                finally:
                    command.done.set()
            await self._came.wait()

    def drain(self) -> Ending | None:
        """Empty the inbox; the first command that ended the work, if any did."""
        while self._commands:
            command = self._commands.popleft()
            if isinstance(command, DetachJob):
                command.done.set()
            else:
                self._ending = self._ending or command
        return self._ending

    def close(self) -> None:
        """Take nothing more."""
        self.drain()
        self._closed = True
