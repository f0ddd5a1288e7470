"""Fixtures of every suite."""

import pytest
import trio

from actors.timers import Timers


@pytest.fixture
async def timers(nursery: trio.Nursery) -> Timers:
    """Timers that run until the test is over."""
    timers = Timers()
    nursery.start_soon(timers.run)
    return timers
