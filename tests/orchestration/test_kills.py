"""One run on two nodes loses its worker, its node and its driver, and ends with the bits of a run that lost nothing.

`make test-kills` strikes twenty runs at random moments.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.cluster.heads import wait_until
from tests.orchestration.kills import ONE_WORKER, RUN_SECONDS, STEPS, Campaign, lines, nodes, start, strike
from tests.orchestration.mini import Finished, fingerprint, steps

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]


def test_three_kills_change_nothing(finished: Finished, uninterrupted: Path, tmp_path: Path) -> None:
    assert finished.config.cache_folder is not None
    dice = random.Random(3)
    run, file = Campaign(tmp_path, finished.data, Path(finished.config.cache_folder), ONE_WORKER).written("run")
    log = file.with_suffix(".log")
    with nodes() as where:
        driver = start(file, where)
        try:
            for victim, earliest in (("worker", 30), ("node", 100), ("driver", 170)):
                at = earliest + dice.randrange(40)
                wait_until(lambda at=at: lines(run) >= at or driver.poll() is not None, timeout_s=RUN_SECONDS, every_s=0.02)
                assert driver.poll() is None and lines(run) < STEPS, log.read_text()[-3000:]
                assert strike(victim, driver, where), f"no {victim} to kill at step {at}"
            assert driver.wait(timeout=60) != 0 and not (run / "results.json").exists()
            driver = start(file, where)
            assert driver.wait(timeout=RUN_SECONDS) == 0, log.read_text()[-3000:]
        finally:
            driver.kill()
    assert len(steps(run)) == STEPS and steps(run) == steps(uninterrupted)
    assert fingerprint(run / "model") == fingerprint(uninterrupted / "model")
    assert (run / "results.json").is_file()
