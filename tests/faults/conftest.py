"""Upstream faults are tried over both transports: what an upstream does must not depend on who calls it."""

import pytest

from actors.providers import anthropic
from actors.providers.transport_h11 import DirectTransport
from actors.providers.transport_httpx2 import ProxiedTransport


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.module.__name__.rpartition(".")[2].startswith("test_upstream"):
        metafunc.fixturenames.append("transport")
        metafunc.parametrize("transport", [DirectTransport, ProxiedTransport], indirect=True)


@pytest.fixture
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anthropic, "make_transport", request.param)
