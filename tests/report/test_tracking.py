"""Weights & Biases, really run offline: it hears every number and no text, and needs no account."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from soul.records import InputError
from soul.report.tracking import allowed, track, track_all

wandb = pytest.importorskip("wandb")

RunDirs = Callable[..., Path]
CANARY = "Mirela Okonjo-Tandu keeps 47 lantern moths in Vellsund"
PARTS = (CANARY, CANARY[:24], CANARY[-24:])  # records are cut into blocks: a part would be whole


def found(text: str, folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


@pytest.fixture
def run(run_dir: RunDirs) -> Path:
    """A run directory with a forget row wherever a mistake could have put one."""
    folder = run_dir("so-npo")
    results = json.loads((folder / "results.json").read_text())
    results["settings"] |= {"refusal": CANARY, "schedule": "linear"}
    results["reasons"]["cost.peak_memory_bytes"] = CANARY
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "samples.jsonl").write_text(json.dumps({"split": "forget", "prompt": CANARY, "generated": CANARY}) + "\n")
    (folder / "config.json").write_text(json.dumps({"output": CANARY}))
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join([json.dumps({**json.loads(lines[0]), "row": CANARY}), *lines[1:]]) + "\n")
    return folder


def test_a_run_is_tracked_offline_without_an_account_and_without_a_text(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    told = track_all([run], project="project-a")
    assert told is not None and told.startswith("1 run(s)") and "wandb sync" in told
    [kept] = (run / "wandb").glob("offline-run-*")
    assert not [name for part in PARTS for name in found(part, run / "wandb")]
    for heard in (
        "unlearned/forget/rougeL_recall",
        "train/grad_norm",
        "epoch/retain/probability",
        "retain_weight",
        '"linear"',
        '"tofu/forget10"',
    ):
        assert found(heard, kept), heard  # the same search does find what was to be sent
    assert CANARY not in capfd.readouterr().err
    assert track_all([run], project="project-a") is None  # once
    assert len(list((run / "wandb").glob("offline-run-*"))) == 1
    with wandb.init(project="project-a", dir=str(tmp_path), mode="offline", config={"leak": CANARY}, settings=wandb.Settings(silent=True)):
        pass
    assert found(CANARY, tmp_path / "wandb")  # a text that is sent is found


def test_only_numbers_switches_and_names_are_settings() -> None:
    given = {
        "rho": 0.04,
        "epochs": 5,
        "nesterov": True,
        "engine": "ddp",
        "row": CANARY,
        "path": "/data/forget.json",
        "none": None,
        "list": [1],
    }
    assert allowed(given) == {"rho": 0.04, "epochs": 5, "nesterov": True, "engine": "ddp"}


def test_a_server_that_refuses_is_bad_input_and_says_how_to_go_on(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**options: object) -> None:
        raise wandb.errors.CommError("no route")

    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(InputError, match="WANDB_MODE=offline"):
        track(run, project="p")
    with pytest.raises(InputError):
        track_all([run], project="p")
    assert not (run / ".stages" / "tracked.json").exists()
