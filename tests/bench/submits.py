"""How fast jobs are taken on: the rows of submit throughput and latency.

``python -m tests.bench.submits LOG_URL SUBMITTERS SECONDS`` runs the gateway in this process, with no HTTP in
between: so many tasks submit async jobs, each its next one when the last is accepted (for the SQLite log: on
disk). The jobs' actors start and wait for an upstream that says nothing until the time is over, so that
what is measured is taking jobs on. Prints one line of JSON.
"""

import json
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from io import StringIO

import trio

from actors.errors import UnsupportedError
from actors.providers.base import (
    Completion,
    ForwardAnswer,
    ForwardCall,
    Frame,
    FrameSource,
    ProviderCall,
    TokenCount,
)
from actors.submission import SubmitJob
from events.log.sqlite import SqliteLog
from events.types import Mode
from service.collector import tune_collector
from service.logs import make_logger
from service.main import Gateway, open_gateway
from service.settings import LoggingSettings, Settings
from tests.bench.load import body_of

MAX_JOBS = 1_000_000
WARM_UP = 0.15
"""Share of the time that is not measured."""


class Silence:
    """A stream without frames."""

    upstream_request_id: str | None = None

    async def receive(self) -> list[Frame]:
        """The end."""
        return []


class SilentProvider:
    """Takes every call and never answers. Satisfies :class:`actors.providers.base.Provider`."""

    name = "silent"
    kind = "silent"

    async def complete(self, call: ProviderCall) -> Completion:
        """Wait to be cancelled."""
        await trio.sleep_forever()
        raise AssertionError("unreachable")

    @asynccontextmanager
    async def open_stream(self, call: ProviderCall) -> AsyncIterator[FrameSource]:
        """Wait to be cancelled."""
        with trio.CancelScope():
            await trio.sleep_forever()
        yield Silence()

    async def count_tokens(self, call: ProviderCall) -> TokenCount:
        """Not asked for here."""
        raise UnsupportedError("no counts")

    async def forward(self, call: ForwardCall) -> ForwardAnswer:
        """Not asked for here."""
        raise UnsupportedError("no other paths")


class Submits:
    """Submitters at work on one gateway."""

    def __init__(self, gateway: Gateway) -> None:
        self.latencies_s: list[float] = []
        self.measuring = False
        self._supervisor = gateway.supervisor
        body = body_of("plain", stream=False)
        self._job = SubmitJob(
            owner="bench",
            body=body,
            fields=json.loads(body),
            model="plain",
            mode=Mode.ASYNC,
            detached=True,
            result_ttl_s=3600.0,
        )

    async def submit(self) -> None:
        """Submit for ever."""
        while True:
            began = time.perf_counter()
            submission = await self._supervisor.submit_once(self._job)
            if submission.watch is not None:
                submission.watch.leave()
            if self.measuring:
                self.latencies_s.append(time.perf_counter() - began)
            # With the memory log nothing above waits, and the actors would never have their turn.
            await trio.lowlevel.checkpoint()


async def main(url: str, submitters: int, seconds: float) -> None:
    """Measure, and print."""
    settings = Settings.model_validate(
        {
            "server": {"port": 0},
            "jobs": {"max_in_flight": MAX_JOBS, "drain_s": 0},
            "log": {"url": url},
            "routes": [{"model": "*", "provider": "silent"}],
            "providers": [{"name": "silent", "kind": "echo"}],
        }
    )
    logger = make_logger(LoggingSettings(level="critical"), StringIO())
    async with open_gateway(settings, providers={"silent": SilentProvider()}, logger=logger) as gateway:
        # As the daemon does.
        tune_collector()
        submits = Submits(gateway)
        async with trio.open_nursery() as nursery:
            for _ in range(submitters):
                nursery.start_soon(submits.submit)
            await trio.sleep(seconds * WARM_UP)
            before = _commits(gateway)
            submits.measuring = True
            began, cpu = time.perf_counter(), time.process_time()
            await trio.sleep(seconds * (1 - WARM_UP))
            took, cpu = time.perf_counter() - began, time.process_time() - cpu
            commits, appends = (now - then for now, then in zip(_commits(gateway), before, strict=True))
            nursery.cancel_scope.cancel()
        latencies = sorted(submits.latencies_s)
        result = {
            "rate": len(latencies) / took,
            "cpu_us": cpu / len(latencies) * 1e6,
            "p50_ms": latencies[len(latencies) // 2] * 1e3,
            "p99_ms": latencies[int((len(latencies) - 1) * 0.99)] * 1e3,
            "commits_per_s": commits / took,
            "appends_per_commit": appends / commits if commits else 0.0,
        }
        print(json.dumps(result), flush=True)


def _commits(gateway: Gateway) -> tuple[int, int]:
    if not isinstance(gateway.log, SqliteLog):
        return (0, 0)
    statistics = gateway.log.statistics
    return (statistics.commits, statistics.appends)


if __name__ == "__main__":
    trio.run(main, sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
