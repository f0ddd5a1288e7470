"""A batch, with the daemon killed again and again while it runs: ``python -m tests.crash.batches``.

Every life but the last ends in a SIGKILL after a random time. What must hold: the counts of each look are
those of the whole batch and never go back, not over a kill either; an upload that was cut off leaves no
batch, one that was answered leaves all of it; and at the end each item has one result, its own.
"""

import os
import random
import signal
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import orjson
import trio

from tests.crash.notes import BrokenPromiseError
from tests.e2e.daemon import Process, spawned
from tests.support.gateway import request

PATH = "/v1/messages/batches"
LOOK_S = 0.05
START_TIMEOUT_S = 40.0
END_TIMEOUT_S = 600.0
TOML = """
[server]
port = 0
[jobs]
max_attempts = 1000000
drain_s = 1
[batches]
max_running = 32
max_running_per_batch = 32
[log]
url = "sqlite:///events.db"
[[providers]]
name = "echo"
kind = "echo"
first_frame_delay_s = {delay_s}
"""
SIDE_ITEMS = 300
"""Of the batches whose uploads are cut off."""


def body_of(items: int, prefix: str = "item") -> bytes:
    """A batch whose items say who they are."""
    requests = [
        {
            "custom_id": f"{prefix}-{number}",
            "params": {
                "model": "echo",
                "max_tokens": 64,
                "messages": [{"role": "user", "content": f"{prefix}-{number}"}],
            },
        }
        for number in range(items)
    ]
    return orjson.dumps({"requests": requests})


def total(batch: dict[str, Any]) -> int:
    """How many items its counts add up to."""
    return sum(batch["request_counts"].values())


def keep(promise: bool, broken: str) -> None:
    """Raise BrokenPromiseError unless the promise was kept."""
    if not promise:
        raise BrokenPromiseError(broken)


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What is run, and how it is interrupted."""

    seed: int
    items: int
    life_s: float = 5.0
    """The longest life but the last, from the daemon's first answer."""
    delay_s: float = 0.01
    """What an item takes, at least."""


class _Run:
    def __init__(self, place: Path, terms: Terms, tell: Callable[[str], None]) -> None:
        (place / "messagesd.toml").write_text(TOML.format(delay_s=terms.delay_s))
        self._place = place
        self._rng = random.Random(terms.seed)
        self._items = terms.items
        self._life_s = terms.life_s
        self._tell = tell
        self._batch_id = ""
        self._done = 0
        self._answered: list[str] = []
        self._sent = 0

    async def run(self, kills: int) -> int:
        for number in range(kills):
            with spawned("serve", cwd=self._place) as daemon:
                await self._life(await trio.to_thread.run_sync(daemon.started))
                await trio.to_thread.run_sync(partial(daemon.wait))
            self._tell(f"{number + 1}/{kills}: killed after {self._done} of {self._items} items")
        done = self._done
        with spawned("serve", cwd=self._place) as daemon:
            await trio.to_thread.run_sync(daemon.started)
            with trio.fail_after(END_TIMEOUT_S):
                await self._finale(daemon.url)
            daemon.tell(signal.SIGTERM)
            keep(await trio.to_thread.run_sync(daemon.wait) == 0, "the last life did not end well")
        return done

    async def _life(self, daemon: Process) -> None:
        url = daemon.url
        if not self._batch_id:
            answer = await request(url, "POST", PATH, {}, body_of(self._items))
            keep(answer.status == 200, f"the batch was refused: {answer.status}")
            self._batch_id = answer.json["id"]
        with trio.move_on_after(self._rng.uniform(0.1, self._life_s)):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._upload, url)
                while True:
                    await self._look(url)
                    await trio.sleep(LOOK_S)
        daemon.tell(signal.SIGKILL)

    async def _look(self, url: str) -> dict[str, Any]:
        answer = await request(url, "GET", f"{PATH}/{self._batch_id}")
        keep(answer.status == 200, f"the batch is gone: {answer.status}")
        batch: dict[str, Any] = answer.json
        keep(total(batch) == self._items, f"counts of {total(batch)} items: {batch['request_counts']}")
        done = batch["request_counts"]["succeeded"]
        keep(done >= self._done, f"{done} items have succeeded, and {self._done} had before")
        self._done = done
        return batch

    async def _upload(self, url: str) -> None:
        """Another batch, whose upload the kill may cut off anywhere."""
        await trio.sleep(self._rng.uniform(0, self._life_s))
        self._sent += 1
        answer = await request(url, "POST", PATH, {}, body_of(SIDE_ITEMS, f"side{self._sent}"))
        keep(answer.status == 200, f"a batch was refused: {answer.status}")
        self._answered.append(answer.json["id"])

    async def _finale(self, url: str) -> None:
        while (await self._look(url))["processing_status"] != "ended":  # noqa: ASYNC110 - as clients do
            await trio.sleep(LOOK_S)
        await self._check_results(url, self._batch_id, "item", self._items)
        listed = (await request(url, "GET", f"{PATH}?limit=1000")).json["data"]
        ids = [batch["id"] for batch in listed]
        keep(set(self._answered) <= set(ids), "a batch that was answered is gone")
        keep(len(ids) <= self._sent + 1, "there are more batches than were sent")
        for batch in listed:
            if batch["id"] == self._batch_id:
                continue
            keep(total(batch) == SIDE_ITEMS, f"a batch of {total(batch)} of {SIDE_ITEMS} items")
            while not await self._has_ended(url, batch["id"]):  # noqa: ASYNC110 - as clients do
                await trio.sleep(LOOK_S)
            await self._check_results(url, batch["id"], None, SIDE_ITEMS)
        self._tell(f"{self._items} items, each with its own result; {len(ids) - 1} other batches")

    async def _has_ended(self, url: str, batch_id: str) -> bool:
        batch = (await request(url, "GET", f"{PATH}/{batch_id}")).json
        return bool(batch["processing_status"] == "ended")

    async def _check_results(self, url: str, batch_id: str, prefix: str | None, items: int) -> None:
        answer = await request(url, "GET", f"{PATH}/{batch_id}/results")
        results = [orjson.loads(line) for line in answer.body.splitlines()]
        prefix = prefix or str(results[0]["custom_id"]).partition("-")[0]
        names = [result["custom_id"] for result in results]
        keep(
            names == [f"{prefix}-{number}" for number in range(items)], "results are missing, or twice there"
        )
        for result in results:
            keep(result["result"]["type"] == "succeeded", f"{result}")
            text = "".join(block["text"] for block in result["result"]["message"]["content"])
            keep(text == result["custom_id"], f"{result['custom_id']} has the result of {text}")


async def torment_batch(place: Path, terms: Terms, *, kills: int, tell: Callable[[str], None]) -> int:
    """Kill the daemon ``kills`` times while a batch runs in the directory ``place``.

    Returns how many items had been done at the last kill. Raises BrokenPromiseError.
    """
    try:
        return await _Run(place, terms, tell).run(kills)
    except BaseException as error:
        error.add_note(f"seed {terms.seed}")
        raise


@click.command()
@click.option("--items", type=click.IntRange(min=1), default=20_000, show_default=True)
@click.option("--kills", type=click.IntRange(min=1), default=10, show_default=True)
@click.option("--seed", type=int, help="Picks when. Default: any.")
def main(items: int, kills: int, seed: int | None) -> None:
    """Kill the daemon again and again while it runs a batch, and check that nothing is lost or done twice."""
    seed = int.from_bytes(os.urandom(4)) if seed is None else seed
    click.echo(f"seed {seed}")
    terms = Terms(seed=seed, items=items)
    with tempfile.TemporaryDirectory(prefix="messagesd-crash-") as place:
        trio.run(partial(torment_batch, Path(place), terms, kills=kills, tell=click.echo))
    click.echo("every promise was kept")


if __name__ == "__main__":
    main()
