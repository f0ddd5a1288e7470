"""Upstream faults are tried over both transports: what an upstream does must not depend on who calls it."""

import pytest

from actors.providers import anthropic
from actors.providers.options import UpstreamLimits
from actors.providers.transport import Transport
from actors.providers.transport_direct import DirectTransport
from actors.providers.transport_httpx2 import ProxiedTransport
from actors.timers import Timers


@pytest.fixture(params=[DirectTransport, ProxiedTransport])
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """For ``usefixtures``: every provider of the test calls its upstream over this one."""

    def make(limits: UpstreamLimits, base_url: str, *, timers: Timers, trust_env: bool) -> Transport:
        if request.param is DirectTransport:
            return DirectTransport(limits, base_url, timers=timers, trust_env=trust_env)
        return ProxiedTransport(limits, base_url, trust_env=trust_env)

    monkeypatch.setattr(anthropic, "make_transport", make)
