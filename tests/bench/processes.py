"""Processes under measurement: started, read from /proc, ended by their id."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.bench.errors import BenchError

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 10.0
LOOK_AGAIN_S = 0.02
TICKS_PER_S = os.sysconf("SC_CLK_TCK")

_PORT = re.compile(r"^(?:port |.*?listens on http://\S+?:)(\d+)", re.MULTILINE)


@dataclass(frozen=True)
class Server:
    """A process that listens on a port of loopback."""

    name: str
    pid: int
    port: int

    def cpu_s(self) -> float:
        """User and system time of the process and its children, to the tick (10 ms)."""
        return sum(_cpu_ticks(pid) for pid in family(self.pid)) / TICKS_PER_S

    def peak_rss_bytes(self) -> int:
        """The most memory it ever held (VmHWM), with its children."""
        return sum(_peak_rss_bytes(pid) for pid in family(self.pid))


def family(pid: int) -> list[int]:
    """A process and all that it started."""
    found = [pid]
    for parent in found:
        for task in Path(f"/proc/{parent}/task").glob("*"):
            found += [int(child) for child in (task / "children").read_text().split()]
    return found


def _cpu_ticks(pid: int) -> int:
    # proc(5): the name, in parentheses, may hold anything; utime and stime are fields 14 and 15.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def _peak_rss_bytes(pid: int) -> int:
    found = re.search(r"^VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return int(found.group(1)) * 1024 if found else 0


def clean_environment() -> dict[str, str]:
    """Ours, without anything that configures a daemon or sends its calls to a proxy."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("MESSAGESD_", "ANTHROPIC_", "OPENAI_", "PORT"))
        and "proxy" not in name.lower()
    }
    return kept | {"PYTHONPATH": str(ROOT)}


@contextmanager
def running(
    name: str,
    command: Sequence[str],
    *,
    scratch: Path,
    port: int | None = None,
    timeout_s: float = START_TIMEOUT_S,
    env: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """Run ``command`` until the block ends. It says on standard output on which port it listens, unless it
    was told a ``port``. Raises BenchError when it does not start within ``timeout_s``.
    """
    out_path, err_path = scratch / f"{name}.out", scratch / f"{name}.err"
    with out_path.open("wb") as out, err_path.open("wb") as err:
        process = subprocess.Popen(
            list(command), cwd=scratch, env=clean_environment() | dict(env or {}), stdout=out, stderr=err
        )
    try:
        found = port
        until = time.monotonic() + timeout_s
        while found is None:
            if match := _PORT.search(out_path.read_text(errors="replace")):
                found = int(match.group(1))
            elif process.poll() is not None or time.monotonic() > until:
                raise BenchError(f"{name} did not start:\n{err_path.read_text(errors='replace')[-4000:]}")
            else:
                time.sleep(LOOK_AGAIN_S)
        yield Server(name, process.pid, found)
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(STOP_TIMEOUT_S)


def floor_command(name: str, upstream: int) -> list[str]:
    """How a floor is run; see :mod:`tests.bench.floors`."""
    return [sys.executable, "-m", "tests.bench.floors", name, str(upstream)]


def daemon_command(config: Path) -> list[str]:
    """How the daemon is run, as any user would."""
    return [sys.executable, "-m", "service", "serve", "--config", str(config)]


def daemon_config(upstream: int, *, key: str, log_url: str) -> str:
    """The least a user would write; everything else is the default. ``drain_s`` only matters at the end."""
    return f"""\
[server]
port = 0
[jobs]
drain_s = 1
[log]
url = "{log_url}"
[logging]
level = "warning"
[[keys]]
name = "bench"
key = "{key}"
[[providers]]
name = "mock"
kind = "anthropic"
base_url = "http://127.0.0.1:{upstream}"
api_key = "sk-upstream"
[[routes]]
model = "*"
provider = "mock"
"""
