"""``python -m tests.crash``: as many kills as asked for, and a page on how it went."""

import os
import tempfile
from functools import partial
from pathlib import Path

import click
import trio

from tests.crash.harness import torment

SEED_BITS = 32


@click.command()
@click.option("--kills", type=click.IntRange(min=1), default=100, show_default=True)
@click.option("--seed", type=int, help="Picks what is done, and when. Default: any.")
def main(kills: int, seed: int | None) -> None:
    """Kill the daemon again and again under load, and check all it told its clients."""
    seed = int.from_bytes(os.urandom(SEED_BITS // 8)) if seed is None else seed
    click.echo(f"seed {seed}")
    with tempfile.TemporaryDirectory(prefix="messagesd-crash-") as place:
        story = trio.run(partial(torment, Path(place), kills=kills, seed=seed, tell=click.echo))
    click.echo(story.text)
    click.echo("every promise was kept")


if __name__ == "__main__":
    main()
