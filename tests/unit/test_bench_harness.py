"""The parts of the benchmark that only count: if they are wrong, every figure is."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.bench import __main__ as bench
from tests.bench.errors import BenchError
from tests.bench.load import PACED, PAIR, PLAIN, Load, body_of, request_of
from tests.bench.processes import Server, daemon_config, family, running
from tests.bench.report import Ratio, Row, Sample, paired, ratios_table, regressions, rows_table
from tests.bench.tools import compile_tools
from tests.bench.world import Options, sample_of


def row(server: str, *cpu_us: float) -> Row:
    samples = [Sample(cpu_us=each, rate=1000 / each) for each in cpu_us]
    return Row(section="plain", server=server, unit="request", samples=samples)


def loaded(**fields: float) -> Load:
    nothing = dict.fromkeys(Load.__dataclass_fields__, 0)
    return Load(**(nothing | fields))  # type: ignore[arg-type]  # whole numbers where it counts


class TestFigures:
    def test_a_slow_round_of_both_rows_leaves_their_ratio_alone(self) -> None:
        floor, daemon = row("floor", 100, 300, 100), row("messagesd", 90, 270, 95)

        assert paired(daemon, floor) == pytest.approx(0.9)
        assert daemon.median("cpu_us") == 95

    def test_rows_of_unlike_rounds_are_not_compared(self) -> None:
        with pytest.raises(ValueError, match="longer"):
            paired(row("a", 1, 2), row("b", 1, 2, 3))

    def test_a_stream_is_told_by_event_and_a_plain_answer_by_request(self) -> None:
        found = loaded(answers=10, events=690, chunks=20, seconds=2.0, cpu_s=0.5, p50_us=1500, p99_us=9000)

        by_event, by_request = sample_of(found, 0.069, PACED), sample_of(found, 0.069, PLAIN)

        assert by_event.cpu_us == pytest.approx(100)
        assert by_event.rate == pytest.approx(345)
        assert by_event.sends == 2
        assert by_event.load_share == 0.25
        assert (by_event.p50_ms, by_event.p99_ms) == (1.5, 9.0)
        assert by_request.cpu_us == pytest.approx(6900)

    def test_a_slice_without_answers_is_no_figure(self) -> None:
        with pytest.raises(BenchError, match="too short"):
            sample_of(loaded(seconds=0.1), 0.1, PLAIN)


class TestTargets:
    @pytest.mark.parametrize(
        ("value", "better", "met"),
        [(1.0, "lower", True), (1.01, "lower", False), (1.0, "higher", True), (0.99, "higher", False)],
    )
    def test_a_target_is_met_up_to_its_value(self, value: float, better: str, met: bool) -> None:
        ratio = Ratio(name="r", value=value, target=1.0, better=better)  # type: ignore[arg-type]  # of the table

        assert ratio.met is met

    def test_without_a_target_nothing_is_missed(self) -> None:
        assert Ratio(name="r", value=1e9).met


class TestGate:
    def test_up_to_the_tolerance_nothing_is_worse(self) -> None:
        ratios = [Ratio(name="cost", value=1.149), Ratio(name="rate", value=0.871, better="higher")]

        assert regressions(ratios, {"cost": 1.0, "rate": 1.0}) == []

    def test_beyond_it_each_ratio_is_named(self) -> None:
        ratios = [Ratio(name="cost", value=1.16), Ratio(name="rate", value=0.86, better="higher")]

        found = regressions(ratios, {"cost": 1.0, "rate": 1.0})

        assert [line.partition(":")[0] for line in found] == ["cost", "rate"]
        assert "16% worse" in found[0]

    def test_better_is_never_worse(self) -> None:
        ratios = [Ratio(name="cost", value=0.1), Ratio(name="rate", value=9.0, better="higher")]

        assert regressions(ratios, {"cost": 1.0, "rate": 1.0}) == []

    def test_what_is_not_gated_or_not_known_passes(self) -> None:
        ratios = [Ratio(name="disk", value=9.0, gated=False), Ratio(name="new", value=9.0)]

        assert regressions(ratios, {"disk": 1.0}) == []

    def test_a_rate_that_fell_to_nothing_fails(self) -> None:
        assert regressions([Ratio(name="rate", value=0.0, better="higher")], {"rate": 1.0})

    def test_the_committed_baseline_knows_the_headline_ratios(self) -> None:
        known = bench.read_baseline(bench.BASELINE)

        assert {f"{name}: messagesd / quart-h11" for name in ("plain", "flood", "paced")} <= set(known)
        assert all(value > 0 for value in known.values())

    def test_without_a_baseline_nothing_is_compared(self, tmp_path: Path) -> None:
        assert bench.read_baseline(tmp_path / "none.json") == {}


class TestTables:
    def test_columns_line_up(self) -> None:
        lines = rows_table([row("floor", 100), row("messagesd", 1234.5)]).splitlines()

        assert len({len(line) for line in lines}) == 1
        assert "1,234.5" in lines[3]

    def test_a_missed_target_shows(self) -> None:
        ratios = [Ratio(name="a", value=1.2, target=1.0), Ratio(name="b", value=0.5, target=1.0)]

        table = ratios_table(ratios, {"a": 1.1}).splitlines()

        assert "MISSED" in table[2]
        assert "1.100" in table[2]
        assert " met " in table[3]

    def test_what_is_saved_can_be_read_back_as_a_baseline(self, tmp_path: Path) -> None:
        path = tmp_path / "result.json"
        ratios = [Ratio(name="a", value=1.23456, target=1.0)]

        path.write_text(bench.result_json([row("floor", 100)], ratios, {"date": "today"}))

        assert bench.read_baseline(path) == {"a": 1.2346}
        saved = json.loads(path.read_text())
        assert saved["rows"][0]["cpu_us"] == 100
        assert saved["targets"] == {"a": 1.0}


class TestCommand:
    @pytest.fixture
    def measured(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
        """Runs that measure nothing: one ratio, twice the baseline's. Holds what was asked for."""
        asked: list[str] = []

        def run(names: list[str], options: Options, *, peers: bool) -> tuple[list[Row], list[Ratio]]:
            asked.extend(names)
            return [row("messagesd", 100)], [Ratio(name="cost", value=2.0)]

        baseline = tmp_path / "baseline.json"
        baseline.write_text('{"ratios": {"cost": 1.0, "other": 3.0}}')
        monkeypatch.setattr(bench, "run", run)
        monkeypatch.setattr(bench, "BASELINE", baseline)
        return asked

    def test_a_regression_is_an_exit_code_of_1(self, measured: list[str], tmp_path: Path) -> None:
        result = CliRunner().invoke(bench.main, ["--save", str(tmp_path / "r.json"), "--only", "plain"])

        assert result.exit_code == bench.EXIT_WORSE
        assert "cost: 2.000, 100% worse than the baseline's 1.000" in result.output
        assert measured == ["plain"]
        assert (tmp_path / "r.json").exists()

    def test_a_new_baseline_keeps_what_was_not_measured(self, measured: list[str], tmp_path: Path) -> None:
        arguments = ["--save", str(tmp_path / "r.json"), "--only", "plain", "--write-baseline"]

        result = CliRunner().invoke(bench.main, arguments)

        assert result.exit_code == 0
        assert bench.read_baseline(bench.BASELINE) == {"cost": 2.0, "other": 3.0}

    def test_quick_leaves_the_long_sections_out(self, measured: list[str], tmp_path: Path) -> None:
        CliRunner().invoke(bench.main, ["--save", str(tmp_path / "r.json"), "--quick"])

        assert "plain" in measured
        assert not set(measured) & set(bench.QUICK_LEAVES_OUT)

    def test_what_cannot_be_measured_is_an_exit_code_of_2(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        def run(*_: object, **__: object) -> None:
            raise BenchError("no C compiler")

        monkeypatch.setattr(bench, "run", run)

        result = CliRunner().invoke(bench.main, ["--save", str(tmp_path / "r.json")])

        assert result.exit_code == bench.EXIT_FAILED
        assert "no C compiler" in result.output


class TestRequests:
    def test_a_request_says_how_long_it_is(self) -> None:
        body = body_of("flood", stream=True)

        head, _, rest = request_of(body, "x-bf-async: true").partition(b"\r\n\r\n")

        assert rest == body
        assert f"content-length: {len(body)}".encode() in head
        assert b"x-bf-async: true" in head

    def test_the_model_stands_where_the_upstream_looks_for_it(self) -> None:
        assert b'"model":"paced"' in PACED.request
        assert b'"stream":true' in PACED.request
        assert b'"stream"' not in PLAIN.request

    def test_a_poll_has_room_for_one_job_id(self) -> None:
        assert PAIR.poll.count(b"@") == 36

    def test_the_daemon_runs_on_its_defaults_but_for_what_it_must_be_told(self, tmp_path: Path) -> None:
        from service.settings import load

        path = tmp_path / "messagesd.toml"
        path.write_text(daemon_config(1234, key="sk-bf-bench", log_url="memory://"))

        settings = load(path, {}, None, None)

        assert settings.logging.level == "warning"
        assert settings.keys[0].name == "bench"
        assert not settings.auth.allow_anonymous


class TestProcesses:
    def test_cpu_time_and_memory_are_those_of_the_process(self) -> None:
        us = Server("us", os.getpid(), 0)

        assert us.cpu_s() > 0
        assert us.peak_rss_bytes() > 2**20

    def test_children_count(self) -> None:
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        with child:
            assert child.pid in family(os.getpid())
            child.kill()

    def test_a_process_that_does_not_start_is_told_with_its_reason(self, tmp_path: Path) -> None:
        command = [sys.executable, "-c", "raise SystemExit('no such thing')"]

        with pytest.raises(BenchError, match="no such thing"), running("x", command, scratch=tmp_path):
            pass

    def test_a_process_is_ended_with_its_block(self, tmp_path: Path) -> None:
        code = "import time; print('port 4321', flush=True); time.sleep(60)"

        with running("x", [sys.executable, "-c", code], scratch=tmp_path) as server:
            assert server.port == 4321

        assert not Path(f"/proc/{server.pid}").exists()

    def test_without_a_compiler_the_reason_is_said(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))

        with pytest.raises(BenchError, match="no C compiler"):
            compile_tools(tmp_path)


def test_the_load_generator_counts_right_answers_and_names_wrong_ones(tmp_path: Path) -> None:
    from tests.bench.load import FLOOD, LoadRun, Work

    try:
        tools = compile_tools(tmp_path)
    except BenchError as error:
        pytest.skip(str(error))
    with running("upstream", [str(tools.upstream)], scratch=tmp_path) as upstream:

        def drive(work: Work, count: int) -> Load:
            load = LoadRun(tools.load, tmp_path, upstream.port, work, connections=2, seconds=20, count=count)
            return load.result()

        plain, flood = drive(PLAIN, 10), drive(FLOOD, 3)
        with pytest.raises(BenchError, match="incomplete"):
            drive(Work(PLAIN.request, "what no answer holds"), 1)

    assert (plain.answers, plain.events) == (10, 0)
    assert (flood.answers, flood.events, flood.chunks) == (3, 3 * 69, 3 * 69)
    with socket.socket() as sock:
        assert sock.connect_ex(("127.0.0.1", upstream.port)) != 0
