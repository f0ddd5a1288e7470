"""A gateway for a test: inside its trio program, or as a process of its own."""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from io import StringIO
from pathlib import Path
from typing import Any

from service.logs import make_logger
from service.main import Gateway, open_gateway
from service.settings import LoggingSettings, Settings

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 30
STOP_TIMEOUT_S = 20
ECHO_TOML = '[[providers]]\nname = "echo"\nkind = "echo"\n'
ECHO = {"name": "echo", "kind": "echo"}


@asynccontextmanager
async def running(**tables: Any) -> AsyncIterator[Gateway]:
    """A gateway on a free port of loopback, with these tables of the configuration, that logs nothing."""
    server = {"port": 0, **tables.pop("server", {})}
    jobs = {"drain_s": 1.0, **tables.pop("jobs", {})}
    # The clock is the real one.
    retries = {"backoff_s": 0, **tables.pop("retries", {})}
    sections = {"providers": [ECHO], "server": server, "jobs": jobs, "retries": retries}
    settings = Settings.model_validate(sections | tables)
    logger = make_logger(LoggingSettings(level="critical"), StringIO())
    async with open_gateway(settings, logger=logger) as gateway:
        yield gateway


class Process:
    """``python -m service`` under way. Its output is read as it comes, so that it never blocks."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        self.out: list[str] = []
        self.err: list[str] = []
        self._listening = threading.Event()
        self._readers = [
            threading.Thread(target=self._read, args=(process.stdout, self.out), daemon=True),
            threading.Thread(target=self._read, args=(process.stderr, self.err), daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, stream: Any, lines: list[str]) -> None:
        for line in stream:
            lines.append(line)
            # The last line of the banner.
            if "anonymous calls are" in line:
                self._listening.set()
        self._listening.set()

    @property
    def pid(self) -> int:
        """Of the daemon."""
        return self.process.pid

    @property
    def banner(self) -> str:
        """What it has printed on standard output."""
        return "".join(self.out)

    @property
    def errors(self) -> str:
        """What it has printed on standard error."""
        return "".join(self.err)

    @property
    def port(self) -> int:
        """Where it listens."""
        found = re.search(r"listens on http://\S+?:(\d+)", self.banner)
        assert found, self.banner + self.errors
        return int(found.group(1))

    @property
    def url(self) -> str:
        """Where it can be reached from here."""
        return f"http://127.0.0.1:{self.port}"

    def started(self) -> "Process":
        """Wait for the banner, or its end."""
        assert self._listening.wait(START_TIMEOUT_S), self.errors
        return self

    def tell(self, what: signal.Signals) -> None:
        """Send it a signal."""
        self.process.send_signal(what)

    def wait(self, within_s: float = STOP_TIMEOUT_S) -> int:
        """Its exit code, once all it printed was read."""
        code = self.process.wait(within_s)
        for reader in self._readers:
            reader.join(STOP_TIMEOUT_S)
        return code


def clean_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Ours, without anything that configures a daemon."""
    names = ("PORT", "ANTHROPIC_API_KEY", "ANTHROPIC_BASE_URL", "OPENAI_API_KEY", "OPENAI_BASE_URL")
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in names and not name.startswith("MESSAGESD_")
    }
    # The working directory is the test's own, and an editable install is not a given.
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return kept | {"PYTHONPATH": os.pathsep.join(paths)} | dict(extra or {})


@contextmanager
def spawned(
    *arguments: str, cwd: Path, env: Mapping[str, str] | None = None, command: list[str] | None = None
) -> Iterator[Process]:
    """``python -m service ARGUMENTS`` (or ``command``) in ``cwd``; killed on leaving if it still runs."""
    process = subprocess.Popen(
        [*(command or [sys.executable, "-m", "service"]), *arguments],
        cwd=cwd,
        env=clean_environment(env),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        daemon = Process(process)
        try:
            yield daemon
        finally:
            if process.poll() is None:
                process.kill()
            daemon.wait()
