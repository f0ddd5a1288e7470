"""``python -m service`` as an operator runs it: signals, exit codes, and what it says."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import httpx2
import pytest
import trio

from service.settings import key_hash
from tests.e2e.daemon import ECHO_TOML, ROOT, spawned
from tests.e2e.wire import BODY, assert_error, connect, post

KEY = "sk-bf-process"
KEY_TOML = f'[[keys]]\nname = "ci"\nhash = "{key_hash(KEY)}"\n'
SLOW_S = 1.5
SLOW_TOML = f'[[providers]]\nname = "slow"\nkind = "echo"\nfirst_frame_delay_s = {SLOW_S}\n'
STUCK_TOML = '[[providers]]\nname = "stuck"\nkind = "echo"\nfirst_frame_delay_s = 600\n'
AT_ONCE_S = 5.0
"""What "at once" may take on a busy machine; every drain deadline here is longer."""
POLL_S = 0.02


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A working directory with a configuration that starts at once."""
    (tmp_path / "messagesd.toml").write_text(ECHO_TOML)
    return tmp_path


def write(place: Path, toml: str) -> None:
    (place / "messagesd.toml").write_text(toml)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def until(condition: Callable[[], object], within_s: float = 10.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(POLL_S)


def in_flight(url: str) -> float:
    text = httpx2.get(f"{url}/metrics", timeout=5).text
    found = re.search(r"^messagesd_jobs_in_flight (\S+)$", text, re.MULTILINE)
    assert found, text
    return float(found.group(1))


def call(url: str, answers: list[httpx2.Response], **headers: str) -> None:
    answers.append(httpx2.post(f"{url}/v1/messages", json=BODY, headers=headers, timeout=20))


# --- starting --------------------------------------------------------------------------------------


def test_it_says_what_it_is_and_serves(place: Path) -> None:
    with spawned("serve", "--port", "0", cwd=place) as daemon:
        daemon.started()
        assert daemon.banner.splitlines() == [
            f"messagesd listens on http://127.0.0.1:{daemon.port}",
            "  provider echo (echo)",
            "  route * -> echo",
            "  log memory:// (nothing outlives the process)",
            "  anonymous calls are allowed; keys: 0",
        ]
        answers: list[httpx2.Response] = []
        call(daemon.url, answers)
        assert answers[0].json()["content"] == [{"type": "text", "text": "one two three"}]
        daemon.tell(signal.SIGTERM)
        assert daemon.wait() == 0
        for line in daemon.err:
            # Standard error is no terminal here.
            assert '"action":' in line, line


def test_port_binds_every_interface_and_asks_for_a_key(place: Path) -> None:
    write(place, ECHO_TOML + KEY_TOML)
    port = free_port()
    with spawned("serve", cwd=place, env={"PORT": str(port)}) as daemon:
        daemon.started()
        assert f"listens on http://0.0.0.0:{port}" in daemon.banner
        assert "anonymous calls are refused; keys: 1" in daemon.banner
        assert KEY not in daemon.banner
        answers: list[httpx2.Response] = []
        call(daemon.url, answers)
        call(daemon.url, answers, authorization=f"Bearer {KEY}")
        assert [answer.status_code for answer in answers] == [401, 200]


def test_port_without_a_key_is_refused(place: Path) -> None:
    with spawned("serve", cwd=place, env={"PORT": str(free_port())}) as daemon:
        assert daemon.wait() == 2
        assert daemon.errors.startswith("error: ")
        assert "configure at least one key" in daemon.errors
        assert "Traceback" not in daemon.errors
        assert daemon.banner == ""


def test_the_port_is_in_use(place: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with spawned("serve", "--port", str(port), cwd=place) as daemon:
            assert daemon.wait() == 1
            assert f"error: cannot listen on 127.0.0.1:{port}" in daemon.errors
            assert "Traceback" not in daemon.errors


@pytest.mark.parametrize("command", ["serve", "check-config"])
def test_every_error_of_the_configuration_is_named_with_its_place(place: Path, command: str) -> None:
    route = '[[routes]]\nmodel = "*"\nprovider = "no"\n'
    write(place, ECHO_TOML + '[server]\nport = "many"\n[jobs]\ndrain = 1\n' + route)
    with spawned(command, cwd=place) as daemon:
        assert daemon.wait() == 2
        errors = daemon.errors
        assert errors.count("error: ") == len(errors.splitlines()) == 3
        for place_of_error in ("server.port", "jobs.drain", "routes"):
            assert place_of_error in errors
        assert "Traceback" not in errors


def test_check_config_masks_what_is_secret(place: Path) -> None:
    upstream = '[[providers]]\nname = "up"\nkind = "anthropic"\napi_key = "env:UPSTREAM"\n'
    write(place, f'{upstream}[[keys]]\nname = "ci"\nkey = "{KEY}"\n')
    with spawned("check-config", cwd=place, env={"UPSTREAM": "sk-upstream-secret"}) as daemon:
        assert daemon.wait() == 0
        shown = tomllib.loads(daemon.banner)
        assert (shown["providers"][0]["name"], shown["keys"][0]["name"]) == ("up", "ci")
        for secret in (KEY, key_hash(KEY), "sk-upstream-secret"):
            assert secret not in daemon.banner + daemon.errors


# --- ending ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_daemon_ends_at_once(place: Path, which: signal.Signals) -> None:
    with spawned("serve", "--port", "0", cwd=place) as daemon:
        daemon.started()
        # A kept connection is idle, too.
        with httpx2.Client(base_url=daemon.url) as client:
            assert client.get("/healthz").status_code == 200
            daemon.tell(which)
            assert daemon.wait(AT_ONCE_S) == 0
        assert "Traceback" not in daemon.errors


async def test_a_signal_lets_running_work_finish_and_takes_no_more(place: Path) -> None:
    write(place, SLOW_TOML)
    with spawned("serve", "--port", "0", cwd=place) as daemon:
        daemon.started()
        answers: list[httpx2.Response] = []
        async with connect(daemon.url) as early, trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, partial(call, daemon.url, answers))
            await trio.to_thread.run_sync(until, lambda: in_flight(daemon.url) == 1)
            daemon.tell(signal.SIGTERM)
            await trio.to_thread.run_sync(until, lambda: "drain.started" in daemon.errors)
            # One that is connected still hears why; it is told to come back.
            refused = await early.ask(post(BODY))
            assert_error(refused, 529)
            assert refused.header("retry-after") is not None
        assert answers[0].status_code == 200
        assert await trio.to_thread.run_sync(daemon.wait) == 0


async def test_work_beyond_the_deadline_is_told_so(place: Path) -> None:
    write(place, STUCK_TOML + "[jobs]\ndrain_s = 0.5\n")
    with spawned("serve", "--port", "0", cwd=place) as daemon:
        daemon.started()
        async with connect(daemon.url) as wire:
            await wire.send(post(BODY))
            await trio.to_thread.run_sync(until, lambda: in_flight(daemon.url) == 1)
            daemon.tell(signal.SIGTERM)
            assert "shutdown" in assert_error(await wire.answer(), 503)
        assert await trio.to_thread.run_sync(daemon.wait) == 0


@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_it_at_once(place: Path, which: signal.Signals) -> None:
    write(place, STUCK_TOML)
    with spawned("serve", "--port", "0", cwd=place) as daemon:
        daemon.started()
        answers: list[httpx2.Response] = []
        call(daemon.url, answers, **{"x-bf-async": "true"})
        daemon.tell(signal.SIGTERM)
        until(lambda: "drain.started" in daemon.errors)
        with pytest.raises(subprocess.TimeoutExpired):
            daemon.process.wait(0.5)
        daemon.tell(which)
        assert daemon.wait(AT_ONCE_S) == 0
        assert "Traceback" not in daemon.errors


# --- as a platform starts it -----------------------------------------------------------------------


def test_the_procfile_under_honcho(place: Path) -> None:
    pytest.importorskip("honcho", reason="honcho is not installed")
    write(place, ECHO_TOML + '[[keys]]\nname = "ci"\nkey = "env:CI_KEY"\n')
    port = free_port()
    command = [sys.executable, "-m", "honcho", "-f", str(ROOT / "Procfile"), "-d", str(place), "start"]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {"PORT": str(port), "CI_KEY": KEY, "PATH": path}
    with spawned(cwd=place, env=env, command=command) as honcho:
        honcho.started()
        assert f"listens on http://0.0.0.0:{port}" in honcho.banner
        answers: list[httpx2.Response] = []
        url = f"http://127.0.0.1:{port}"
        call(url, answers, **{"x-api-key": KEY})
        call(url, answers)
        assert [answer.status_code for answer in answers] == [200, 401]
        honcho.tell(signal.SIGTERM)
        honcho.wait()
        assert "drain.done" in honcho.banner + honcho.errors
        with pytest.raises(httpx2.ConnectError):
            call(url, answers)
