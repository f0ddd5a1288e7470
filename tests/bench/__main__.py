"""``python -m tests.bench``: measure messagesd beside its floors, and hold its ratios to the baseline's.

Exit codes: 0 done, 1 a ratio is worse than the baseline's beyond the tolerance, 2 it could not be measured.
"""

import datetime as dt
import importlib.metadata
import json
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from tests.bench.errors import BenchError
from tests.bench.peers import litellm
from tests.bench.processes import ROOT
from tests.bench.report import TOLERANCE, Ratio, Row, ratios_table, regressions, rows_table
from tests.bench.sections import SECTIONS
from tests.bench.tools import HERE, compile_tools
from tests.bench.world import Options, World

BASELINE = HERE / "baseline.json"
RESULT = ROOT / "build" / "bench.json"
QUICK_LEAVES_OUT = ("in-flight", "flat")
EXIT_WORSE = 1
EXIT_FAILED = 2
PACKAGES = ("messagesd", "hypercorn", "quart", "quart-trio", "trio", "h11", "httpx2")


def machine() -> dict[str, Any]:
    """Where the figures come from."""
    model = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {
        "cpu": model.group(1) if model else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 2),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def read_baseline(path: Path) -> dict[str, float]:
    """The committed ratios by name; none where there is no file yet."""
    if not path.exists():
        return {}
    found: dict[str, float] = json.loads(path.read_text())["ratios"]
    return found


def result_json(rows: Sequence[Row], ratios: Sequence[Ratio], about: dict[str, Any]) -> str:
    """What is saved of a run."""
    fields = {
        **about,
        "ratios": {ratio.name: round(ratio.value, 4) for ratio in ratios},
        "targets": {ratio.name: ratio.target for ratio in ratios if ratio.target is not None},
        "rows": [row.as_json() for row in rows],
    }
    return json.dumps(fields, indent=1, ensure_ascii=False) + "\n"


def run(names: Sequence[str], options: Options, *, peers: bool) -> tuple[list[Row], list[Ratio]]:
    """Measure these sections; with ``peers``, LiteLLM in those that compare gateways."""
    ratios: list[Ratio] = []
    with tempfile.TemporaryDirectory(prefix="messagesd-bench-") as made, ExitStack() as stack:
        scratch = Path(made)
        world = World(compile_tools(scratch), scratch, options, stack)
        if peers:
            world.add_peer(stack.enter_context(litellm(scratch, world.upstream.port)))
        for name in names:
            began = time.monotonic()
            ratios += SECTIONS[name](world)
            print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        return world.rows, ratios


def print_report(rows: Sequence[Row], ratios: Sequence[Ratio], about: dict[str, Any]) -> None:
    """The tables, as Markdown."""
    where = about["machine"]
    print(
        f"\n{about['date']}, {where['cpu']}, {where['cores']} cores, Linux {where['kernel']},"
        f" Python {where['python']}\n"
    )
    print(rows_table(rows))
    busiest = max((row.median("load_share") for row in rows if row.server != "upstream"), default=0.0)
    print(f"\nThe load generator took at most {busiest:.0%} of one CPU, but for the upstream's own row.\n")
    print(ratios_table(ratios, about["baseline"]))


@click.command()
@click.option(
    "--quick", is_flag=True, help="Short slices and the base floor alone: under a minute, and noisier."
)
@click.option(
    "--only", multiple=True, type=click.Choice(list(SECTIONS)), help="Measure this section; repeatable."
)
@click.option("--rounds", type=click.IntRange(1, 100), help="Slices of each row. Default: 15; quick: 3.")
@click.option("--slice-s", type=click.FloatRange(0.1, 60), help="Length of a slice. Default: 0.4.")
@click.option("--flat-requests", type=click.IntRange(1), default=100_000, show_default=True)
@click.option("--flat-snapshots", type=click.IntRange(1), default=5_000, show_default=True)
@click.option("--in-flight", type=click.IntRange(1, 10_000), default=2_000, show_default=True)
@click.option(
    "--save", type=click.Path(path_type=Path, dir_okay=False), default=RESULT, help="Where the JSON goes."
)
@click.option("--peers", is_flag=True, help="LiteLLM, too, in .venv-peers; installed when it is not there.")
@click.option("--write-baseline", is_flag=True, help="Make this run's ratios the baseline (others stay).")
def main(
    *,
    quick: bool,
    only: Sequence[str],
    rounds: int | None,
    slice_s: float | None,
    flat_requests: int,
    flat_snapshots: int,
    in_flight: int,
    save: Path,
    peers: bool,
    write_baseline: bool,
) -> None:
    """Measure messagesd beside its floors, and hold its ratios to the baseline's."""
    options = Options(
        rounds=rounds or (3 if quick else 15),
        paced_rounds=rounds or (2 if quick else 7),
        slice_s=slice_s or 0.4,
        quick=quick,
        flat_requests=flat_requests,
        flat_snapshots=flat_snapshots,
        in_flight=in_flight,
    )
    baseline = read_baseline(BASELINE)
    about = {
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="minutes"),
        "machine": machine(),
        "rounds": options.rounds,
        "slice_s": options.slice_s,
        "quick": quick,
    }
    try:
        chosen = only or [name for name in SECTIONS if not (quick and name in QUICK_LEAVES_OUT)]
        rows, ratios = run(chosen, options, peers=peers)
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        raise SystemExit(EXIT_FAILED) from None
    print_report(rows, ratios, about | {"baseline": baseline})
    save.parent.mkdir(parents=True, exist_ok=True)
    save.write_text(result_json(rows, ratios, about))
    print(f"\nsaved: {save}")
    worse = regressions(ratios, baseline)
    if write_baseline:
        gated = {ratio.name: round(ratio.value, 4) for ratio in ratios if ratio.gated}
        BASELINE.write_text(
            json.dumps(about | {"ratios": baseline | gated}, indent=1, ensure_ascii=False) + "\n"
        )
        print(f"the baseline is now: {BASELINE}")
    elif worse:
        print(f"\nworse than the baseline beyond {TOLERANCE:.0%}:")
        print("\n".join(f"  {line}" for line in worse))
        raise SystemExit(EXIT_WORSE)


if __name__ == "__main__":
    main()
