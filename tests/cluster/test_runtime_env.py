from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from ray._private.runtime_env.packaging import create_package
from ray.dashboard.modules.dashboard_sdk import parse_runtime_env_args
from ray.runtime_env import RuntimeEnv

ROOT = Path(__file__).resolve().parents[2]
RUNTIME_ENV = ROOT / "cluster" / "runtime_env.yaml"
SCRIPT = ROOT / "cluster" / "runtime_env.py"

LEFT_OUT = [
    ".env",
    ".env.local",
    "soul/.env",
    ".git/config",
    ".venv/lib/site.py",
    "runs/demo/model/model.safetensors",
    "elsewhere/model.safetensors",
    "elsewhere/.cache/tokens.bin",
    "data/tofu/forget01.json",
    "wandb/run/x.wandb",
    "soul/__pycache__/records.cpython-311.pyc",
    ".mypy_cache/x",
    "me.pem",
]
BROUGHT = [
    "soul/records.py",
    "soul/data/sources.py",
    "soul/report/page.html.j2",
    "pipelines/tofu.py",
    "cluster/runtime_env.yaml",
    "pyproject.toml",
]


def brought(root: Path, target: Path) -> set[str]:
    document = yaml.safe_load(RUNTIME_ENV.read_text(encoding="utf-8"))
    create_package(str(root), target, include_gitignore=False, excludes=document["excludes"])
    with zipfile.ZipFile(target) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


def test_secrets_data_runs_and_caches_stay_and_the_package_is_brought(tmp_path: Path) -> None:
    root = tmp_path / "project"
    for name in [*LEFT_OUT, *BROUGHT]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x")
    assert brought(root, tmp_path / "out.zip") == set(BROUGHT)


def test_every_module_of_the_package_is_brought_from_this_tree(tmp_path: Path) -> None:
    names = brought(ROOT, tmp_path / "out.zip")
    modules = {str(path.relative_to(ROOT)) for folder in ("soul", "pipelines") for path in (ROOT / folder).rglob("*.py")}
    assert modules - names == set()
    assert (tmp_path / "out.zip").stat().st_size < 5 * 2**20


def test_ray_knows_every_key_and_every_variable_is_text() -> None:
    document = yaml.safe_load(RUNTIME_ENV.read_text(encoding="utf-8"))
    assert set(document) <= RuntimeEnv.known_fields
    RuntimeEnv(**document)


def run_script(*names: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *names], env={"PATH": os.environ["PATH"], **environment}, capture_output=True, text=True, timeout=60
    )


def test_values_are_passed_by_name_through_a_pipe_as_ray_reads_it(tmp_path: Path) -> None:
    secret = 'hf_a"b: c#d'
    result = run_script(
        "HF_TOKEN", "AWS_ENDPOINT_URL", environment={"HF_TOKEN": secret, "AWS_ENDPOINT_URL": "http://h:1", "OTHER": "not named"}
    )
    assert result.returncode == 0, result.stderr
    reading, writing = os.pipe()
    os.write(writing, result.stdout.encode())
    os.close(writing)
    document = parse_runtime_env_args(runtime_env=f"/dev/fd/{reading}", working_dir=".")
    os.close(reading)
    base = yaml.safe_load(RUNTIME_ENV.read_text(encoding="utf-8"))
    assert document["env_vars"] == {**base["env_vars"], "HF_TOKEN": secret, "AWS_ENDPOINT_URL": "http://h:1"}
    assert document["excludes"] == base["excludes"]
    assert document["working_dir"] == "."


@pytest.mark.parametrize(
    ("environment", "says"), [({}, "HF_TOKEN"), ({"HF_TOKEN": ""}, "HF_TOKEN"), ({"HF_TOKEN": "very$ecret"}, "HF_TOKEN")]
)
def test_a_variable_that_cannot_be_passed_is_named_and_its_value_is_not(environment: dict[str, str], says: str) -> None:
    result = run_script("HF_TOKEN", environment=environment)
    assert result.returncode == 2
    assert says in result.stderr
    assert result.stdout == ""
    assert "ecret" not in result.stderr


def test_values_are_not_shown_on_a_terminal() -> None:
    leader, follower = os.openpty()
    environment = {"PATH": os.environ["PATH"], "HF_TOKEN": "very-secret"}
    result = subprocess.run(
        [sys.executable, str(SCRIPT), "HF_TOKEN"], env=environment, stdout=follower, stderr=subprocess.PIPE, text=True, timeout=60
    )
    os.close(follower)
    os.set_blocking(leader, False)
    with pytest.raises(OSError):  # nothing was written
        os.read(leader, 1)
    os.close(leader)
    assert result.returncode == 2
    assert "terminal" in result.stderr
