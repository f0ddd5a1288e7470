"""The composition root: builds every part once, and owns signals and the order of shutdown.

Lifetimes are nested as the code is: event log, providers, actors, connections. The innermost ends first,
so an actor always has a log to write its last event to, and a connection always has an actor to hear from
until it is told to go.
"""

import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import ExitStack, aclosing, asynccontextmanager, closing
from dataclasses import dataclass
from functools import partial
from random import Random
from socket import socket

import click
import structlog
import trio
from hypercorn.config import Config

from actors.batches import Batches, BatchLimits
from actors.circuit import CircuitPolicy
from actors.clock import Clock
from actors.expiry import Expiry, purge_history
from actors.providers.base import Provider
from actors.providers.registry import open_providers
from actors.recovery import recover
from actors.retry import RetryPolicy
from actors.router import Route, Router, RouteTarget
from actors.submission import SupervisorLimits
from actors.supervisor import Supervisor
from actors.targets import Targets
from actors.timers import Timers
from actors.webhooks.webhooks import Webhooks
from events.log.base import EventLog
from events.log.memory import MemoryLog
from events.log.sqlite import open_sqlite_log
from events.snapshots import SnapshotStore
from service.app import create_app
from service.auth import Authenticator
from service.collector import Collector, tune_collector
from service.dependencies import Dependencies
from service.heartbeat import Heartbeat
from service.logs import hypercorn_logger, make_logger
from service.memory import BurstMemory
from service.metrics import Metrics
from service.server import Server, listen
from service.settings import Settings
from service.settings_sections import RouteSettings, sqlite_path

FLUSH_GRACE_S = 1.0
"""Time beyond the drain deadline for last bytes (terminal events, error frames) to reach their readers."""
BATCH_LIFETIME_S = 86_400.0
"""From a batch's creation until what has not ended of it expires, as the API has it."""
REQUESTS_PER_CONNECTION = 1_000_000
"""After so many a kept connection is closed, which lets load balancers spread again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gateway:
    """A running gateway."""

    url: str
    """Where it listens; the first address, without a slash at the end."""
    urls: tuple[str, ...]
    dependencies: Dependencies
    log: EventLog

    @property
    def supervisor(self) -> Supervisor:
        """Its jobs."""
        return self.dependencies.supervisor


@asynccontextmanager
async def open_gateway(
    settings: Settings,
    *,
    providers: Mapping[str, Provider] | None = None,
    logger: structlog.typing.FilteringBoundLogger | None = None,
    random: Random | None = None,
) -> AsyncIterator[Gateway]:
    """Run the whole daemon inside the caller's trio program, on the caller's clock.

    On leaving normally it drains: new jobs are refused, running ones get ``jobs.drain_s``, what is left is
    recorded, connections are closed. When the body raises or is cancelled, everything is cancelled at once.
    ``providers`` replaces the configured ones (scenarios bring their own); ``random`` draws among targets and
    keys, and spreads the backoff. Raises OSError when it cannot listen.
    """
    logger = logger or make_logger(settings.logging, sys.stderr)
    random = random or Random()  # noqa: S311 - it shares out load, it keeps no secret
    sockets = _listen(settings)
    urls = tuple(_url_of(sock.getsockname()) for sock in sockets)
    timers = Timers()
    with ExitStack() as listening:
        for sock in sockets:
            listening.enter_context(closing(sock))
        async with (
            _event_log(settings, logger) as log,
            _providers(settings, providers, timers, logger, random) as named,
            trio.open_nursery() as actors,
        ):
            actors.start_soon(timers.run)
            dependencies = _assemble(
                settings,
                log=log,
                providers=named,
                actors=actors,
                timers=timers,
                logger=logger,
                random=random,
            )
            app = create_app(dependencies)
            config = _hypercorn_config(settings, logger)
            server = Server(app, config, sockets, direct_app=app, logger=logger)
            await recover(
                dependencies.supervisor,
                log=log,
                clock=dependencies.clock,
                logger=logger,
                max_attempts=settings.jobs.max_attempts,
            )
            await dependencies.batches.recover()
            actors.start_soon(dependencies.webhooks.run)
            async with trio.open_nursery() as connections:
                await connections.start(server.run)
                yield Gateway(url=urls[0], urls=urls, dependencies=dependencies, log=log)
                logger.info(
                    "shutting down", action="drain.started", in_flight=dependencies.supervisor.in_flight
                )
                await _drain(dependencies, server, settings.jobs.drain_s)
            actors.cancel_scope.cancel()
            logger.info("shut down", action="drain.done")


async def _drain(dependencies: Dependencies, server: Server, within_s: float) -> None:
    """See the work out, then the connections; what bounds them is told where each is defined."""
    until = trio.current_time() + within_s
    dependencies.batches.stop()
    await dependencies.supervisor.drain(within_s)
    await dependencies.batches.drain()
    await dependencies.webhooks.drain(max(0.0, until - trio.current_time()))
    await server.close_idle()
    server.stop(deadline=max(until, trio.current_time()) + FLUSH_GRACE_S)


@asynccontextmanager
async def _event_log(
    settings: Settings, logger: structlog.typing.FilteringBoundLogger
) -> AsyncIterator[EventLog]:
    path = sqlite_path(settings.log.url)
    if path is None:
        async with aclosing(MemoryLog()) as memory:
            yield memory
    else:

        def migrating(file_bytes: int) -> None:
            logger.info(
                "bringing the event log's file up to date", action="log.migrating", file_bytes=file_bytes
            )

        async with open_sqlite_log(path, on_migration=migrating) as durable:
            yield durable


@asynccontextmanager
async def _providers(
    settings: Settings,
    given: Mapping[str, Provider] | None,
    timers: Timers,
    logger: structlog.typing.FilteringBoundLogger,
    random: Random,
) -> AsyncIterator[Mapping[str, Provider]]:
    if given is not None:
        yield given
        return
    async with open_providers(settings.providers, timers=timers, log=logger, random=random) as configured:
        yield configured


def _assemble(
    settings: Settings,
    *,
    log: EventLog,
    providers: Mapping[str, Provider],
    actors: trio.Nursery,
    timers: Timers,
    logger: structlog.typing.FilteringBoundLogger,
    random: Random,
) -> Dependencies:
    clock = Clock()
    metrics = Metrics(tuple(providers))
    router = Router([_route(route) for route in settings.routes], providers, random=random)
    targets = _targets(settings, router, clock=clock, metrics=metrics, logger=logger, random=random)
    snapshots = SnapshotStore(settings.jobs.max_snapshot_bytes, evicts=log.durable)
    memory = BurstMemory(quiet=lambda: len(snapshots) == 0)
    expiry = Expiry(snapshots=snapshots, log=log, clock=clock, logger=logger, on_expired=memory.expired)
    actors.start_soon(expiry.run)
    if log.durable:
        actors.start_soon(_purge(settings, log, clock, logger))
    webhooks = _webhooks(settings, log=log, clock=clock, metrics=metrics, logger=logger)
    supervisor = Supervisor(
        nursery=actors,
        log=log,
        snapshots=snapshots,
        expiry=expiry,
        targets=targets,
        clock=clock,
        telemetry=metrics,
        logger=logger,
        limits=_supervisor_limits(settings, durable=log.durable),
        webhooks=webhooks,
    )
    batches = Batches(
        nursery=actors,
        log=log,
        snapshots=snapshots,
        supervisor=supervisor,
        clock=clock,
        telemetry=metrics,
        logger=logger,
        limits=_batch_limits(settings),
    )
    actors.start_soon(batches.forget_old)
    _watch(metrics, supervisor, targets, batches)
    return Dependencies(
        settings=settings,
        supervisor=supervisor,
        webhooks=webhooks,
        batches=batches,
        router=router,
        targets=targets,
        log=log,
        authenticator=Authenticator.of(settings),
        metrics=metrics,
        clock=clock,
        heartbeat=Heartbeat(timers, settings.jobs.heartbeat_s),
        started_at=clock.now(),
        logger=logger,
    )


def _listen(settings: Settings) -> list[socket]:
    server = settings.server
    return listen(server.host, server.port, backlog=server.backlog, send_timeout_s=server.send_timeout_s)


def _purge(
    settings: Settings, log: EventLog, clock: Clock, logger: structlog.typing.FilteringBoundLogger
) -> Callable[[], Awaitable[None]]:
    return partial(purge_history, log, clock=clock, history_s=settings.log.history_s, logger=logger)


def _targets(
    settings: Settings,
    router: Router,
    *,
    clock: Clock,
    metrics: Metrics,
    logger: structlog.typing.FilteringBoundLogger,
    random: Random,
) -> Targets:
    return Targets(
        router=router,
        clock=clock,
        telemetry=metrics,
        logger=logger,
        retries=RetryPolicy(**settings.retries.model_dump()),
        circuits=CircuitPolicy(**settings.circuits.model_dump()),
        concurrency={provider.name: provider.max_concurrency for provider in settings.providers},
        random=random,
    )


def _supervisor_limits(settings: Settings, *, durable: bool) -> SupervisorLimits:
    return SupervisorLimits(
        max_in_flight=settings.jobs.max_in_flight,
        attached_history=settings.jobs.attached_history,
        subscriber_buffer_runs=settings.jobs.subscriber_buffer,
        max_resumed=settings.jobs.max_resumed,
        store_bodies=settings.log.store_bodies or not durable,
    )


def _watch(metrics: Metrics, supervisor: Supervisor, targets: Targets, batches: Batches) -> None:
    """Have the metrics read what these count."""
    metrics.watch(in_flight=lambda: supervisor.in_flight, snapshot_bytes=lambda: supervisor.kept_bytes)
    metrics.watch_targets(targets)
    metrics.watch_batches(
        open_=lambda: batches.open,
        waiting=lambda: batches.waiting_items,
        running=lambda: batches.running_items,
    )


def _route(route: RouteSettings) -> Route:
    tried = [RouteTarget(target.provider, target.rename, target.weight) for target in route.tried]
    return Route(route.model, targets=tuple(tried), fallbacks=route.fallbacks)


def _webhooks(
    settings: Settings,
    *,
    log: EventLog,
    clock: Clock,
    metrics: Metrics,
    logger: structlog.typing.FilteringBoundLogger,
) -> Webhooks:
    webhooks = Webhooks(
        settings.webhooks,
        log=log,
        clock=clock,
        telemetry=metrics,
        logger=logger,
        # The memory log keeps no records of its own beyond results.
        history_s=settings.log.history_s if log.durable else 0.0,
        public_url=str(settings.server.public_url or "").rstrip("/"),
    )
    metrics.watch_webhooks(lambda: webhooks.waiting)
    return webhooks


def _batch_limits(settings: Settings) -> BatchLimits:
    batches = settings.batches
    return BatchLimits(
        max_open=batches.max_open,
        max_running=batches.max_running,
        max_running_per_batch=batches.max_running_per_batch,
        max_requests=batches.max_requests,
        max_attempts=settings.jobs.max_attempts,
        lifetime_s=BATCH_LIFETIME_S,
        result_ttl_s=batches.result_ttl_s,
    )


def _hypercorn_config(settings: Settings, logger: structlog.typing.FilteringBoundLogger) -> Config:
    config = Config()
    config.logger_class = hypercorn_logger(logger)
    config.h11_max_incomplete_size = settings.server.max_header_bytes
    config.keep_alive_timeout = settings.server.keep_alive_timeout_s
    config.keep_alive_max_requests = REQUESTS_PER_CONNECTION
    config.include_server_header = False
    return config


def _url_of(address: tuple[object, ...]) -> str:
    host, port = str(address[0]), address[1]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def serve(settings: Settings) -> None:
    """Run until SIGTERM or SIGINT, then drain. A second signal ends everything at once."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:

            async def end_at_second_signal() -> None:
                async for _ in signals:
                    nursery.cancel_scope.cancel()

            async with open_gateway(settings) as gateway:
                click.echo(banner(settings, gateway))
                tune_collector()
                collector = Collector(in_flight=lambda: gateway.supervisor.in_flight)
                nursery.start_soon(collector.run)
                await anext(signals)
                nursery.start_soon(end_at_second_signal)
            nursery.cancel_scope.cancel()


def banner(settings: Settings, gateway: Gateway) -> str:
    """What the operator sees at start: address, providers, routes, webhooks, log, and who may call."""
    lines = [f"messagesd listens on {', '.join(gateway.urls)}"]
    lines += [f"  note: {notice}" for notice in settings.notices]
    lines += [f"  provider {provider.name} ({provider.kind})" for provider in settings.providers]
    lines += [f"  route {route.model} -> {_destination(route)}" for route in settings.routes]
    lines += [
        f"  webhook {webhook.name}" + ("" if webhook.enabled else " (disabled)")
        for webhook in settings.webhooks
    ]
    durable = "" if gateway.log.durable else " (nothing outlives the process)"
    lines.append(f"  log {settings.log.url}{durable}")
    anonymous = gateway.dependencies.authenticator.anonymous_allowed
    lines.append(f"  anonymous calls are {'allowed' if anonymous else 'refused'}; keys: {len(settings.keys)}")
    return "\n".join(lines)


def _destination(route: RouteSettings) -> str:
    """Where a route leads, for people: ``a as m (weight 3), b, then c/m``."""
    tried = [
        target.provider
        + (f" as {target.rename}" if target.rename else "")
        + (f" (weight {target.weight:g})" if target.weight else "")
        for target in route.tried
    ]
    return ", then ".join([", ".join(tried), *route.fallbacks])
