"""The daemon does what its own documentation says: schemathesis reads ``/openapi.json`` and tries."""

import io
import sys
from pathlib import Path
from subprocess import STDOUT
from typing import Any

import orjson
import pytest
import trio

from events.types import Mode
from service.logs import make_logger
from service.main import Gateway, open_gateway
from service.preferences import ASYNC_ID
from tests.support.gateway import request, settings_of

EXAMPLES = 3
"""Per operation and phase."""
SEED = 20261122
BOUND_S = 60.0
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "unsupported_method",
    "allow_header_conformance",
)


async def run_schemathesis(document: str, url: str, folder: Path) -> None:
    """Fails with the whole report. ``folder`` is where it looks for settings and leaves its files."""
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run", document),
        f"--url={url}",
        f"--checks={','.join(CHECKS)}",
        f"--max-examples={EXAMPLES}",
        f"--seed={SEED}",
        "--generation-database=none",
        "--suppress-health-check=all",
        "--request-timeout=10",
        "--continue-on-failure",
        "--no-color",
    ]
    run = await trio.run_process(command, cwd=folder, check=False, capture_stdout=True, stderr=STDOUT)
    assert run.returncode == 0, run.stdout.decode()


def completed(gateway: Gateway, mode: Mode) -> float:
    labels = {"mode": mode.value, "status": "completed"}
    return gateway.dependencies.metrics.registry.get_sample_value("messagesd_jobs_total", labels) or 0.0


def without_polling(document: dict[str, Any]) -> dict[str, Any]:
    """Most generated calls would poll jobs that do not exist; these all make Messages."""
    operation = document["paths"]["/v1/messages"]["post"]
    operation["parameters"] = [part for part in operation["parameters"] if part["name"] != ASYNC_ID]
    for response in operation["responses"].values():
        response.get("links", {}).pop(operation["operationId"], None)
    return document


@pytest.mark.slow
@pytest.mark.timeout(BOUND_S + 30)
@pytest.mark.parametrize("prefix", ["", "/anthropic"])
async def test_every_operation_answers_as_documented(prefix: str, tmp_path: Path) -> None:
    settings = settings_of()
    lines = io.StringIO()
    with trio.fail_after(BOUND_S):
        async with open_gateway(settings, logger=make_logger(settings.logging, lines)) as gateway:
            url = gateway.url + prefix
            if prefix:
                path = tmp_path / "openapi.json"
                served = await request(gateway.url, "GET", f"{prefix}/openapi.json")
                path.write_bytes(orjson.dumps(without_polling(served.json)))
                await run_schemathesis(str(path), url, tmp_path)
            else:
                await run_schemathesis(f"{url}/openapi.json", url, tmp_path)
            assert gateway.supervisor.in_flight == 0
    assert "http.failed" not in lines.getvalue()
    for mode in (Mode.PLAIN, Mode.STREAM, Mode.ASYNC):
        assert completed(gateway, mode) > 0, mode
