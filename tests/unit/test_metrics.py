"""Metrics: what is counted, and that labels stay bounded."""

from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from actors.telemetry import NullTelemetry, Telemetry
from events.state import JobState
from events.types import Mode, NextStep
from service.metrics import MAX_ROUTES, Metrics


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"messagesd_{name}", labels)


@pytest.mark.parametrize("telemetry", [Metrics(), NullTelemetry()])
def test_every_telemetry_takes_every_call(telemetry: Telemetry) -> None:
    calls: dict[str, tuple[Any, ...]] = {
        "job_accepted": (Mode.PLAIN,),
        "first_frame": (Mode.STREAM, "echo", 0.1),
        "frames": ("echo", 1),
        "subscribers": (1,),
        "lagged": (),
        "attempt_failed": ("echo", NextStep.RETRY),
        "circuit_opened": ("echo",),
        "items_ended": (JobState.CANCELLED, 2),
        "job_ended": (Mode.PLAIN, JobState.COMPLETED, 0.5, {}),
    }
    assert {name for name in vars(Telemetry) if not name.startswith("_")} == set(calls)
    for name, arguments in calls.items():
        assert getattr(telemetry, name)(*arguments) is None


def test_two_gateways_do_not_mix() -> None:
    one, other = Metrics(), Metrics()
    one.lagged()
    assert (value(one, "lagging_total"), value(other, "lagging_total")) == (1, 0)


def test_jobs_durations_and_tokens() -> None:
    metrics = Metrics()
    usage = {
        "input_tokens": 3,
        "output_tokens": 5,
        "cache_read_input_tokens": 7,
        "cache_creation_input_tokens": 11,
        "service_tier": "standard",
    }
    metrics.job_accepted(Mode.ASYNC)
    metrics.job_ended(Mode.ASYNC, JobState.COMPLETED, 2.0, usage)
    metrics.job_ended(Mode.ASYNC, JobState.FAILED, -1.0, {})
    assert value(metrics, "jobs_accepted_total", mode="async") == 1
    assert value(metrics, "jobs_total", mode="async", status="completed") == 1
    assert value(metrics, "jobs_total", mode="async", status="failed") == 1
    assert value(metrics, "jobs_total", mode="plain", status="cancelled") == 0
    assert value(metrics, "job_duration_seconds_sum", mode="async") == 2.0
    assert value(metrics, "job_duration_seconds_count", mode="async") == 2
    directions = ("input", "output", "cache_read", "cache_creation")
    assert [value(metrics, "tokens_total", direction=d) for d in directions] == [3, 5, 7, 11]


@pytest.mark.parametrize("tokens", [-1, "9", None, True, 1.5, 10**400, [1]])
def test_nonsense_usage_is_not_counted(tokens: object) -> None:
    metrics = Metrics()
    metrics.job_ended(Mode.PLAIN, JobState.COMPLETED, 1.0, {"input_tokens": tokens})
    assert value(metrics, "tokens_total", direction="input") == 0


def test_frames_and_watchers() -> None:
    metrics = Metrics()
    for delay_s in (0.2, 0.4):
        metrics.first_frame(Mode.STREAM, "echo", delay_s)
    metrics.frames("echo", 3)
    metrics.frames("echo", 4)
    metrics.subscribers(2)
    metrics.subscribers(-1)
    assert value(metrics, "frames_total", provider="echo") == 7
    assert value(metrics, "subscribers") == 1
    assert value(metrics, "time_to_first_frame_seconds_count", mode="stream", provider="echo") == 2
    assert (
        value(metrics, "time_to_first_frame_seconds_bucket", mode="stream", provider="echo", le="0.25") == 1
    )


def test_gauges_that_others_count() -> None:
    metrics = Metrics()
    jobs = [1, 2, 3]
    metrics.watch(in_flight=lambda: len(jobs), snapshot_bytes=lambda: 1024)
    assert (value(metrics, "jobs_in_flight"), value(metrics, "snapshot_bytes")) == (3, 1024)
    jobs.clear()
    assert value(metrics, "jobs_in_flight") == 0


def test_request_labels_are_bounded() -> None:
    metrics = Metrics()
    for number in range(3 * MAX_ROUTES):
        metrics.http_request("GET", f"/r{number}", 200)
        metrics.http_request(f"M{number}", None, 1000 + number)
    family = next(f for f in metrics.registry.collect() if f.name == "messagesd_http_requests")
    samples = [s for s in family.samples if s.name.endswith("_total")]
    assert sum(sample.value for sample in samples) == 6 * MAX_ROUTES
    assert len({sample.labels["route"] for sample in samples}) == MAX_ROUTES
    assert value(metrics, "http_requests_total", method="GET", route="/r0", status="200") == 1
    assert (
        value(metrics, "http_requests_total", method="other", route="unmatched", status="0") == 3 * MAX_ROUTES
    )


def test_renders_text_that_parses_under_our_prefix() -> None:
    metrics = Metrics()
    metrics.http_request("GET", "/healthz", 200)
    metrics.http_request("GET", "/healthz", 200)
    body, content_type = metrics.render()
    assert content_type == "text/plain; version=0.0.4; charset=utf-8"
    families = {family.name for family in text_string_to_metric_families(body.decode())}
    assert "messagesd_http_requests" in families
    assert all(name.startswith("messagesd_") for name in families)
    assert b'messagesd_http_requests_total{method="GET",route="/healthz",status="200"} 2.0' in body
