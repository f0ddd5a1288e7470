"""Fixtures of the contract suites."""

from collections.abc import AsyncIterator

import pytest
import trio

from events.log.base import EventLog
from tests.contracts.event_log_adapters import ADAPTERS, TEST_TIMEOUT_S, OpenLog


@pytest.fixture(params=list(ADAPTERS.values()), ids=list(ADAPTERS))
async def log(request: pytest.FixtureRequest) -> AsyncIterator[EventLog]:
    open_log: OpenLog = request.param
    with trio.fail_after(TEST_TIMEOUT_S):
        async with open_log() as log:
            yield log
