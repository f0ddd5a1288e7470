"""What handlers need, built once by :mod:`service.main`."""

from dataclasses import dataclass

import structlog

from actors.batches import Batches
from actors.clock import Clock
from actors.router import Router
from actors.supervisor import Supervisor
from actors.targets import Targets
from actors.webhooks.webhooks import Webhooks
from events.log.base import EventLog
from service.auth import Authenticator
from service.heartbeat import Heartbeat
from service.metrics import Metrics
from service.settings import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Dependencies:
    """The parts of one running gateway."""

    settings: Settings
    supervisor: Supervisor
    webhooks: Webhooks
    batches: Batches
    router: Router
    targets: Targets
    log: EventLog
    authenticator: Authenticator
    metrics: Metrics
    clock: Clock
    heartbeat: Heartbeat
    started_at: float
    """Unix seconds."""
    logger: structlog.typing.FilteringBoundLogger
