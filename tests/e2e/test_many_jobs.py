"""Thousands of async jobs in flight at once in one daemon: what they cost, and what is left of them."""

import logging
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from tests.e2e.daemon import spawned
from tests.e2e.wire import BODY, Wire, connect, post, request

JOBS = int(os.environ.get("IN_FLIGHT_JOBS", "1000"))
"""IN_FLIGHT_JOBS=5000 in the environment is the full number, at half a minute more."""
CONNECTIONS = 20
SAMPLE = 50
WARM_UP_JOBS = 200
FIRST_FRAME_DELAY_S = 10.0
"""Long enough for all of them to be submitted meanwhile, on a busy machine too."""
RESULT_TTL_S = 9
"""Long enough for the last of them to be read after the end of all."""
PROBE_EVERY_S = 0.05
MAX_P99_S = 1.0
MAX_JOB_BYTES = 40_000
COMPLETED = 'jobs_total{mode="async",status="completed"}'
MAX_GROWTH = 1.20
"""Of the resident size, from before the jobs to after their expiry."""
MAX_LEAK = 1.10
"""Of the resident size, by as many jobs again."""

TOML = f"""
[jobs]
drain_s = 1
[logging]
level = "warning"
[[providers]]
name = "late"
kind = "echo"
first_frame_delay_s = {FIRST_FRAME_DELAY_S}
[[providers]]
name = "echo"
kind = "echo"
[[routes]]
model = "late"
provider = "late"
[[routes]]
model = "*"
provider = "echo"
"""


def resident_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"^VmRSS:\s+(\d+) kB$", status, re.MULTILINE)
    assert found
    return int(found.group(1)) * 1024


async def number(wire: Wire, name: str) -> float:
    text = (await wire.ask(request("GET", "/metrics"), method="GET")).body.decode()
    found = re.search(rf"^messagesd_{re.escape(name)} (\S+)$", text, re.MULTILINE)
    assert found, name
    return float(found.group(1))


async def until(wire: Wire, name: str, holds: Callable[[float], bool]) -> None:
    while not holds(await number(wire, name)):  # noqa: ASYNC110 - the daemon is another process
        await trio.sleep(0.2)


async def submit(url: str, count: int, model: str, ttl_s: int = RESULT_TTL_S) -> list[str]:
    """Submit so many async jobs; return their ids."""
    ttl = ("x-bf-async-job-result-ttl", str(ttl_s))
    call = post({**BODY, "model": model}, ("x-bf-async", "true"), ttl)
    ids: list[str] = []

    async def some(number: int) -> None:
        async with connect(url) as wire:
            for _ in range(number):
                ids.append((await wire.ask(call)).json()["id"])  # noqa: PERF401 - shared by several tasks

    async with trio.open_nursery() as nursery:
        for _ in range(CONNECTIONS):
            nursery.start_soon(some, count // CONNECTIONS)
    return ids


async def check_results(wire: Wire, ids: list[str]) -> None:
    for job_id in ids:
        answer = await wire.ask(post(b"", ("x-bf-async-id", job_id)))
        assert answer.header("x-bf-async-status") == "completed"
        assert answer.json()["content"][0]["text"] == "one two three"


async def probe(url: str, times_s: list[float], *, task_status: trio.TaskStatus[str]) -> None:
    """Poll one job again and again, and note how long each answer takes."""
    job_id = (await submit(url, CONNECTIONS, "late"))[0]
    poll = post(b"", ("x-bf-async-id", job_id))
    async with connect(url) as wire:
        task_status.started(job_id)
        while True:
            asked_at = trio.current_time()
            assert (await wire.ask(poll)).status in (200, 404)
            times_s.append(trio.current_time() - asked_at)
            await trio.sleep(PROBE_EVERY_S)


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc")
async def test_thousands_of_jobs_at_once(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    (tmp_path / "messagesd.toml").write_text(TOML)
    with spawned("serve", "--port", "0", cwd=tmp_path) as daemon, trio.fail_after(110):
        url = daemon.started().url
        async with connect(url) as wire, trio.open_nursery() as nursery:
            # What is imported and cached at first use is no job's.
            warm = await submit(url, WARM_UP_JOBS, "echo", ttl_s=2)
            await check_results(wire, warm[-SAMPLE:])
            await until(wire, "snapshot_bytes", lambda kept: kept == 0)
            before = resident_bytes(daemon.pid)

            times_s: list[float] = []
            await nursery.start(lambda task_status: probe(url, times_s, task_status=task_status))
            submitted_at = trio.current_time()
            ids = await submit(url, JOBS, "late")
            submit_s = trio.current_time() - submitted_at
            in_flight = await number(wire, "jobs_in_flight")
            assert in_flight >= JOBS
            per_job = (resident_bytes(daemon.pid) - before) / in_flight
            await until(wire, "jobs_in_flight", lambda jobs: jobs == 0)
            at_end = resident_bytes(daemon.pid)
            assert len(set(ids)) == JOBS
            # The first of them may have expired by now; what became of all is in the counters.
            assert await number(wire, COMPLETED) >= JOBS + WARM_UP_JOBS
            assert await number(wire, 'jobs_total{mode="async",status="failed"}') == 0
            await check_results(wire, ids[-SAMPLE:])
            nursery.cancel_scope.cancel()
        async with connect(url) as wire:
            await until(wire, "snapshot_bytes", lambda kept: kept == 0)
            after = resident_bytes(daemon.pid)
            # As many again, but not at once: what the first ones left behind must do for them.
            await submit(url, JOBS, "echo", ttl_s=1)
            await until(wire, "snapshot_bytes", lambda kept: kept == 0)
            assert await number(wire, COMPLETED) >= 2 * JOBS
        again = resident_bytes(daemon.pid)

    times_s.sort()
    p99_s = times_s[int(len(times_s) * 0.99)]
    figures = {
        "per_job_bytes": round(per_job),
        "before_bytes": before,
        "at_end_bytes": at_end,
        "after_bytes": after,
        "again_bytes": again,
        "growth": round(after / before, 3),
        "poll_p99_s": round(p99_s, 4),
        "submit_s": round(submit_s, 2),
        "polls": len(times_s),
    }
    # pytest shows it with --log-cli-level=INFO.
    logging.getLogger(__name__).info("%s", figures)
    assert per_job < MAX_JOB_BYTES, figures
    assert p99_s < MAX_P99_S, figures
    assert again < at_end * MAX_LEAK, figures
    assert after < before * MAX_GROWTH, figures
