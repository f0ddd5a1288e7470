"""The two C programs: the mock upstream and the load generator, compiled when a benchmark starts."""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.bench.errors import BenchError

HERE = Path(__file__).resolve().parent
COMPILERS = ("cc", "gcc", "clang")
COMPILE_TIMEOUT_S = 120


@dataclass(frozen=True)
class Tools:
    """Where they are."""

    upstream: Path
    load: Path


def compile_tools(into: Path) -> Tools:
    """Compile both. Raises BenchError where there is no C compiler."""
    compiler = next((path for name in COMPILERS if (path := shutil.which(name))), None)
    if compiler is None:
        raise BenchError(
            "no C compiler (cc, gcc or clang) was found. The mock upstream and the load generator are C,"
            " so that neither is the limit; on Debian: apt install gcc libc6-dev"
        )
    for name in ("upstream", "load"):
        source, target = HERE / f"{name}.c", into / name
        done = subprocess.run(
            [compiler, "-O2", "-Wall", "-Wextra", "-o", str(target), str(source)],
            capture_output=True,
            text=True,
            timeout=COMPILE_TIMEOUT_S,
            check=False,
        )
        if done.returncode:
            raise BenchError(f"{source.name} does not compile here:\n{done.stderr}")
    return Tools(into / "upstream", into / "load")
