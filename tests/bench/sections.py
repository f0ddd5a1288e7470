"""The sections of the benchmark. Each measures its rows and returns the ratios they stand for."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

from tests.bench import load
from tests.bench.errors import BenchError
from tests.bench.load import LoadRun
from tests.bench.processes import ROOT, Server, clean_environment
from tests.bench.report import Ratio, Row, Sample, paired
from tests.bench.world import World, sample_of

BASE = "quart-h11"
"""The floor that the targets are told against."""
PEERS = ("litellm",)
WATCHERS = 100
SUBMITTERS = (1, 32, 256)
SUBMIT_S = 2.5
SUBMIT_TIMEOUT_S = 90
SUBMIT_ROUNDS = 3
FLAT_ROUNDS = 3
"""Times the rounds of the others: its target is closer to 1 than single slices are to each other."""
SLACK_S = 30.0

Section = Callable[[World], list[Ratio]]


def _servers(world: World, *floors: str) -> list[Server]:
    """The upstream itself, the floors (the base alone when in haste), and the daemon with either log."""
    names = [BASE] if world.options.quick else [*floors, BASE]
    # What is compared most is measured side by side.
    servers = [world.upstream, *world.peers, *(world.floor(name) for name in names)]
    return [*servers, world.daemon(), world.daemon("messagesd-sqlite", sqlite=True)]


def _against_floor(name: str, rows: dict[str, Row], target: float) -> list[Ratio]:
    daemon = rows["messagesd"]
    ratios = [Ratio(name=f"{name}: messagesd / {BASE}", value=paired(daemon, rows[BASE]), target=target)]
    if durable := rows.get("messagesd-sqlite"):
        value = paired(durable, daemon)
        ratios.append(Ratio(name=f"{name}: sqlite / memory log", value=value, target=1.15))
    for peer in PEERS:
        if row := rows.get(peer):
            value = paired(row, daemon)
            ratios.append(
                Ratio(name=f"{name}: {peer} / messagesd", value=value, better="higher", gated=False)
            )
    return ratios


def plain(world: World) -> list[Ratio]:
    """A plain request, 32 connections."""
    servers = _servers(world, "h11", "hypercorn", "asgi-h11", "quart-httpx2")
    rows = world.compare("plain c=32", servers, load.PLAIN, connections=32)
    return [
        *_against_floor("plain", rows, 0.94),
        _headroom("plain", rows),
    ]


def flood(world: World) -> list[Ratio]:
    """A stream whose 69 events come at once, 32 connections."""
    servers = _servers(world, "h11", "hypercorn", "hypercorn-one", "asgi-h11", "quart-httpx2")
    rows = world.compare("flood c=32", servers, load.FLOOD, connections=32)
    return [*_against_floor("flood", rows, 1.0), _headroom("flood", rows)]


def paced(world: World) -> list[Ratio]:
    """A stream of an event each 20 ms, 128 connections."""
    servers = _servers(world, "asgi-h11", "quart-httpx2")[1:]
    if world.options.quick:
        servers = [server for server in servers if server.name != "messagesd-sqlite"]
    rows = world.compare(
        "paced c=128", servers, load.PACED, connections=128, rounds=world.options.paced_rounds
    )
    return _against_floor("paced", rows, 1.1)


def _headroom(name: str, rows: dict[str, Row]) -> Ratio:
    """That the mock upstream is not the limit: its own rate, by that of the fastest that calls it."""
    relays = [row for server, row in rows.items() if server.startswith(("quart-", "asgi-", "messagesd"))]
    fastest = max(relays, key=lambda row: row.median("rate"))
    return Ratio(
        name=f"{name}: upstream's rate / fastest relay's",
        value=paired(rows["upstream"], fastest, "rate"),
        target=3.0,
        better="higher",
        gated=False,
    )


def pair(world: World) -> list[Ratio]:
    """An async submit and the poll that waits for its end, by a plain request."""
    daemon, durable = world.daemon(), world.daemon("messagesd-sqlite", sqlite=True)
    for server in (daemon, durable):
        world.drive(server, load.PAIR, connections=32, seconds=0.4)

    def slice_of(server: Server, work: load.Work) -> Callable[[], Sample]:
        return lambda: world.measure(server, work, connections=32)

    rows = world.interleave(
        "async submit + poll c=32",
        {
            "messagesd, one plain request": slice_of(daemon, load.PLAIN),
            "messagesd": slice_of(daemon, load.PAIR),
            "messagesd-sqlite": slice_of(durable, load.PAIR),
        },
        unit="pair",
    )
    by_plain = paired(rows["messagesd"], rows["messagesd, one plain request"])
    durable_by = paired(rows["messagesd-sqlite"], rows["messagesd"])
    return [
        Ratio(name="async submit + poll: pair / plain request", value=by_plain, target=2.2),
        Ratio(name="async submit + poll: sqlite / memory log", value=durable_by),
    ]


def poll(world: World) -> list[Ratio]:
    """Reading the result of an ended job, against a Quart route without any work."""
    daemon, fixed = world.daemon(), world.floor("quart-fixed")
    work = load.poll_of(_ended_job(world, daemon))
    rows = world.compare("poll of a finished job c=32", [fixed, daemon], work, connections=32)
    # Both fill their CPU, so the rate is what the CPU time of a request allows; told by CPU time it does not
    # hang on who else used the machine.
    value = paired(rows["quart-fixed"], rows["messagesd"])
    return [
        Ratio(name="poll: messagesd's rate / quart-fixed's", value=value, target=0.8, better="higher"),
    ]


def _ended_job(world: World, server: Server) -> str:
    job_id = world.submit(server, "flood")
    path = f"/v1/jobs/{job_id}"
    world.wait_for("a job's end", lambda: load.call_json(server.port, "GET", path)["status"] == "completed")
    return job_id


def watchers(world: World) -> list[Ratio]:
    """One job with 100 watchers, its events coming at once, against fixed events from stock Hypercorn."""
    daemon, hypercorn = world.daemon(), world.floor("hypercorn")
    rows = world.interleave(
        f"{WATCHERS} watchers of one flood",
        {
            "hypercorn": lambda: world.measure(hypercorn, load.FLOOD, connections=32),
            "messagesd": lambda: _watched_flood(world, daemon),
        },
        unit="event",
    )
    value = paired(rows["messagesd"], rows["hypercorn"])
    sends = rows["messagesd"].median("sends")
    return [
        Ratio(name="watchers: messagesd / hypercorn, one send an event", value=value, target=1.3),
        Ratio(name="watchers: sends a stream of 69 events that came together", value=sends, target=3.0),
    ]


def _watched_flood(world: World, daemon: Server) -> Sample:
    """All of it counts: the submit, the watchers' requests and their streams."""
    before = daemon.cpu_s()
    work = load.watch_of(world.submit(daemon, "gate"))
    run = LoadRun(
        world.tools.load,
        world.scratch,
        daemon.port,
        work,
        connections=WATCHERS,
        seconds=SLACK_S,
        count=WATCHERS,
    )
    world.wait_for("the watchers", lambda: world.metric(daemon, "messagesd_subscribers") >= WATCHERS)
    world.release()
    found = run.result()
    return sample_of(found, daemon.cpu_s() - before, work)


def flat(world: World) -> list[Ratio]:
    """A daemon that has served much and keeps much, against one that has just started."""
    options = world.options
    aged, young = world.daemon("messagesd-aged"), world.daemon("messagesd-young")
    each = options.flat_requests
    world.drive(aged, load.PLAIN, connections=32, seconds=each / 100 + SLACK_S, count=each)
    kept = options.flat_snapshots
    world.drive(aged, load.PAIR, connections=32, seconds=kept / 50 + SLACK_S, count=kept)
    rounds = FLAT_ROUNDS * options.rounds
    rows = world.compare("flatness, plain c=32", [young, aged], load.PLAIN, connections=32, rounds=rounds)
    note = f"after {each:,} requests, {kept:,} results kept"
    world.rows[:] = [replace(row, note=note) if row is rows[aged.name] else row for row in world.rows]
    return [
        Ratio(
            name="flatness: aged / young daemon", value=paired(rows[aged.name], rows[young.name]), target=1.1
        )
    ]


def in_flight(world: World) -> list[Ratio]:
    """Many async jobs at once, each with an upstream stream of its own."""
    count = world.options.in_flight
    daemon = world.daemon("messagesd-in-flight")
    idle = daemon.peak_rss_bytes()
    before = daemon.cpu_s()
    found = world.drive(daemon, load.HELD, connections=32, seconds=count / 50 + SLACK_S, count=count)
    world.wait_for(f"{count} open upstream streams", lambda: world.held() == count)
    world.release()
    line = 'messagesd_jobs_total{mode="async",status="completed"}'
    world.wait_for(f"the end of {count} jobs", lambda: world.metric(daemon, line) == count)
    sample = Sample(
        cpu_us=(daemon.cpu_s() - before) / count * 1e6,
        rate=found.answers / found.seconds,
        p50_ms=found.p50_us / 1000,
        p99_ms=found.p99_us / 1000,
    )
    peak = daemon.peak_rss_bytes()
    per_job = (peak - idle) / count
    world.rows.append(
        Row(
            section=f"{count:,} jobs in flight",
            server="messagesd",
            unit="job",
            samples=[sample],
            peak_rss_bytes=peak,
            note=f"{per_job / 1024:.0f} KiB a job",
        )
    )
    gib = (idle + per_job * 10_000) / 2**30
    return [
        Ratio(
            name="10,000 jobs in flight: GiB" + ("" if count == 10_000 else " (scaled)"),
            value=gib,
            target=1.0,
        )
    ]


def submits(world: World) -> list[Ratio]:
    """Taking jobs on, without HTTP: throughput and latency by log and number of submitters."""
    ratios: list[Ratio] = []
    rounds = 1 if world.options.quick else SUBMIT_ROUNDS
    counts = SUBMITTERS if not world.options.quick else SUBMITTERS[-1:]
    for submitters in counts:
        rows: dict[str, list[Sample]] = {"memory": [], "sqlite": []}
        commits: list[tuple[float, float]] = []
        for number in range(rounds):
            for log, samples in rows.items():
                url = (
                    "memory://" if log == "memory" else f"sqlite:///{world.scratch}/s{submitters}-{number}.db"
                )
                found = _submit_run(url, submitters, SUBMIT_S if not world.options.quick else 1.5)
                commits.append((found.pop("commits_per_s"), found.pop("appends_per_commit")))
                samples.append(Sample(**found))
        per_s, each = sorted(pair for pair in commits if pair[0])[rounds // 2]
        made = [
            Row(
                section=f"submit, {submitters} submitters",
                server=f"messagesd, {log} log",
                unit="submit",
                samples=samples,
                note=f"{per_s:,.0f} commits/s, {each:,.1f} appends each" if log == "sqlite" else "",
            )
            for log, samples in rows.items()
        ]
        world.rows += made
        rate = paired(made[1], made[0], "rate")
        last = submitters == SUBMITTERS[-1]
        name = f"submit, {submitters} submitters: sqlite's rate / memory's"
        ratios.append(
            Ratio(name=name, value=rate, target=0.6 if last else None, better="higher", gated=False)
        )
        if last:
            p99 = made[1].median("p99_ms")
            ratios.append(
                Ratio(
                    name=f"submit, {submitters} submitters: sqlite's p99, ms",
                    value=p99,
                    target=50,
                    gated=False,
                )
            )
    return ratios


def _submit_run(url: str, submitters: int, seconds: float) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.submits", url, str(submitters), str(seconds)],
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=SUBMIT_TIMEOUT_S,
        check=False,
    )
    if done.returncode:
        raise BenchError(f"submits: {done.stderr[-3000:]}")
    found: dict[str, float] = json.loads(done.stdout)
    return found


SECTIONS: dict[str, Section] = {
    "plain": plain,
    "flood": flood,
    "paced": paced,
    "pair": pair,
    "poll": poll,
    "watchers": watchers,
    "submits": submits,
    "in-flight": in_flight,
    "flat": flat,
}
