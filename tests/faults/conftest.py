"""Upstream faults are tried over both transports: what an upstream does must not depend on who calls it."""

import pytest

from actors.providers import anthropic
from actors.providers.transport_direct import DirectTransport
from actors.providers.transport_httpx2 import ProxiedTransport


@pytest.fixture(params=[DirectTransport, ProxiedTransport])
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """For ``usefixtures``: every provider of the test calls its upstream over this one."""
    monkeypatch.setattr(anthropic, "make_transport", request.param)
