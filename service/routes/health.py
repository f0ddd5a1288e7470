"""``/healthz``, ``/readyz``, ``/metrics`` and the probes agents send."""

from service.dependencies import Dependencies
from service.http import Reply, Request
from service.replies import json_reply


async def root(deps: Dependencies, request: Request) -> Reply:
    """What this is. Agents probe it with HEAD at their start."""
    return json_reply({"name": "messagesd", "documentation": "/docs"})


async def healthz(deps: Dependencies, request: Request) -> Reply:
    """Alive: the event loop answers."""
    return json_reply({"status": "ok"})


async def readyz(deps: Dependencies, request: Request) -> Reply:
    """Ready for work: providers are there and the daemon is not shutting down. 503 otherwise."""
    draining = deps.supervisor.draining
    providers = sorted(deps.router.providers)
    ready = bool(providers) and not draining
    return json_reply(
        {"status": "ready" if ready else "not ready", "draining": draining, "providers": providers},
        status=200 if ready else 503,
    )


async def metrics(deps: Dependencies, request: Request) -> Reply:
    """Numbers in the Prometheus text format."""
    body, content_type = deps.metrics.render()
    return Reply(200, body, [], content_type)
