"""Numbers for Prometheus, in a registry of their own: two gateways in one process do not mix.

Labels are bounded: modes, states, providers and routes come from the code and the configuration; job ids
and model names are never labels.
"""

from collections import Counter as TallyCounter
from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from actors.circuit import CircuitState
from actors.targets import Targets
from events.state import JobState
from events.types import Mode, NextStep, Usage

# The exposition format every Prometheus reads: https://prometheus.io/docs/instrumenting/exposition_formats/
TEXT_FORMAT = "text/plain; version=0.0.4; charset=utf-8"
UNKNOWN_ROUTE = "unmatched"
MAX_ROUTES = 100
"""Route templates told apart; what comes after them counts as ``unmatched``."""

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_DELAY_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_DURATION_BUCKETS_S = (0.01, 0.05, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)
_TOKEN_FIELDS = {
    "input_tokens": "input",
    "output_tokens": "output",
    "cache_read_input_tokens": "cache_read",
    "cache_creation_input_tokens": "cache_creation",
}
# Beyond it a float no longer counts one by one; no honest upstream reports it.
_MAX_TOKENS = 2**53


class Metrics:
    """Implements :class:`actors.telemetry.Telemetry` and :class:`actors.webhooks.telemetry.WebhookTelemetry`.

    No method raises, whatever an upstream reports.
    """

    def __init__(self, providers: Sequence[str] = ()) -> None:
        """``providers`` are shown from the start; others from their first frame on."""
        self.registry = CollectorRegistry()
        ProcessCollector(namespace="messagesd", registry=self.registry)
        self._requests = self._counter(
            "http_requests", "HTTP requests answered.", "method", "route", "status"
        )
        self._accepted = self._counter("jobs_accepted", "Jobs accepted.", "mode")
        self._jobs = self._counter("jobs", "Jobs ended.", "mode", "status")
        self._frames = self._counter("frames", "Frames received from upstream.", "provider")
        self._tokens = self._counter("tokens", "Tokens of ended jobs.", "direction")
        self._lagging = self._counter("lagging", "Watchers that fell behind and read from the log.")
        self._attempts_failed = self._counter(
            "attempts_failed", "Attempts at an upstream that failed, by what followed.", "provider", "next"
        )
        self._circuits_opened = self._counter("circuits_opened", "Circuits that opened.", "provider")
        self._webhooks = self._counter("webhook_tries", "Calls of webhook endpoints.", "endpoint", "outcome")
        self._webhooks_waiting = self._gauge("webhook_deliveries_waiting", "Webhook deliveries not closed.")
        self._first_frame = Histogram(
            "messagesd_time_to_first_frame_seconds",
            "From a job being accepted to its first frame.",
            ("mode", "provider"),
            buckets=_DELAY_BUCKETS_S,
            registry=self.registry,
        )
        self._duration = Histogram(
            "messagesd_job_duration_seconds",
            "From a job being accepted to its end.",
            ("mode",),
            buckets=_DURATION_BUCKETS_S,
            registry=self.registry,
        )
        self._subscribers = self._gauge("subscribers", "Watchers of running jobs.")
        self._in_flight = self._gauge("jobs_in_flight", "Jobs accepted and not ended.")
        self._snapshot_bytes = self._gauge("snapshot_bytes", "Bytes held for kept results.")
        self._batches = self._gauge("batches_open", "Batches that have not ended.")
        self._items_waiting = self._gauge("batch_items_waiting", "Items of batches that were not begun.")
        self._items_running = self._gauge("batch_items_running", "Items of batches at work.")
        # Resolving labels takes a lock and builds strings; the hot paths keep what it gave.
        self._request_children: dict[tuple[str, str, int], Counter] = {}
        self._routes: set[str] = {UNKNOWN_ROUTE}
        self._frame_children = {name: self._frames.labels(name) for name in providers}
        self._first_frame_children = {
            (mode, name): self._first_frame.labels(mode.value, name) for mode in Mode for name in providers
        }
        # Shown as 0 from the start, so that a rate over the first increment is not lost.
        self._accepted_children = {mode: self._accepted.labels(mode.value) for mode in Mode}
        self._duration_children = {mode: self._duration.labels(mode.value) for mode in Mode}
        self._token_children = {name: self._tokens.labels(label) for name, label in _TOKEN_FIELDS.items()}
        for name in providers:
            self._circuits_opened.labels(name)
            for step in NextStep:
                self._attempts_failed.labels(name, step.value)
        self._job_children = {
            (mode, state): self._jobs.labels(mode.value, state.value)
            for mode in Mode
            for state in (JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED)
        }

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"messagesd_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"messagesd_{name}", text, registry=self.registry)

    def watch(self, *, in_flight: Callable[[], int], snapshot_bytes: Callable[[], int]) -> None:
        """Read these two, which others count, whenever the metrics are rendered."""
        self._in_flight.set_function(in_flight)
        self._snapshot_bytes.set_function(snapshot_bytes)

    def watch_targets(self, targets: Targets) -> None:
        """Read where providers and circuits stand whenever the metrics are rendered."""
        self.registry.register(_TargetsCollector(targets))

    def watch_webhooks(self, waiting: Callable[[], int]) -> None:
        """Read this one in the same way."""
        self._webhooks_waiting.set_function(waiting)

    def watch_batches(
        self, *, open_: Callable[[], int], waiting: Callable[[], int], running: Callable[[], int]
    ) -> None:
        """The same for batches and their items."""
        self._batches.set_function(open_)
        self._items_waiting.set_function(waiting)
        self._items_running.set_function(running)

    def http_request(self, method: str, route: str | None, status: int) -> None:
        """A request was answered. ``route`` is the template (``/v1/jobs/<job_id>``), None if none matched."""
        key = (method, route or UNKNOWN_ROUTE, status)
        child = self._request_children.get(key)
        if child is None:
            child = self._request_child(*key)
        child.inc()

    def _request_child(self, method: str, route: str, status: int) -> Counter:
        if method not in _METHODS:
            method = "other"
        if route not in self._routes:
            if len(self._routes) < MAX_ROUTES:
                self._routes.add(route)
            else:
                route = UNKNOWN_ROUTE
        if not 100 <= status <= 599:
            status = 0
        key = (method, route, status)
        child = self._request_children.get(key)
        if child is None:
            child = self._request_children[key] = self._requests.labels(method, route, str(status))
        return child

    def job_accepted(self, mode: Mode) -> None:
        """A job was committed to the log."""
        self._accepted_children[mode].inc()

    def job_ended(self, mode: Mode, state: JobState, duration_s: float, usage: Usage) -> None:
        """A job has its terminal event, ``duration_s`` after it was accepted."""
        child = self._job_children.get((mode, state))
        if child is not None:
            child.inc()
        self._duration_children[mode].observe(max(duration_s, 0.0))
        for name, counter in self._token_children.items():
            tokens = usage.get(name)
            # The upstream's word: it may be anything, and a counter takes no negative number.
            if type(tokens) is int and 0 < tokens <= _MAX_TOKENS:
                counter.inc(tokens)

    def items_ended(self, state: JobState, count: int) -> None:
        """``count`` items of a batch ended that were not run: cancelled, expired or refused.

        They have no duration: how long an item waited for its turn is no job's time.
        """
        child = self._job_children.get((Mode.BATCH, state))
        if child is not None:
            child.inc(count)

    def first_frame(self, mode: Mode, provider: str, delay_s: float) -> None:
        """The first frame of a job came from upstream, ``delay_s`` after the job was accepted."""
        child = self._first_frame_children.get((mode, provider))
        if child is None:
            child = self._first_frame.labels(mode.value, provider)
            self._first_frame_children[mode, provider] = child
        child.observe(max(delay_s, 0.0))

    def frames(self, provider: str, count: int) -> None:
        """``count`` more frames came from upstream."""
        child = self._frame_children.get(provider)
        if child is None:
            child = self._frame_children[provider] = self._frames.labels(provider)
        child.inc(count)

    def subscribers(self, delta: int) -> None:
        """``delta`` watchers came (or left, when negative)."""
        self._subscribers.inc(delta)

    def lagged(self) -> None:
        """A watcher fell behind its buffer and reads from the log now."""
        self._lagging.inc()

    def attempt_failed(self, provider: str, next_step: NextStep) -> None:
        """An attempt at a provider failed, and this follows."""
        self._attempts_failed.labels(provider, next_step.value).inc()

    def circuit_opened(self, provider: str) -> None:
        """One of a provider's targets is left alone for a while."""
        self._circuits_opened.labels(provider).inc()

    def delivery_tried(self, endpoint: str, outcome: str) -> None:
        """A call of a webhook endpoint has ended, or was not made."""
        self._webhooks.labels(endpoint, outcome).inc()

    def render(self) -> tuple[bytes, str]:
        """The text exposition of every metric, and its content type."""
        return generate_latest(self.registry), TEXT_FORMAT


class _TargetsCollector(Collector):
    """Gauges by provider, read when asked for."""

    def __init__(self, targets: Targets) -> None:
        self._targets = targets

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """One sample a provider (and state) each."""
        reports = self._targets.providers()
        numbers = {
            "provider_working": ("Jobs at work at a provider.", [r.working for r in reports]),
            "provider_waiting": ("Jobs that wait for a place at a provider.", [r.waiting for r in reports]),
            "provider_cooling_keys": ("Keys left alone for a while.", [r.cooling_keys for r in reports]),
            "provider_down": (
                "1: no target of the provider can be asked, as far as is known.",
                [int(r.down) for r in reports],
            ),
        }
        for name, (text, values) in numbers.items():
            family = GaugeMetricFamily(f"messagesd_{name}", text, labels=["provider"])
            for report, value in zip(reports, values, strict=True):
                family.add_metric([report.provider], value)
            yield family
        counts = TallyCounter((one.provider, one.state) for one in self._targets.circuits())
        family = GaugeMetricFamily(
            "messagesd_circuits", "Targets whose circuit is not closed.", labels=["provider", "state"]
        )
        for report in reports:
            for state in (CircuitState.OPEN, CircuitState.HALF_OPEN):
                family.add_metric([report.provider, state.value], counts[report.provider, state])
        yield family
