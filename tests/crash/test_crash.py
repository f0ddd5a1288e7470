"""The crash suite at its shortest; ``make test-crash`` runs it at length."""

import logging
import os
from pathlib import Path

import pytest

from tests.crash.batches import Terms, torment_batch
from tests.crash.harness import torment

KILLS = int(os.environ.get("KILLS", "4"))
TIMEOUT_S = 60 + 10 * KILLS


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_S)
async def test_nothing_accepted_is_ever_lost(tmp_path: Path) -> None:
    seed = int(os.environ.get("SEED", int.from_bytes(os.urandom(4))))
    log = logging.getLogger(__name__)
    # What is random is what is done and when, not what must hold. A failure names the seed.
    story = await torment(tmp_path, kills=KILLS, seed=seed, tell=log.info)
    log.info("%s", story.text)
    assert story.deaths.total() == KILLS
    assert story.accepted > 0
    assert sum(story.resumed) > 0


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_S)
async def test_a_batch_survives_kills_in_its_middle(tmp_path: Path) -> None:
    seed = int(os.environ.get("SEED", int.from_bytes(os.urandom(4))))
    log = logging.getLogger(__name__)
    terms = Terms(seed=seed, items=300, life_s=0.6, delay_s=0.1)
    assert await torment_batch(tmp_path, terms, kills=2, tell=log.info) < terms.items
