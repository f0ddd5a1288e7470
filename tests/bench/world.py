"""Everything that runs during a benchmark, started when it is first asked for."""

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tests.bench import load
from tests.bench.errors import BenchError
from tests.bench.load import Load, LoadRun, Work
from tests.bench.processes import Server, daemon_command, daemon_config, floor_command, running
from tests.bench.report import Row, Sample
from tests.bench.tools import Tools

PATIENCE_S = 120.0
"""For something that was asked of the daemon to show."""
LOOK_AGAIN_S = 0.25
WARM_UP_S = 0.4


@dataclass(frozen=True, kw_only=True)
class Options:
    """How much is measured."""

    rounds: int
    paced_rounds: int
    """The same for paced streams, each of which takes 1.3 s at least."""
    slice_s: float
    """Length of one measurement; a row is ``rounds`` of them, the other rows' in between."""
    quick: bool = False
    flat_requests: int
    flat_snapshots: int
    in_flight: int


@dataclass
class World:
    """The processes, and what was measured."""

    tools: Tools
    scratch: Path
    options: Options
    stack: ExitStack
    rows: list[Row] = field(default_factory=list)
    peers: list[Server] = field(default_factory=list)
    _servers: dict[str, Server] = field(default_factory=dict)

    # -- processes -------------------------------------------------------------------------------

    @property
    def upstream(self) -> Server:
        """The mock upstream."""
        return self._server("upstream", lambda: [str(self.tools.upstream)])

    def floor(self, name: str) -> Server:
        """One of :mod:`tests.bench.floors`."""
        return self._server(name, lambda: floor_command(name, self.upstream.port))

    def daemon(self, name: str = "messagesd", *, sqlite: bool = False) -> Server:
        """The daemon as it comes. Another ``name`` is another process."""

        def command() -> list[str]:
            url = f"sqlite:///{self.scratch / name}.db" if sqlite else "memory://"
            config = self.scratch / f"{name}.toml"
            config.write_text(daemon_config(self.upstream.port, key=load.KEY, log_url=url))
            return daemon_command(config)

        return self._server(name, command)

    def add_peer(self, server: Server) -> None:
        """Another gateway, started elsewhere, for the sections that compare gateways."""
        self._servers[server.name] = server
        self.peers.append(server)

    def _server(self, name: str, command: Callable[[], list[str]]) -> Server:
        if name not in self._servers:
            started = self.stack.enter_context(running(name, command(), scratch=self.scratch))
            self._servers[name] = started
        return self._servers[name]

    # -- measuring -------------------------------------------------------------------------------

    def drive(self, server: Server, work: Work, *, connections: int, seconds: float, count: int = 0) -> Load:
        """Put load on a server, measuring nothing."""
        return LoadRun(
            self.tools.load,
            self.scratch,
            server.port,
            work,
            connections=connections,
            seconds=seconds,
            count=count,
        ).result()

    def measure(self, server: Server, work: Work, *, connections: int) -> Sample:
        """One slice."""
        before = server.cpu_s()
        found = self.drive(server, work, connections=connections, seconds=self.options.slice_s)
        return sample_of(found, server.cpu_s() - before, work)

    def interleave(
        self,
        section: str,
        slices: Mapping[str, Callable[[], Sample]],
        *,
        unit: str,
        rounds: int | None = None,
    ) -> dict[str, Row]:
        """Measure every row once a round, round after round. The keys name the rows' servers."""
        samples: dict[str, list[Sample]] = {name: [] for name in slices}
        for number in range(rounds or self.options.rounds):
            # Every other round backwards, so that no row always comes after the same one.
            order = list(slices) if number % 2 == 0 else list(slices)[::-1]
            for name in order:
                samples[name].append(slices[name]())
        rows = {
            name: Row(
                section=section,
                server=name,
                unit=unit,
                samples=samples[name],
                peak_rss_bytes=self._servers[name].peak_rss_bytes() if name in self._servers else 0,
            )
            for name in slices
        }
        self.rows.extend(rows.values())
        return rows

    def compare(
        self, section: str, servers: list[Server], work: Work, *, connections: int, rounds: int | None = None
    ) -> dict[str, Row]:
        """The same work on each of these servers, interleaved, after a warm-up."""
        for server in servers:
            self.drive(server, work, connections=connections, seconds=WARM_UP_S)
        slices = {
            server.name: partial(self.measure, server, work, connections=connections) for server in servers
        }
        unit = "event" if work.per_event else "request"
        return self.interleave(section, slices, unit=unit, rounds=rounds)

    # -- asking ----------------------------------------------------------------------------------

    def submit(self, server: Server, model: str) -> str:
        """Submit an async job; return its id."""
        headers = {"content-type": "application/json", "x-bf-async": "true"}
        body = load.body_of(model, stream=False)
        return str(load.call_json(server.port, "POST", "/v1/messages", body=body, headers=headers)["id"])

    def metric(self, server: Server, line: str) -> float:
        """A value from ``/metrics``; 0 where the line is not there."""
        for found in load.call(server.port, "GET", "/metrics").decode().splitlines():
            if found.startswith(f"{line} "):
                return float(found.rpartition(" ")[2])
        return 0.0

    def wait_for(self, what: str, reached: Callable[[], bool]) -> None:
        """Look again and again. Raises BenchError after ``PATIENCE_S``."""
        until = time.monotonic() + PATIENCE_S
        while not reached():
            if time.monotonic() > until:
                raise BenchError(f"{what}: not within {PATIENCE_S:g} s")
            time.sleep(LOOK_AGAIN_S)

    def held(self) -> int:
        """Upstream streams that are open now."""
        return int(load.call_json(self.upstream.port, "GET", "/stats")["held"])

    def release(self) -> None:
        """Let held upstream streams end."""
        load.call(self.upstream.port, "POST", "/release")


def sample_of(found: Load, cpu_s: float, work: Work) -> Sample:
    """What a run says of the server, whose CPU time during it is given."""
    units = found.events if work.per_event else found.answers
    if units == 0:
        raise BenchError("a slice is too short for one answer; use a longer one")
    return Sample(
        cpu_us=cpu_s / units * 1e6,
        rate=units / found.seconds,
        p50_ms=found.p50_us / 1000,
        p99_ms=found.p99_us / 1000,
        sends=found.chunks / found.answers,
        load_share=found.cpu_s / found.seconds,
    )
