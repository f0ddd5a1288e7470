"""Other gateways, for the rows beside messagesd's. Each lives in a virtual environment of its own.

LiteLLM (https://docs.litellm.ai/docs/anthropic_unified): ``litellm[proxy]``, one worker, its own defaults
but for a model list that leads every model to the mock upstream.
"""

import http.client
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.bench import load
from tests.bench.errors import BenchError
from tests.bench.processes import ROOT, Server, running

VENV = ROOT / ".venv-peers"
REQUIREMENT = "litellm[proxy]"
INSTALL_TIMEOUT_S = 900
START_TIMEOUT_S = 120.0
LOOK_AGAIN_S = 0.5

_CONFIG = """\
model_list:
  - model_name: "*"
    litellm_params:
      model: "anthropic/*"
      api_base: "http://127.0.0.1:{upstream}"
      api_key: "sk-upstream"
general_settings:
  master_key: "{key}"
litellm_settings:
  telemetry: false
"""


def install_litellm(venv: Path = VENV) -> Path:
    """Its command, installed into ``venv`` when it is not there. Raises BenchError where that cannot be."""
    command = venv / "bin" / "litellm"
    if command.exists():
        return command
    pip = [str(venv / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "--no-input"]
    make = [sys.executable, "-m", "venv", "--clear", str(venv)]
    for step in (make, [*pip, "install", "--quiet", REQUIREMENT]):
        print(f"{' '.join(step)}", file=sys.stderr, flush=True)
        try:
            done = subprocess.run(
                step, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S, check=False
            )
        except subprocess.TimeoutExpired:
            raise BenchError(f"{REQUIREMENT} was not installed within {INSTALL_TIMEOUT_S} s") from None
        if done.returncode:
            raise BenchError(f"{REQUIREMENT} cannot be installed here:\n{done.stderr.strip()[-2000:]}")
    return command


@contextmanager
def litellm(scratch: Path, upstream: int, *, venv: Path = VENV) -> Iterator[Server]:
    """LiteLLM's proxy, once it answers. Raises BenchError where it cannot be installed or does not start."""
    command = install_litellm(venv)
    port = _free_port()
    config = scratch / "litellm.yaml"
    config.write_text(_CONFIG.format(upstream=upstream, key=load.KEY))
    arguments = [str(command), "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]
    # Without it the proxy fetches a price list from the network when it starts.
    env = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "PATH": f"{venv / 'bin'}:{os.environ.get('PATH', '')}"}
    with running("litellm", arguments, scratch=scratch, port=port, env=env) as server:
        _wait_until_it_answers(port, scratch / "litellm.err")
        yield server


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def _wait_until_it_answers(port: int, errors: Path) -> None:
    until = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < until:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/health/liveliness")
            if connection.getresponse().status == 200:
                return
        except OSError:
            time.sleep(LOOK_AGAIN_S)
        finally:
            connection.close()
    raise BenchError(f"litellm did not start:\n{errors.read_text(errors='replace')[-3000:]}")
