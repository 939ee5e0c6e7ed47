"""A worker, a driver and a node killed in the middle of a run on two nodes: the same result as without."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.orchestration.kills import ONE_WORKER, VICTIMS, Campaign, Nodes, carry_out, nodes, table
from tests.orchestration.mini import Finished

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def where() -> Iterator[Nodes]:
    with nodes() as made:
        yield made


def test_three_kills_change_nothing(finished: Finished, where: Nodes, tmp_path: Path) -> None:
    assert finished.config.cache_folder is not None
    campaign = Campaign(tmp_path, finished.data, Path(finished.config.cache_folder), ONE_WORKER)
    found = carry_out(campaign, len(VICTIMS), 1, where)
    assert [kill.victim for kill in found] == list(VICTIMS)
    assert all(kill.hit and kill.same for kill in found), table(found)
    assert next(kill for kill in found if kill.victim == "driver").drivers == 2
