"""Clocks for scenarios."""

import pytest
from trio.testing import MockClock

KERNEL_S = 0.01
"""Real time without anything to do before the clock jumps: the loopback device does not count as busy."""


@pytest.fixture
def http_clock() -> MockClock:
    """A clock for scenarios over real sockets."""
    return MockClock(autojump_threshold=KERNEL_S)
