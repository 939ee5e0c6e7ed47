"""A worker, a driver and a node killed in the middle of a run on two nodes: the same result as without."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.orchestration.kills import VICTIMS, Nodes, campaign, nodes, table

pytestmark = [pytest.mark.ray, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def where() -> Iterator[Nodes]:
    with nodes() as made:
        yield made


def test_three_kills_change_nothing(where: Nodes, tmp_path: Path) -> None:
    found = campaign(len(VICTIMS), 1, tmp_path, where)
    assert [kill.victim for kill in found] == list(VICTIMS)
    assert all(kill.same for kill in found), table(found)
    assert next(kill for kill in found if kill.victim == "driver").drivers == 2
