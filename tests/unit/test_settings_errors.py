"""Settings that are refused: what is said, and where the blame is put."""

from collections.abc import Mapping
from pathlib import Path

import pytest
from pydantic import ValidationError

from service.settings import (
    JobsSettings,
    KeySettings,
    LogSettings,
    ServerSettings,
    SettingsError,
    load,
)

KEY = "sk-bf-0123456789abcdef"
ECHO = '[[providers]]\nname = "echo"\nkind = "echo"\n'


@pytest.fixture(autouse=True)
def in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def problems(toml: str = "", environ: Mapping[str, str] | None = None, port: int | None = None) -> list[str]:
    Path("messagesd.toml").write_text(toml, encoding="utf-8")
    with pytest.raises(SettingsError) as caught:
        load(None, environ or {}, None, port)
    assert str(caught.value) == "\n".join(str(problem) for problem in caught.value.problems)
    return [str(problem) for problem in caught.value.problems]


def test_every_error_has_its_place() -> None:
    toml = """
        bogus = 3
        [server]
        hosst = "x"
        port = 70000
        [jobs]
        result_ttl_s = 0
        [[keys]]
        name = "ci"
        key = "env:CI_KEY"
        [[keys]]
        name = "both"
        key = "x"
        hash = "y"
        [[keys]]
        name = "neither"
        [[keys]]
        name = "spaces"
        key = "a b"
        [[keys]]
        name = "short"
        hash = "sha256:00"
        [[providers]]
        name = "up"
        kind = "anthropic"
        base_url = "nonsense"
        api_key = "env:UP_KEY"
        [[providers]]
        name = "kindless"
    """
    environ = {"MESSAGESD_JOBS__DRAIN_S": "-1", "MESSAGESD_SERVER__PROT": "1", "MESSAGESD_SRV__PORT": "1"}
    found = problems(toml, environ, port=-1)
    expected = [
        "messagesd.toml: bogus: unknown option",
        "messagesd.toml: server.hosst: unknown option",
        "environment: MESSAGESD_SERVER__PROT: unknown option",
        "environment: MESSAGESD_SRV__PORT: no section is named 'srv'",
        "environment: MESSAGESD_JOBS__DRAIN_S: Input should be greater than or equal to 0",
        "--port: Input should be greater than or equal to 0",
        "messagesd.toml: jobs.result_ttl_s: Input should be greater than 0",
        "messagesd.toml: keys[0].key: the environment variable 'CI_KEY' is not set",
        "messagesd.toml: keys[1]: give either key or hash, not both",
        "messagesd.toml: keys[2]: key or hash is required",
        "messagesd.toml: keys[3].key: a key is printable ASCII without spaces",
        'messagesd.toml: keys[4].hash: not "sha256:" and 64 hexadecimal digits',
        "messagesd.toml: providers[0].base_url: Input should be a valid URL, relative URL without a base",
        "messagesd.toml: providers[0].api_key: the environment variable 'UP_KEY' is not set",
        "messagesd.toml: providers[1]: kind is required",
    ]
    assert sorted(found) == sorted(expected)


def test_port_variable_is_blamed() -> None:
    assert problems(environ={"PORT": "http"}) == [
        "environment: PORT: Input should be a valid integer, unable to parse string as an integer"
    ]


def test_json_variables_are_blamed() -> None:
    assert problems(environ={"MESSAGESD_KEYS": "ci"}) == ["environment: MESSAGESD_KEYS: is not valid JSON"]
    assert problems(environ={"MESSAGESD_KEYS": '[{"key": "k"}]'}) == [
        "environment: MESSAGESD_KEYS: [0].name: is required"
    ]


def test_toml_errors_have_line_and_column() -> None:
    assert problems("[server]\nport = \n") == ["messagesd.toml: Invalid value (at line 2, column 8)"]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path, environ, expected in (
        (Path("no.toml"), {}, "--config: no such file: no.toml"),
        (None, {"MESSAGESD_CONFIG": "no.toml"}, "environment: MESSAGESD_CONFIG: no such file: no.toml"),
        (tmp_path, {}, f"{tmp_path}: cannot be read: Is a directory"),
    ):
        with pytest.raises(SettingsError) as caught:
            load(path, environ)
        assert str(caught.value) == expected
    Path("latin.toml").write_bytes(b"[server]\nhost = '\xe9'\n")
    with pytest.raises(SettingsError, match=r"^latin\.toml: is not UTF-8 \(at line 2\)$"):
        load(Path("latin.toml"), {})


def test_names_are_unique_and_known() -> None:
    toml = f"""
        [[keys]]
        name = "ci"
        key = "{KEY}"
        [[keys]]
        name = "ci"
        key = "other"
        [[keys]]
        name = "twin"
        key = "{KEY}"
        [[providers]]
        name = "echo"
        kind = "echo"
        [[routes]]
        model = "a"
        provider = "nobody"
        fallbacks = ["echo", "echo/b", "missing/b"]
    """
    assert problems(toml) == [
        "messagesd.toml: keys[1].name: 'ci' is used twice",
        "messagesd.toml: keys[2]: the same key as 'ci'",
        "messagesd.toml: routes[0].provider: no provider is named 'nobody'",
        "messagesd.toml: routes[0].fallbacks[2]: no provider is named 'missing'",
    ]
    assert problems(ECHO + ECHO) == ["messagesd.toml: providers[1].name: 'echo' is used twice"]
    assert problems("providers = []") == ["messagesd.toml: providers: at least one provider is needed"]


def test_routes_lead_somewhere() -> None:
    route = '[[routes]]\nmodel = "a"\n'
    either = "messagesd.toml: routes[0]: give either provider or targets"
    assert problems(ECHO + route) == [either]
    assert problems(ECHO + route + 'provider = "echo"\ntargets = [{ provider = "echo" }]\n') == [either]
    assert problems(ECHO + route + 'targets = [{ provider = "echo" }]\nrename = "b"\n') == [
        "messagesd.toml: routes[0]: rename belongs into each of the targets"
    ]
    targets = 'targets = [{ provider = "echo", weight = -1 }, { provider = "gone", wait = 3 }]\n'
    assert problems(ECHO + route + targets) == [
        "messagesd.toml: routes[0].targets[0].weight: Input should be greater than or equal to 0",
        "messagesd.toml: routes[0].targets[1].wait: unknown option",
    ]
    assert problems(ECHO + route + 'targets = [{ provider = "echo" }, { provider = "gone" }]\n') == [
        "messagesd.toml: routes[0].targets[1].provider: no provider is named 'gone'"
    ]


def test_each_of_several_provider_keys_is_read_from_the_environment() -> None:
    toml = """
        [[providers]]
        name = "p"
        kind = "anthropic"
        api_keys = [{ name = "a", key = "env:KEY_A" }, { name = "a", key = "env:KEY_B" }]
    """
    assert problems(toml, {"KEY_A": "sk-a"}) == [
        "messagesd.toml: providers[0].api_keys[1].key: the environment variable 'KEY_B' is not set",
        "messagesd.toml: providers[0].api_keys: two keys have the same name",
    ]


def test_default_ttl_fits_its_maximum() -> None:
    assert problems("[jobs]\nmax_result_ttl_s = 60\n") == [
        "messagesd.toml: jobs.max_result_ttl_s: is less than jobs.result_ttl_s"
    ]
    assert JobsSettings(result_ttl_s=60, max_result_ttl_s=60).max_result_ttl_s == 60


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("sqlite://e.db", "sqlite:// is followed by a slash and a path, for example sqlite:///events.db"),
        ("sqlite:///", "sqlite:// is followed by a slash and a path, for example sqlite:///events.db"),
        ("redis://127.0.0.1:6379/0", "redis:// is not in this version: use memory:// or sqlite:///PATH"),
        ("postgres://x", "not a log URL: use memory:// or sqlite:///PATH"),
        ("memory", "not a log URL: use memory:// or sqlite:///PATH"),
        ("memory://x", "memory:// takes nothing after it"),
    ],
)
def test_logs_that_are_not_there(url: str, message: str) -> None:
    assert problems(f'[log]\nurl = "{url}"\n') == [f"messagesd.toml: log.url: {message}"]
    with pytest.raises(ValidationError, match=message):
        LogSettings(url=url)


def test_host_is_checked() -> None:
    assert ServerSettings(host=" [::1] ").host == "::1"
    assert problems('[server]\nhost = "http://x"\n') == [
        "messagesd.toml: server.host: not a host name or an IP address"
    ]


@pytest.mark.parametrize("kind", ["ANTHROPIC", "OPENAI"])
def test_bad_default_url_is_named(kind: str) -> None:
    found = problems(environ={f"{kind}_API_KEY": "x", f"{kind}_BASE_URL": "nonsense"})
    assert len(found) == 1
    assert found[0].startswith(f"environment: {kind}_BASE_URL: Input should be a valid URL")


def test_errors_show_no_secret() -> None:
    with pytest.raises(ValidationError) as caught:
        KeySettings.model_validate({"name": "no name!", "key": KEY})
    assert KEY not in str(caught.value)
    assert not any(KEY in text for text in problems(f'[[keys]]\nname = "no name!"\nkey = "{KEY}"\n'))


def test_an_empty_variable_is_not_a_secret() -> None:
    assert problems('[[keys]]\nname = "a"\nkey = "env:EMPTY"\n', {"EMPTY": ""}) == [
        "messagesd.toml: keys[0].key: the environment variable 'EMPTY' is not set"
    ]


def test_environment_values_are_blamed_on_their_variable() -> None:
    toml = "[jobs]\nmax_in_flight = 1\n"
    assert problems(toml, {"MESSAGESD_JOBS__MAX_IN_FLIGHT": "0"}) == [
        "environment: MESSAGESD_JOBS__MAX_IN_FLIGHT: Input should be greater than or equal to 1"
    ]
    assert problems(toml, {"MESSAGESD_SERVER": '{"backlog": 0}'}) == [
        "environment: MESSAGESD_SERVER: backlog: Input should be greater than or equal to 1"
    ]


def test_variables_that_reach_too_deep() -> None:
    assert problems(environ={"MESSAGESD_SERVER__HOST__NAME": "x"}) == [
        "environment: server.host: Input should be a valid string"
    ]


def test_sections_of_the_wrong_shape() -> None:
    assert problems('server = "here"\nkeys = ["sk"]\n') == [
        "messagesd.toml: server: Input should be a valid dictionary or instance of ServerSettings",
        "messagesd.toml: keys[0]: Input should be a valid dictionary or instance of KeySettings",
    ]
