"""Settings: where values come from, what is refused and where the blame is put."""

import tomllib
from collections.abc import Mapping
from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError

from actors.providers.options import AnthropicOptions, EchoOptions, OpenaiOptions
from service import settings as settings_module
from service.settings import (
    AuthSettings,
    KeySettings,
    RouteSettings,
    ServerSettings,
    Settings,
    SettingsError,
    describe,
    is_loopback,
    key_hash,
    load,
)

KEY = "sk-bf-0123456789abcdef"
ECHO = '[[providers]]\nname = "echo"\nkind = "echo"\n'


@pytest.fixture(autouse=True)
def in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def local_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings_module, "_local_problem", lambda: None)


def read(toml: str = "", environ: Mapping[str, str] | None = None, **flags: object) -> Settings:
    Path("messagesd.toml").write_text(toml, encoding="utf-8")
    host, port = flags.get("host"), flags.get("port")
    assert host is None or isinstance(host, str)
    assert port is None or isinstance(port, int)
    return load(None, environ or {}, host, port)


# Defaults


def test_runs_with_nothing_configured() -> None:
    settings = load(None, {})
    assert (settings.server.host, settings.server.port) == ("127.0.0.1", 8080)
    assert settings.server.max_body_bytes == 33_554_432
    assert settings.jobs.max_snapshot_bytes == 1 << 30
    assert settings.log.url == "memory://"
    assert [provider.name for provider in settings.providers] == ["local"]
    assert [(route.model, route.provider) for route in settings.routes] == [("*", "local")]
    assert settings.notices == ()


def test_echo_stands_in_for_local_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings_module, "_local_problem", lambda: "xllamacpp is not installed")
    settings = load(None, {})
    assert [(p.name, p.kind) for p in settings.providers] == [("echo", "echo")]
    assert settings.notices == ("local is not available (xllamacpp is not installed): echo answers",)


def test_configured_local_that_cannot_be_used_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings_module, "_local_problem", lambda: "no weights")
    settings = read('[[providers]]\nname = "tiny"\nkind = "local"\n')
    assert settings.notices == ("tiny is not available (no weights): its calls will fail",)


def test_anthropic_appears_with_its_key() -> None:
    environ = {"ANTHROPIC_API_KEY": "sk-ant-secret", "ANTHROPIC_BASE_URL": "http://127.0.0.1:9999"}
    settings = load(None, environ)
    upstream = settings.providers[1]
    assert isinstance(upstream, AnthropicOptions)
    assert upstream.api_key is not None
    assert upstream.api_key.get_secret_value() == "sk-ant-secret"
    assert str(upstream.base_url) == "http://127.0.0.1:9999/"
    assert [(r.model, r.provider) for r in settings.routes] == [("claude-*", "anthropic"), ("*", "local")]
    assert "sk-ant-secret" not in repr(settings)


def test_openai_appears_with_its_key() -> None:
    settings = load(None, {"OPENAI_API_KEY": "sk-secret", "ANTHROPIC_API_KEY": "sk-ant-secret"})
    assert [provider.kind for provider in settings.providers] == ["local", "anthropic", "openai"]
    upstream = settings.providers[2]
    assert isinstance(upstream, OpenaiOptions)
    assert upstream.api_key is not None
    assert upstream.api_key.get_secret_value() == "sk-secret"
    assert str(upstream.base_url) == "https://api.openai.com/v1"
    assert [(r.model, r.provider) for r in settings.routes] == [
        ("claude-*", "anthropic"),
        ("gpt-*", "openai"),
        ("chatgpt-*", "openai"),
        ("o[1-9]*", "openai"),
        ("*", "local"),
    ]
    assert "sk-secret" not in repr(settings) + describe(settings)
    elsewhere = load(None, {"OPENAI_API_KEY": "k", "OPENAI_BASE_URL": "https://x.example/v1?api-version=1"})
    upstream = elsewhere.providers[1]
    assert isinstance(upstream, OpenaiOptions)
    assert str(upstream.base_url) == "https://x.example/v1?api-version=1"


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:8080", "http://localhost:8080/anthropic", "http://[::1]:8080"]
)
def test_does_not_call_itself(url: str) -> None:
    settings = load(None, {"ANTHROPIC_API_KEY": "x", "ANTHROPIC_BASE_URL": url})
    assert [provider.name for provider in settings.providers] == ["local"]
    assert settings.notices == ("ANTHROPIC_BASE_URL is this daemon itself: anthropic is not configured",)
    settings = load(None, {"OPENAI_API_KEY": "x", "OPENAI_BASE_URL": url})
    assert settings.notices == ("OPENAI_BASE_URL is this daemon itself: openai is not configured",)


def test_settings_alone_read_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESSAGESD_SERVER__PORT", "9")
    settings = Settings()
    assert settings.server.port == 8080
    assert settings.providers == (EchoOptions(name="echo"),)
    assert settings.routes == (RouteSettings(model="*", provider="echo"),)


@pytest.mark.parametrize("path", ["server", "server.port", "providers", "keys"])
def test_frozen(path: str) -> None:
    target: object = Settings()
    *parents, name = path.split(".")
    for parent in parents:
        target = getattr(target, parent)
    with pytest.raises(ValidationError, match="frozen"):
        setattr(target, name, getattr(target, name))


# Sources


def test_flags_beat_environment_beats_port_beats_file() -> None:
    toml = '[server]\nhost = "127.0.0.2"\nport = 1111\nbacklog = 7\n'
    own = {"PORT": "2222", "MESSAGESD_SERVER__PORT": "3333"}
    assert read(toml).server.port == 1111
    assert read(toml, {"PORT": "2222"}).server.port == 2222
    assert read(toml, own).server.port == 3333
    assert read(toml, own, port=4444).server.port == 4444
    assert read(toml, own, host="localhost").server.host == "localhost"
    assert read(toml, own, port=4444).server.backlog == 7


def test_environment_is_case_insensitive_ignores_empty_and_takes_json() -> None:
    environ = {
        "messagesd_jobs__drain_s": "5",
        "MESSAGESD_JOBS__MAX_WAIT_S": "",
        "MESSAGESD_KEYS": f'[{{"name": "ci", "key": "{KEY}"}}]',
        "MESSAGESD_SERVICE_HOST": "10.0.0.1",
        "MESSAGESD_PORT": "tcp://10.0.0.1:8080",
    }
    settings = load(None, environ)
    assert (settings.jobs.drain_s, settings.jobs.max_wait_s) == (5.0, 600.0)
    assert [key.name for key in settings.keys] == ["ci"]


def test_config_path_beats_variable_beats_working_directory(tmp_path: Path) -> None:
    for port, name in ((1, "messagesd.toml"), (2, "two.toml"), (3, "three.toml")):
        (tmp_path / name).write_text(f"[server]\nport = {port}\n")
    assert load(None, {}).server.port == 1
    assert load(None, {"MESSAGESD_CONFIG": "two.toml"}).server.port == 2
    assert load(Path("three.toml"), {"MESSAGESD_CONFIG": "two.toml"}).server.port == 3


def test_byte_order_mark_is_no_error() -> None:
    assert read("\ufeff[server]\nport = 5\n").server.port == 5


def test_port_binds_all_interfaces_and_wants_a_key() -> None:
    with pytest.raises(
        SettingsError, match=r"^keys: server\.host 0\.0\.0\.0 can be reached from other"
    ) as caught:
        load(None, {"PORT": "5000"})
    assert len(caught.value.problems) == 1
    settings = read(f'[[keys]]\nname = "ci"\nkey = "{KEY}"\n', {"PORT": "5000"})
    assert (settings.server.host, settings.server.port) == ("0.0.0.0", 5000)


@pytest.mark.parametrize(
    ("toml", "environ", "flags", "expected"),
    [
        ('[server]\nhost = "127.0.0.3"\n', {}, {}, ("127.0.0.3", 5000)),
        ("", {"MESSAGESD_SERVER__HOST": "::1"}, {}, ("::1", 5000)),
        ("", {"MESSAGESD_SERVER__PORT": "6000"}, {}, ("127.0.0.1", 6000)),
        ("", {}, {"host": "127.0.0.4"}, ("127.0.0.4", 5000)),
        ("", {}, {"port": 7000}, ("127.0.0.1", 7000)),
    ],
)
def test_port_yields_to_what_was_set_on_purpose(
    toml: str, environ: dict[str, str], flags: dict[str, object], expected: tuple[str, int]
) -> None:
    server = read(toml, {"PORT": "5000", **environ}, **flags).server
    assert (server.host, server.port) == expected


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("::1", True),
        ("LocalHost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.0.1", False),
        ("example.org", False),
        ("localhost.example.org", False),
    ],
)
def test_loopback(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback
    if loopback:
        assert Settings(server=ServerSettings(host=host)).server.host == host
    else:
        with pytest.raises(ValidationError, match="configure at least one key"):
            Settings(server=ServerSettings(host=host))
        assert Settings(server=ServerSettings(host=host), auth=AuthSettings(allow_anonymous=True)).keys == ()


# Keys, routes, secrets


def test_keys_are_held_as_digests() -> None:
    upper = key_hash("other").removeprefix("sha256:").upper()
    toml = f"""
        [[keys]]
        name = "a"
        key = "env:CI_KEY"
        [[keys]]
        name = "b"
        hash = "sha256:{upper}"
    """
    settings = read(toml, {"CI_KEY": KEY})
    assert [key.digest.hex() for key in settings.keys] == [
        key_hash(KEY).removeprefix("sha256:"),
        key_hash("other").removeprefix("sha256:"),
    ]
    for text in (repr(settings), str(settings.model_dump()), describe(settings)):
        assert KEY not in text
        assert key_hash(KEY) not in text


def test_key_may_be_given_as_a_secret() -> None:
    key = KeySettings.model_validate({"name": "a", "key": SecretStr(KEY)})
    assert key.hash.get_secret_value() == key_hash(KEY)


def test_routes_are_derived_in_order() -> None:
    toml = """
        [[providers]]
        name = "first"
        kind = "echo"
        models = ["special", "odd[1]"]
        [[providers]]
        name = "up"
        kind = "anthropic"
        models = ["special"]
        [[providers]]
        name = "up2"
        kind = "anthropic"
    """
    assert [(route.model, route.provider) for route in read(toml).routes] == [
        ("special", "first"),
        ("odd[[]1]", "first"),
        ("special", "up"),
        ("claude-*", "up"),
        ("*", "first"),
    ]


def test_configured_routes_are_kept() -> None:
    routes = read(ECHO + '[[routes]]\nmodel = "x-*"\nprovider = "echo"\nrename = "y"\n').routes
    assert routes == (RouteSettings(model="x-*", provider="echo", rename="y"),)


def test_description_is_toml_that_reads_the_same() -> None:
    toml = ECHO + '[[routes]]\nmodel = "é\\u007f"\nprovider = "echo"\nfallbacks = ["echo/b"]\n'
    settings = read(toml, {"MESSAGESD_SERVER__PUBLIC_URL": "https://me:hush@example.org/x"})
    text = describe(settings)
    assert "hush" not in text
    assert 'public_url = "https://***@example.org/x"' in text
    values = tomllib.loads(text)
    assert values["routes"] == [{"model": "é\x7f", "provider": "echo", "fallbacks": ["echo/b"]}]
    del values["server"]["public_url"]
    again = Settings(**values)
    assert again.routes == settings.routes
    assert again.jobs == settings.jobs


def test_tables_in_lists_are_described_as_toml() -> None:
    toml = """
        [retries]
        max_retries = 0
        [[providers]]
        name = "p"
        kind = "anthropic"
        api_keys = [{ name = "a", key = "env:KEY_A", weight = 2 }]
        [[routes]]
        model = "*"
        targets = [{ provider = "p", weight = 1 }, { provider = "p", rename = "b" }]
    """
    settings = read(toml, {"KEY_A": "sk-hush"})
    text = describe(settings)
    assert "sk-hush" not in text
    values = tomllib.loads(text)
    assert values["providers"][0]["api_keys"] == [{"name": "a", "key": "**********", "weight": 2.0}]
    again = Settings(**values)
    assert again.routes == settings.routes
    assert again.retries == settings.retries


@pytest.mark.parametrize(
    ("option", "places"), [("", 4), ("n_parallel = 2", 2), ("n_parallel = 2\nmax_concurrency = 9", 9)]
)
def test_local_takes_as_many_jobs_as_it_has_slots(option: str, places: int) -> None:
    (local,) = read(f'[[providers]]\nname = "l"\nkind = "local"\n{option}\n').providers
    assert local.max_concurrency == places


def test_description_masks_provider_keys() -> None:
    text = describe(load(None, {"ANTHROPIC_API_KEY": "sk-ant-secret"}))
    assert "sk-ant-secret" not in text
    assert 'api_key = "**********"' in text


def test_local_problem_is_told_by_the_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    reason = settings_module._local_problem()
    assert reason is None or isinstance(reason, str)
    monkeypatch.setitem(__import__("sys").modules, "actors.providers.local", None)
    assert "actors.providers.local" in (settings_module._local_problem() or "")
