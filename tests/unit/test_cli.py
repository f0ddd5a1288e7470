"""The command line: what it prints, and with which exit code it ends."""

import errno
import importlib.metadata
import resource
import runpy
import socket
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner, Result

from service import cli
from service.settings import Settings, key_hash, load


@pytest.fixture(autouse=True)
def clean_surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("PORT", "MESSAGESD_CONFIG", "ANTHROPIC_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    Path("messagesd.toml").write_text('[[providers]]\nname = "echo"\nkind = "echo"\n')


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.main, arguments)


class FakeMain(ModuleType):
    """Stands in for service.main: serve() notes its settings, then raises what it was told to."""

    def __init__(self) -> None:
        super().__init__("service.main")
        self.served: list[Settings] = []
        self.error: BaseException | None = None

    async def serve(self, settings: Settings) -> None:
        self.served.append(settings)
        if self.error is not None:
            raise self.error


@pytest.fixture
def fake_main(monkeypatch: pytest.MonkeyPatch) -> FakeMain:
    fake = FakeMain()
    monkeypatch.setitem(sys.modules, "service.main", fake)
    # The limit belongs to the whole test process.
    monkeypatch.setattr(cli, "raise_open_files_limit", lambda: 0)
    return fake


def test_version() -> None:
    result = run("--version")
    assert result.exit_code == 0
    assert result.output == f"messagesd, version {cli.version()}\n"


def test_version_of_a_tree_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_name: str) -> str:
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert cli.version() == "unknown"


def test_new_key_is_printed_once_and_opens_the_door() -> None:
    result = run("keys", "new", "ci", "--admin")
    assert result.exit_code == 0
    key, _, table = result.output.partition("\n")
    assert key.startswith("sk-bf-")
    assert len(key) >= 6 + 43
    assert result.output.count(key) == 1
    assert tomllib.loads(table) == {"keys": [{"name": "ci", "hash": key_hash(key), "admin": True}]}
    Path("messagesd.toml").write_text(table)
    assert load(None, {}).keys[0].admin
    assert run("keys", "new", "ci").output.partition("\n")[0] != key
    assert "admin" not in run("keys", "new", "ci").output


def test_key_names_are_checked() -> None:
    result = run("keys", "new", 'x"\nadmin = true')
    assert result.exit_code == 2
    assert "sk-bf-" not in result.output


def test_check_config_prints_what_is_in_force() -> None:
    result = run("check-config")
    assert result.exit_code == 0
    assert tomllib.loads(result.output)["server"]["port"] == 8080


def test_check_config_prints_notices_as_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.settings._local_problem", lambda: "no weights")
    Path("messagesd.toml").write_text("")
    result = run("check-config")
    assert result.output.startswith("# local is not available (no weights): echo answers\n")
    assert tomllib.loads(result.output)["providers"][0]["name"] == "echo"


def test_check_config_prints_every_error() -> None:
    Path("other.toml").write_text("bogus = 1\n[jobs]\ndrain_s = -1\n")
    result = run("check-config", "--config", "other.toml")
    assert result.exit_code == 2
    assert sorted(result.stderr.splitlines()) == [
        "error: other.toml: bogus: unknown option",
        "error: other.toml: jobs.drain_s: Input should be greater than or equal to 0",
    ]
    assert result.stdout == ""


def test_serve_hands_the_settings_over(fake_main: FakeMain) -> None:
    result = run("serve", "--host", "localhost", "--port", "0")
    assert result.exit_code == 0
    (settings,) = fake_main.served
    assert (settings.server.host, settings.server.port) == ("localhost", 0)


def test_serve_refuses_a_bad_configuration(fake_main: FakeMain) -> None:
    result = run("serve", "--host", "0.0.0.0")
    assert result.exit_code == 2
    assert "configure at least one key" in result.stderr
    assert run("serve", "--port", "70000").exit_code == 2
    assert fake_main.served == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EADDRINUSE, "Address already in use"),
        ExceptionGroup(
            "nursery", [ExceptionGroup("inner", [OSError(errno.EADDRINUSE, "Address already in use")])]
        ),
        socket.gaierror(socket.EAI_NONAME, "Address already in use"),
    ],
)
def test_an_address_that_cannot_be_had(fake_main: FakeMain, error: Exception) -> None:
    fake_main.error = error
    result = run("serve")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: cannot listen on 127.0.0.1:8080: ")
    assert "Address already in use" in result.stderr


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, "disk"),
        ExceptionGroup("nursery", [OSError(errno.EADDRINUSE, "x"), ValueError("bug")]),
    ],
)
def test_other_errors_are_not_dressed_up(fake_main: FakeMain, error: Exception) -> None:
    fake_main.error = error
    assert run("serve").exception is error


def test_interrupted(fake_main: FakeMain) -> None:
    fake_main.error = KeyboardInterrupt()
    assert run("serve").exit_code == 130


def test_open_files_limit_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [(1024, 4096)]
    monkeypatch.setattr(resource, "getrlimit", lambda _which: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _which, pair: limits.append(pair))
    assert cli.raise_open_files_limit() == 4096
    assert cli.raise_open_files_limit() == 4096
    assert limits == [(1024, 4096), (4096, 4096)]


def test_open_files_limit_that_cannot_be_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_which: int, _pair: tuple[int, int]) -> None:
        raise OSError(errno.EPERM, "no")

    monkeypatch.setattr(resource, "getrlimit", lambda _which: (1024, resource.RLIM_INFINITY))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    assert cli.raise_open_files_limit() == 1024


def test_python_dash_m(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["service", "--version"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("service", run_name="__main__")
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("messagesd, version ")
