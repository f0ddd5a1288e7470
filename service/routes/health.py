"""``/healthz``, ``/readyz``, ``/metrics`` and the probes agents send."""

from service.dependencies import Dependencies
from service.http import Reply, Request
from service.replies import json_reply

SHOWN_CIRCUITS = 100
"""Named in one answer, those that failed last; metrics count all."""


async def root(deps: Dependencies, request: Request) -> Reply:
    """What this is. Agents probe it with HEAD at their start."""
    return json_reply({"name": "messagesd", "documentation": "/docs"})


async def healthz(deps: Dependencies, request: Request) -> Reply:
    """Alive: the event loop answers."""
    return json_reply({"status": "ok"})


async def readyz(deps: Dependencies, request: Request) -> Reply:
    """Ready for work: not shutting down, and some target can be asked. 503 otherwise.

    ``degraded`` is ready, too: not all targets can be asked. They are named in ``circuits``.
    """
    draining = deps.supervisor.draining
    reports = deps.targets.providers()
    down = sorted(report.provider for report in reports if report.down)
    circuits = deps.targets.circuits()
    ready = len(down) < len(reports) and not draining
    status = ("degraded" if circuits else "ready") if ready else "not ready"
    newest_first = circuits[::-1][:SHOWN_CIRCUITS]
    return json_reply(
        {
            "status": status,
            "draining": draining,
            "providers": sorted(report.provider for report in reports),
            "down": down,
            "circuits": [
                {
                    "provider": one.provider,
                    "model": one.model,
                    "state": one.state.value,
                    "retry_in_s": round(one.retry_in_s, 3),
                }
                for one in newest_first
            ],
        },
        status=200 if ready else 503,
    )


async def metrics(deps: Dependencies, request: Request) -> Reply:
    """Numbers in the Prometheus text format."""
    body, content_type = deps.metrics.render()
    return Reply(200, body, [], content_type)
