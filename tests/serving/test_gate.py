"""What the gate lets through, and that every way of passing off other weights or another report is refused with its reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from soul.records import InputError
from soul.report.seal import KEY_VARIABLE, make_seal
from soul.serving.gate import Catalogue, Hashes, Hosted, read_catalogue
from soul.serving.policy import Policy
from soul.serving.settings import Hosting
from tests.serving_runs import PASSING, write_model, write_run


@pytest.fixture(scope="module")
def passing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("gate") / "x")


@pytest.fixture
def run(passing: Path, tmp_path: Path) -> Path:
    """A copy to spoil, with its standards beside it."""
    for folder in passing.parent.iterdir():
        shutil.copytree(folder, tmp_path / folder.name)
    return tmp_path / "x"


def look(run: Path, *, on_loopback: bool = True, policy: Policy | None = None, **options: object) -> Catalogue:
    hosting = Hosting.model_validate({"runs": {"x": str(run)}, "policy": policy or Policy(), **options})
    return read_catalogue(hosting, on_loopback=on_loopback, hashes=Hashes())


def only(run: Path) -> Hosted:
    return look(run).models["x"]


def test_a_good_run_is_hosted_with_its_standards(run: Path) -> None:
    catalogue = look(run)
    assert {model.id: (model.role, model.evaluated) for model in catalogue.hosted()} == {
        "x": ("unlearned", True),
        "x.target": ("target", True),
        "x.retrained": ("retrained", True),
    }
    assert len({model.spec.sha256 for model in catalogue.hosted() if model.spec}) == 3
    assert all(check.passed for check in catalogue.models["x"].checks)


def edit_report(run: Path) -> None:
    text = (run / "results.json").read_text()
    (run / "results.json").write_text(text.replace("0.33", "0.32"))


def swap_weights(run: Path) -> None:
    shutil.copy(run.parent / "x-target" / "model.safetensors", run / "model" / "model.safetensors")


def swap_tokenizer(run: Path) -> None:
    path = run / "model" / "tokenizer.json"
    path.write_text(path.read_text().replace("<|eos|>", "<|end|>"))


def swap_whole_model(run: Path) -> None:
    shutil.rmtree(run / "model")
    shutil.copytree(run.parent / "x-target", run / "model")


def add_a_shard(run: Path) -> None:
    shutil.copy(run / "model" / "model.safetensors", run / "model" / "model-00002.safetensors")


def pickle_only(run: Path) -> None:
    (run / "model" / "model.safetensors").rename(run / "model" / "pytorch_model.bin")


def other_seal(run: Path) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["seal"]["models"].pop("unlearned")
    (run / "manifest.json").write_text(json.dumps(manifest))


BREACHES: dict[Callable[[Path], object], str] = {
    edit_report: "changed afterwards",
    swap_weights: "other weights",
    swap_tokenizer: "other weights",
    swap_whole_model: "other weights",
    add_a_shard: "other weights",
    pickle_only: "no safetensors",
    other_seal: "names no unlearned",
    lambda run: shutil.rmtree(run / "model"): "folder is not where",
    lambda run: (run / "results.json").unlink(): "no evaluation report",
    lambda run: (run / "results.json").write_text("{"): "not JSON",
    lambda run: (run / "results.json").write_text('{"schema": 1}'): "does not follow",
    lambda run: (run / "manifest.json").unlink(): "missing or cannot be read",
    lambda run: (run / "manifest.json").write_text("{}"): "holds no seal",
    lambda run: (run / "manifest.json").write_text("[1]"): "holds no seal",
    lambda run: (run / "manifest.json").write_bytes(b"\xff\xfe"): "missing or cannot be read",
    lambda run: shutil.rmtree(run): "is not there",
}


@pytest.mark.parametrize("breach", BREACHES)
def test_each_breach_is_refused_with_its_reason(run: Path, breach: Callable[[Path], object]) -> None:
    breach(run)
    found = only(run)
    assert found.spec is None and not found.evaluated
    assert BREACHES[breach] in str(found.reason)
    assert str(run) not in str(found.reason)  # callers need not know where runs lie


def test_the_model_card_is_not_part_of_the_weights(run: Path) -> None:
    (run / "model" / "README.md").write_text("a card")
    assert only(run).evaluated


@pytest.mark.parametrize(
    ("unlearned", "passes"),
    [
        ((0.349, 0.529, 0.541), True),
        ((0.351, 0.500, 0.580), False),
        ((0.300, 0.531, 0.580), False),
        ((0.300, 0.500, 0.539), False),
        ((0.000, 0.000, 0.900), True),
    ],
)
def test_the_policy_at_its_borders(tmp_path: Path, unlearned: tuple[float, float, float], passes: bool) -> None:
    run = write_run(tmp_path / "x", numbers={**PASSING, "unlearned": unlearned})
    found = only(run)
    assert found.evaluated == passes
    assert ("does not pass" in str(found.reason)) != passes


def test_without_a_retrained_model_only_a_ceiling_can_judge(tmp_path: Path) -> None:
    run = write_run(tmp_path / "x", numbers={**PASSING, "retrained": None})
    assert "nothing to be compared with" in str(only(run).reason)
    high, low = ({"rougeL_recall": value, "exact_memorization": 0.6} for value in (0.34, 0.32))
    assert look(run, policy=Policy.model_validate({"ceilings": high})).models["x"].evaluated
    assert not look(run, policy=Policy.model_validate({"ceilings": low})).models["x"].evaluated


def test_the_target_is_shown_on_loopback_only_unless_the_policy_says_so(run: Path) -> None:
    assert look(run, on_loopback=False).models["x.target"].spec is None
    assert look(run, on_loopback=False).models["x"].spec is not None
    assert look(run, on_loopback=False, policy=Policy(references="always")).models["x.target"].spec is not None
    assert look(run, policy=Policy(references="never")).models["x.target"].spec is None


def test_a_run_that_calls_its_target_unlearned_is_still_judged_by_hash(run: Path) -> None:
    """The role follows from the seal: a folder named like a standard gets no standard's treatment."""
    renamed = run.rename(run.parent / "y.target")
    swap_weights_into = renamed / "model"
    shutil.rmtree(swap_weights_into)
    write_model(swap_weights_into, 7)
    hosting = Hosting(runs={"y.target": str(renamed)})
    assert read_catalogue(hosting, on_loopback=True, hashes=Hashes()).models["y.target"].spec is None


def test_allow_unevaluated_hosts_and_marks(run: Path, tmp_path: Path) -> None:
    edit_report(run)
    found = look(run, allow_unevaluated=True).models["x"]
    assert found.spec is not None and not found.evaluated and "changed" in str(found.reason)
    plain = write_model(tmp_path / "plain", 3)
    assert only(plain).spec is None
    assert look(plain, allow_unevaluated=True).models["x"].spec is not None
    pickle_only(run)
    assert look(run, allow_unevaluated=True).models["x"].spec is None


def test_a_signed_seal_cannot_be_made_without_the_key(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    standards = {"unlearned": run / "model", "target": run.parent / "x-target"}
    monkeypatch.setenv(KEY_VARIABLE, "a key of the operator")
    assert "signature" in str(only(run).reason)
    (run / "manifest.json").write_text(json.dumps({"seal": make_seal(run, standards).model_dump()}))
    assert only(run).evaluated
    edit_report(run)
    monkeypatch.setenv(KEY_VARIABLE, "a guess")
    (run / "manifest.json").write_text(json.dumps({"seal": make_seal(run, standards).model_dump()}))
    monkeypatch.setenv(KEY_VARIABLE, "a key of the operator")
    assert "signature" in str(only(run).reason)


def test_hashes_are_remembered_until_a_file_changes(run: Path) -> None:
    hashes = Hashes()
    first = hashes.of(run / "model")
    assert hashes.of(run / "model") == first
    swap_weights(run)
    assert hashes.of(run / "model") != first


@pytest.mark.parametrize("name", ["..", "../x", "x/", "/etc/passwd", "x\0", "", "x" * 97, "x y", "é", "-x", ".x", "x\n"])
def test_ids_are_never_paths(run: Path, name: str) -> None:
    assert look(run).find(name) is None


def test_aliases(run: Path) -> None:
    catalogue = look(run, aliases={"production": "x"})
    found = catalogue.find("production")
    assert found is not None and found.id == "x"
    with pytest.raises(InputError, match="no model here"):
        look(run, aliases={"production": "z"})
    with pytest.raises(ValueError, match="share a name"):
        look(run, aliases={"x": "x"})
    with pytest.raises(ValueError, match="two dots"):
        Hosting(runs={"a..b": "."})
