"""A result that is deleted while a poll reads it from the file is gone for the next poll."""

from collections.abc import AsyncIterator

import pytest
import trio

from events.projections import JobSnapshot
from service.main import Gateway
from tests.scenarios.restarts import Place, place, result, submit
from tests.support.gateway import poll, request
from tests.support.providers import FakeProvider

__all__ = ["place"]


@pytest.fixture
async def kept(place: Place) -> AsyncIterator[tuple[Gateway, str]]:
    """A job of an earlier life, whose result only the file has."""
    async with place.life(FakeProvider()) as gateway:
        job_id = await submit(gateway)
        assert (await result(gateway, job_id)).status == 200
    async with place.life(FakeProvider()) as gateway:
        yield gateway, job_id


@pytest.mark.parametrize("late", [True, False], ids=["read before", "read meanwhile"])
async def test_a_result_does_not_come_back(
    kept: tuple[Gateway, str], monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    gateway, job_id = kept
    snapshot, append = gateway.log.snapshot, gateway.log.append
    has_read, go_on = trio.Event(), trio.Event()
    polled: list[int] = []

    async def slow_snapshot(job_id: str) -> JobSnapshot:
        found = await snapshot(job_id)
        has_read.set()
        await go_on.wait()
        return found

    async def read_it() -> None:
        polled.append((await poll(gateway.url, job_id)).status)

    async def append_after_a_poll(*arguments: object, **named: object) -> int:
        await read_it()
        return await append(*arguments, **named)  # type: ignore[arg-type]  # passed on as it came

    async with trio.open_nursery() as nursery:
        if late:
            with monkeypatch.context() as meanwhile:
                meanwhile.setattr(gateway.log, "snapshot", slow_snapshot)
                nursery.start_soon(read_it)
                await has_read.wait()
        else:
            monkeypatch.setattr(gateway.log, "append", append_after_a_poll)
        assert (await request(gateway.url, "DELETE", f"/v1/jobs/{job_id}")).status == 200
        go_on.set()
    assert polled == [200]
    assert (await poll(gateway.url, job_id)).status == 404
