"""What can be said about the image without building it: pinned bases, what is copied, constraints, and who runs."""

from __future__ import annotations

import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

from cluster.checks.common import image_complaints, pinned_version
from cluster.checks.job import IMAGE_ROOT

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
TARGETS = ("cpu", "cuda")


def instructions() -> list[tuple[str, str]]:
    text = (ROOT / "cluster" / "Dockerfile").read_text(encoding="utf-8")
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#")).replace("\\\n", " ").splitlines()
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines if line.strip()]


def stages() -> dict[str, list[tuple[str, str]]]:
    found: dict[str, list[tuple[str, str]]] = {}
    for word, rest in instructions():
        if word == "FROM":
            found[rest.split(" AS ")[1]] = current = []
        current.append((word, rest))
    return found


def copied(stage: str) -> list[str]:
    arguments = [rest.split() for word, rest in stages()[stage] if word == "COPY"]
    return [source for words in arguments for source in [word for word in words if not word.startswith("--")][:-1]]


def is_sent(path: str) -> bool:
    """By .dockerignore: the last pattern that fits decides."""
    sent = True
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        pattern = line.removeprefix("!")
        if not line or line.startswith("#"):
            continue
        names = path.split("/")
        if any(fnmatch("/".join(names[: n + 1]), pattern) for n in range(len(names))) or fnmatch("/" + path, "/*" + pattern[2:]):
            sent = line.startswith("!")
    return sent


def test_there_is_one_target_for_cpu_and_one_for_cuda() -> None:
    assert tuple(stages()) == TARGETS


@pytest.mark.parametrize("stage", TARGETS)
def test_the_base_is_pinned_to_the_ray_of_the_constraints_and_a_python_that_is_supported(stage: str) -> None:
    image = stages()[stage][0][1].split()[0]
    assert list(image_complaints("FROM", image)) == []
    found = re.fullmatch(r"rayproject/ray:([\d.]+)-py3(\d+)-(cpu|gpu)", image)
    assert found is not None
    assert found[1] == pinned_version("ray")
    assert f"Programming Language :: Python :: 3.{found[2]}" in PROJECT["classifiers"]


@pytest.mark.parametrize("stage", TARGETS)
def test_what_is_copied_exists_and_reaches_the_builder(stage: str) -> None:
    sources = copied(stage)
    assert {"soul", "pipelines", "pyproject.toml", "constraints.txt"} <= set(sources)
    assert [source for source in sources if not (ROOT / source).exists()] == []
    assert [source for source in sources if not is_sent(source)] == []


@pytest.mark.parametrize(
    "path", [".env", ".git/config", "runs/demo/model/model.safetensors", ".venv/bin/python", "soul/.env", "data/x.json", "key.pem"]
)
def test_secrets_data_and_runs_do_not(path: str) -> None:
    assert not is_sent(path)


@pytest.mark.parametrize("stage", TARGETS)
def test_every_installation_is_constrained(stage: str) -> None:
    installs = [part for word, rest in stages()[stage] if word == "RUN" for part in rest.split("&&") if "pip install" in part]
    assert len(installs) >= 2
    assert [part for part in installs if "-c constraints.txt" not in part and "--no-deps" not in part] == []


@pytest.mark.parametrize("stage", TARGETS)
def test_it_does_not_run_as_root(stage: str) -> None:
    users = [rest for word, rest in stages()[stage] if word == "USER"]
    assert users[-1] == "1000"


@pytest.mark.parametrize("stage", TARGETS)
def test_the_project_lies_where_the_manifests_look_for_it(stage: str) -> None:
    (folder,) = (rest for word, rest in stages()[stage] if word == "WORKDIR")
    assert folder + "/" == IMAGE_ROOT


def test_the_manifests_name_this_version() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "cluster" / "kuberay").glob("*.yaml"))
    images = set(re.findall(r"image: (\S+)", text))
    assert images == {f"registry.example.com/soul:{PROJECT['version']}-{stage}" for stage in TARGETS}


def test_launcher_files_have_the_same_base() -> None:
    bases = {stages()[stage][0][1].split()[0] for stage in TARGETS}
    for file in ("aws.yaml", "gcp.yaml"):
        document = yaml.safe_load((ROOT / "cluster" / file).read_text(encoding="utf-8"))
        own = [kind["docker"]["worker_image"] for kind in document["available_node_types"].values() if "docker" in kind]
        assert {document["docker"]["image"], *own} == bases
