"""When Python's cycle collector has its turn."""

import gc
from collections.abc import Iterator

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from service.collector import CALM_JOBS, COLLECT_AT_LATEST_S, COLLECT_EVERY_S, Collector, tune_collector
from tests.e2e.daemon import running
from tests.support.gateway import post, request

CONNECTIONS = 50


@pytest.fixture
def untouched_collector() -> Iterator[None]:
    before = gc.get_threshold()
    yield
    gc.set_threshold(*before)
    gc.unfreeze()
    gc.enable()


def test_the_collector_looks_less_often(untouched_collector: None) -> None:
    before = gc.get_threshold()
    tune_collector()
    assert gc.get_threshold()[0] > before[0]
    assert gc.get_freeze_count() > 0


@pytest.mark.parametrize(
    ("jobs", "every_s"),
    [(0, COLLECT_EVERY_S), (CALM_JOBS, COLLECT_EVERY_S), (CALM_JOBS + 1, COLLECT_AT_LATEST_S)],
)
async def test_a_full_collection_waits_for_calm_but_not_for_ever(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, jobs: int, every_s: float
) -> None:
    began_at = trio.current_time()
    collected_at: list[float] = []
    monkeypatch.setattr(gc, "collect", lambda: collected_at.append(round(trio.current_time() - began_at)))
    with trio.move_on_after(2.5 * COLLECT_AT_LATEST_S):
        await Collector(in_flight=lambda: jobs).run()
    assert collected_at[:2] == [every_s, 2 * every_s]


async def test_a_connection_leaves_nothing_to_collect(untouched_collector: None) -> None:
    async with running() as gateway:

        async def connect() -> None:
            assert (await post(gateway.url)).status == 200
            assert (await request(gateway.url, "GET", "/healthz")).status == 200

        await connect()
        gc.collect()
        gc.disable()
        for _ in range(CONNECTIONS):
            await connect()
        await trio.testing.wait_all_tasks_blocked()
        # One function of the framework's refers to itself; of ours there were 64 objects.
        assert gc.collect() < 10 * CONNECTIONS
