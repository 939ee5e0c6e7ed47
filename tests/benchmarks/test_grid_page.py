"""The grid's page in a real browser: a click on a heading sorts its table by number, another one turns it round."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from soul.benchmarks.grid import Cell, Choice, Trial
from soul.report.grid_build import build_grid_report
from tests.benchmarks.test_grid_table import write_trial

CHROMIUM = shutil.which("chromium")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")]
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--dump-dom"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]


@pytest.mark.parametrize("clicks", [1, 2])
def test_a_click_on_a_heading_sorts_by_its_numbers(tmp_path: Path, clicks: int) -> None:
    methods = {"ga": 0.2, "npo": 4.0, "po": 0.9, "grad_diff": 2.1}
    trials = [Trial(Cell("tiny", method, "adamw"), Choice(), 0) for method in methods]
    for trial in trials:
        write_trial(tmp_path, trial, offset=methods[trial.cell.method])
    build_grid_report(trials, tmp_path, floor=0.9, samples=False)
    page = (tmp_path / "report.html").read_text()
    click = "for (let i = 0; i < {}; i++) document.querySelectorAll('.sortable th')[{}].querySelector('button').click();"
    column = [*re.findall(r'<th scope="col"><button type="button">(.*?)</button>', page)].index("Forget probability ↓")
    clicked = page.replace("</body>", f"<script>{click.format(clicks, column)}</script></body>")
    (tmp_path / "clicked.html").write_text(clicked)
    assert CHROMIUM is not None
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'browser'}", f"file://{tmp_path / 'clicked.html'}"]
    drawn = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True).stdout
    table = re.search(r'<table class="grid sortable">.*?</table>', drawn, re.DOTALL)
    assert table is not None and f'aria-sort="{"ascending" if clicks == 1 else "descending"}"' in table[0]
    rows = [re.findall(r'data-key="(.*?)"', row) for row in table[0].split("<tr>")[2:]]
    values = [float(row[column - 1]) for row in rows]
    assert len(values) == 6 and values == sorted(values, reverse=clicks == 2) and len(set(values)) > 3
