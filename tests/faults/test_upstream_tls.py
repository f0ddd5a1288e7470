"""Upstreams over TLS that stop: the same bounds as without it hold, and the connection goes."""

import ssl
from contextlib import suppress
from pathlib import Path

import pytest
import trio
import trustme
from trio.testing import MockClock

from actors.errors import UpstreamTimeoutError
from actors.providers.options import UpstreamLimits
from actors.providers.transport_direct import DirectTransport
from actors.timers import Timers
from tests.fake_upstream import STREAM_HEAD, Exchange, Script, answer, open_upstream
from tests.faults.upstream import HEAD_OF_BODY, chunk, options_for, stalls_after

IDLE_S, FIRST_BYTE_S, TOTAL_S = 20, 40, 100
BOUNDS_S = {"first byte": FIRST_BYTE_S, "idle": IDLE_S, "total": TOTAL_S}


@pytest.fixture
def clock() -> MockClock:
    return MockClock(autojump_threshold=0.05)


@pytest.fixture
def tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ssl.SSLContext:
    """A server's, for loopback; its authority is trusted."""
    authority = trustme.CA()
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(server)
    path = tmp_path / "authority.pem"
    authority.cert_pem.write_to_path(str(path))
    monkeypatch.setenv("SSL_CERT_FILE", str(path))
    return server


def limits_for(url: str) -> UpstreamLimits:
    return options_for(url, idle_timeout_s=IDLE_S, first_byte_timeout_s=FIRST_BYTE_S, total_timeout_s=TOTAL_S)


async def trickles(exchange: Exchange) -> None:
    await exchange.send(STREAM_HEAD)
    while True:
        await exchange.send(chunk(b"x"))
        await trio.sleep(IDLE_S / 2)


@pytest.mark.parametrize(
    ("script", "bound"),
    [
        (stalls_after(), "first byte"),
        (stalls_after(b"HTTP/1.1 20"), "first byte"),
        (stalls_after(HEAD_OF_BODY), "idle"),
        (stalls_after(STREAM_HEAD, chunk(b"x"), b"5\r\nh"), "idle"),
        (trickles, "total"),
    ],
    ids=["before the head", "in the head", "in a body", "in a stream", "never done"],
)
async def test_silence(
    script: Script, bound: str, tls: ssl.SSLContext, timers: Timers, clock: MockClock
) -> None:
    async with open_upstream(script, tls=tls) as upstream:
        transport = DirectTransport(limits_for(upstream.url), upstream.url, timers=timers)
        start = trio.current_time()
        with pytest.raises(UpstreamTimeoutError, match=f"{bound} timeout"):
            await transport.request("POST", "/", body=b"{}")
        assert trio.current_time() - start == pytest.approx(BOUNDS_S[bound], abs=1)
        await upstream.wait_open(0)
        await transport.aclose()


async def test_a_kept_connection_is_used_again_after_a_long_silence_between_calls(
    tls: ssl.SSLContext, timers: Timers, clock: MockClock
) -> None:
    async def keeps(exchange: Exchange) -> None:
        await exchange.send(answer(200, b"{}"))
        exchange.keep_alive()

    async with open_upstream(keeps, tls=tls) as upstream:
        transport = DirectTransport(limits_for(upstream.url), upstream.url, timers=timers)
        for _ in range(8):
            assert (await transport.request("POST", "/", body=b"{}")).body == b"{}"
            # The bound of the last read passes meanwhile, for a connection that nobody reads.
            await trio.sleep(IDLE_S + 5)
        assert upstream.connections == 1
        await transport.aclose()


async def test_what_was_read_when_time_ran_out_is_not_taken_for_a_live_connection(
    tls: ssl.SSLContext, timers: Timers, mock_clock: MockClock
) -> None:
    """Over TLS a read may bring what had come before, in the moment in which its timer closes the link."""

    async def two_records(exchange: Exchange) -> None:
        await exchange.send(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{")
        await exchange.send(b"}")
        exchange.keep_alive()

    async with open_upstream(two_records, tls=tls) as upstream:
        transport = DirectTransport(limits_for(upstream.url), upstream.url, timers=timers)
        for _ in range(40):
            # Which of the two is first, the read or the timer, is up to trio's dice.
            with suppress(UpstreamTimeoutError):
                async with transport.open_stream("POST", "/", body=b"{}") as response:
                    mock_clock.jump(TOTAL_S + 1)
                    await response.read()
        await transport.aclose()
