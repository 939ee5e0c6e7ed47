"""Every file of cluster/ is accepted, and typical mistakes in each kind of file are rejected with a message that names them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from cluster.checks.job import entrypoint_complaints
from cluster.validate import complaints

CLUSTER = Path(__file__).resolve().parents[2] / "cluster"
FILES = sorted(path.relative_to(CLUSTER).as_posix() for path in CLUSTER.rglob("*.yaml"))
AWS, GCP, RAYCLUSTER, JOB, GRID, SERVICE = (
    "aws.yaml",
    "gcp.yaml",
    "kuberay/raycluster.yaml",
    "kuberay/rayjob-tofu.yaml",
    "kuberay/rayjob-grid.yaml",
    "kuberay/rayservice.yaml",
)
GONE = object()
POD = "workerGroupSpecs.1.template.spec"


@pytest.fixture(scope="module", autouse=True)
def schemas_are_read_once() -> Iterator[None]:
    """kubernetes-validate parses 3 MB of schema at every call."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kubernetes_validate.utils, "schema_contents", cache(kubernetes_validate.utils.schema_contents))
        yield


@cache
def parsed(file: str) -> Any:
    return yaml.safe_load((CLUSTER / file).read_text(encoding="utf-8"))


def changed(document: Any, path: str, value: Any) -> Any:
    """A copy in which the value at a dotted path (~ for a dot inside a key) is another, or gone."""
    document = json.loads(json.dumps(document))  # what an anchor shares becomes copies
    *outer, last = [int(part) if part.isdecimal() else part.replace("~", ".") for part in path.split(".")]
    place = document
    for part in outer:
        place = place[part]
    if value is GONE:
        del place[last]
    else:
        place[last] = value(place[last]) if callable(value) else value
    return document


def inner(path: str, value: Any) -> Callable[[str], str]:
    """The same inside a document that is a text."""
    return lambda text: yaml.safe_dump(changed(yaml.safe_load(text), path, value))


def told(hosting: dict[str, Any]) -> Callable[[Any], Any]:
    return lambda app: {**app, "deployments": [{"name": name, "user_config": hosting} for name in ("Gateway", "Generator")]}


def replaced(old: str, new: str) -> Callable[[Any], Any]:
    def change(value: Any) -> Any:
        values = value if isinstance(value, list) else [value]
        assert any(old in text for text in values)
        new_values = [text.replace(old, new) for text in values]
        return new_values if isinstance(value, list) else new_values[0]

    return change


# file, where, what it becomes, what the complaint says
MISTAKES: dict[str, tuple[str, str, Any, str]] = {
    # launcher
    "misspelt key": (AWS, "idle_timeout_minuts", 5, "idle_timeout_minuts"),
    "unknown head type": (AWS, "head_node_type", "heads", "head_node_type"),
    "no worker types at all": (AWS, "available_node_types", GONE, "available_node_types: missing"),
    "no GPU workers": (AWS, "available_node_types", lambda kinds: {k: kinds[k] for k in ("head", "cpu")}, "no worker type with GPUs"),
    "no CPU workers": (AWS, "available_node_types.cpu", GONE, "no worker type without GPUs"),
    "min above max": (AWS, "available_node_types.cpu.min_workers", 9, r"cpu: min_workers 9 is more than max_workers 8"),
    "min of all above max": (AWS, "max_workers", -1, "max_workers"),
    "no limit of a type": (AWS, "available_node_types.cpu.max_workers", GONE, "cpu.max_workers: missing"),
    "resources missing": (AWS, "available_node_types.gpu_spot.resources", GONE, "resources"),
    "resources empty": (AWS, "available_node_types.cpu.resources", {}, "resources: empty"),
    "GPU asked of a CPU machine": (AWS, "available_node_types.cpu.resources.GPU", 1, "GPU is 1, but a m7i.4xlarge has none"),
    "GPUs of the machine forgotten": (GCP, "available_node_types.gpu_spot.resources.GPU", GONE, "GPU is 0, but a g2-standard-48 has"),
    "spot without fallback": (AWS, "available_node_types.gpu_on_demand", GONE, "spot machines without a fallback"),
    "spot tried last": (GCP, "available_node_types.gpu_spot.priority", 0, "spot is not tried first"),
    "dashboard open": (AWS, "head_start_ray_commands", replaced("host=127.0.0.1", "host=0.0.0.0"), "dashboard listens on 0.0.0.0"),
    "head without token": (GCP, "head_start_ray_commands", replaced("RAY_AUTH_MODE=token ", ""), "head_start_ray_commands: RAY_AUTH_MODE"),
    "workers without token": (AWS, "worker_start_ray_commands", replaced("RAY_AUTH_MODE=token ", ""), "worker_start_ray.*RAY_AUTH_MODE"),
    "Ray's own start commands": (AWS, "head_start_ray_commands", GONE, "head_start_ray_commands: missing"),
    "bad port": (AWS, "head_start_ray_commands", replaced("--port=6379", "--port=637900"), "--port 637900 is no port"),
    "no autoscaling": (AWS, "head_start_ray_commands", replaced("--autoscaling-config", "--config"), "--autoscaling-config is missing"),
    "image that moves": (AWS, "docker.image", "rayproject/ray:latest", "not pinned"),
    "image without tag": (GCP, "available_node_types.gpu_spot.docker.worker_image", "rayproject/ray", "not pinned"),
    "another Ray": (AWS, "docker.image", "rayproject/ray:2.59.0-py311-cpu", "another Ray than constraints.txt"),
    "no constraints": (AWS, "worker_setup_commands", replaced("-c /home/ray/soul/constraints.txt", ""), "without -c constraints.txt"),
    "secret in a command": (AWS, "head_setup_commands", ["export HF_TOKEN=hf_abcdefghijklmnop"], "HF_TOKEN is written out"),
    "access key in the file": (AWS, "provider.aws_credentials", {"aws_secret_access_key": "x" * 40}, "aws_secret_access_key: a secret"),
    "open to the internet": (
        AWS,
        "provider.security_group",
        {"IpPermissions": [{"IpProtocol": "tcp", "FromPort": 8265, "ToPort": 8265, "IpRanges": [{"CidrIp": "0.0.0.0/0"}]}]},
        "open to the whole internet",
    ),
    "mount that is not there": (AWS, "file_mounts./home/ray/soul/soul", "src/soul", "src/soul does not exist"),
    "AWS: misspelt key of the machine": (AWS, "available_node_types.cpu.node_config.InstanceTyp", "m7i.large", "InstanceTyp"),
    "AWS: no role": (AWS, "available_node_types.cpu.node_config.IamInstanceProfile", GONE, "IamInstanceProfile: missing"),
    "AWS: no image": (AWS, "available_node_types.cpu.node_config.LaunchTemplate", GONE, "no host image"),
    "AWS: template not pinned": (AWS, "available_node_types.cpu.node_config.LaunchTemplate.Version", "$Latest", "Version: not pinned"),
    "GCP: misspelt key of the machine": (GCP, "available_node_types.cpu.node_config.machineTyp", "n2", "machineTyp: unknown key"),
    "GCP: image family": (
        GCP,
        "available_node_types.cpu.node_config.disks.0.initializeParams.sourceImage",
        "projects/x/global/images/family/common-cpu",
        "another image tomorrow",
    ),
    "GCP: GPU machine that would migrate": (
        GCP,
        "available_node_types.gpu_on_demand.node_config.scheduling",
        {},
        "onHostMaintenance: TERMINATE",
    ),
    # KubeRay
    "old API": (RAYCLUSTER, "apiVersion", "ray.io/v1alpha1", "Want ray.io/v1"),
    "misspelt key of the cluster": (RAYCLUSTER, "spec.enableInTreeAutoscalin", True, "enableInTreeAutoscalin: unknown key"),
    "autoscaler v1": (RAYCLUSTER, "spec.autoscalerOptions.version", "v1", "autoscalerOptions.version"),
    "no authentication": (RAYCLUSTER, "spec.authOptions", GONE, "authOptions: missing"),
    "authentication off": (SERVICE, "spec.rayClusterConfig.authOptions.mode", "disabled", "authOptions.mode"),
    "public service": (RAYCLUSTER, "spec.headGroupSpec.serviceType", "LoadBalancer", "serviceType"),
    "public ingress": (RAYCLUSTER, "spec.headGroupSpec.enableIngress", True, "enableIngress"),
    "minReplicas above maxReplicas": (RAYCLUSTER, "spec.workerGroupSpecs.0.minReplicas", 50, "minReplicas 50 is more than maxReplicas 8"),
    "replicas beyond the limit": (RAYCLUSTER, "spec.workerGroupSpecs.0.replicas", 9, "replicas 9 is not between"),
    "worker group without a name": (RAYCLUSTER, "spec.workerGroupSpecs.0.groupName", GONE, "groupName: missing"),
    "two groups of one name": (RAYCLUSTER, "spec.workerGroupSpecs.0.groupName", "gpu-spot", "same groupName"),
    "no worker groups": (RAYCLUSTER, "spec.workerGroupSpecs", [], "workerGroupSpecs"),
    "another Ray on Kubernetes": (RAYCLUSTER, "spec.rayVersion", "2.59.0", "rayVersion: 2.59.0"),
    "spot group without fallback": (RAYCLUSTER, "spec.workerGroupSpecs.2", GONE, "without a fallback"),
    "start parameter that is no port": (RAYCLUSTER, "spec.headGroupSpec.rayStartParams.port", "70000", "70000 is no port"),
    "start parameter that is no text": (RAYCLUSTER, "spec.headGroupSpec.rayStartParams.num-cpus", 2, "num-cpus"),
    "misspelt key of the pod": (RAYCLUSTER, f"spec.{POD}.nodeSelectr", {}, "nodeSelectr"),
    "image that moves in a pod": (RAYCLUSTER, f"spec.{POD}.containers.0.image", "soul:latest", "not pinned"),
    "no resources": (RAYCLUSTER, f"spec.{POD}.containers.0.resources", GONE, "cpu needs a request and a limit"),
    "request above limit": (RAYCLUSTER, f"spec.{POD}.containers.0.resources.requests.memory", "999Gi", "more than its limit"),
    "GPU request without limit": (
        RAYCLUSTER,
        f"spec.{POD}.containers.0.resources",
        {"requests": {"cpu": "1", "memory": "1Gi", "nvidia.com/gpu": 1}, "limits": {"cpu": "1", "memory": "1Gi"}},
        "requested without the same limit",
    ),
    "no probe": (RAYCLUSTER, f"spec.{POD}.containers.0.readinessProbe", GONE, "readinessProbe: missing"),
    "root": (RAYCLUSTER, f"spec.{POD}.securityContext", GONE, "runAsNonRoot"),
    "node's files": (RAYCLUSTER, f"spec.{POD}.volumes.0", {"name": "cache", "hostPath": {"path": "/"}}, "hostPath"),
    "volume that is not there": (RAYCLUSTER, f"spec.{POD}.volumes", GONE, "no volume 'cache'"),
    "pod that is restarted": (RAYCLUSTER, f"spec.{POD}.restartPolicy", "Always", "restartPolicy: want Never"),
    "pod outside the network policy": (RAYCLUSTER, "spec.workerGroupSpecs.0.template.metadata.labels", {}, "network policies"),
    "secret in a pod": (
        RAYCLUSTER,
        f"spec.{POD}.containers.0.env",
        [{"name": "WANDB_API_KEY", "value": "0123456789abcdef"}],
        "WANDB_API_KEY is written out",
    ),
    # jobs
    "script that is not there": (JOB, "spec.entrypoint", replaced("tofu.py", "tofoo.py"), "there is no pipelines/tofoo.py"),
    "flag that is not there": (JOB, "spec.entrypoint", replaced("--num-workers", "--workers"), "unknown flag --workers"),
    "setting out of range": (JOB, "spec.entrypoint", replaced("--num-workers 4", "--num-workers 0"), "num-workers"),
    "flag of the grid": (GRID, "spec.entrypoint", replaced("--seeds", "--sedes"), "unknown flag --sedes"),
    "more workers than GPUs": (
        JOB,
        "spec.entrypoint",
        replaced("--num-workers 4", "--num-workers 25"),
        "25 GPUs, the workers can grow to 24",
    ),
    "workers on CPUs that are not there": (
        JOB,
        "spec.entrypoint",
        replaced("--num-workers 4 --min-workers 2 --device gpu", "--num-workers 400 --device cpu"),
        "needs 400 CPUs",
    ),
    "grid that its own settings refuse": (
        GRID,
        "spec.entrypoint",
        replaced("--engine single", "--engine single --search asha --isolated"),
        "asha search needs runs that share processes",
    ),
    "grid of a method and optimizer that do not go together": (
        GRID,
        "spec.entrypoint",
        replaced("--engine single", "--engine fsdp --optimizers sophia_h"),
        "sophia_h",
    ),
    "grid into a folder": (GRID, "spec.entrypoint", replaced("s3://my-bucket/runs/grid", "/cache/grid"), "Name a bucket"),
    "grid with a cache that no store can have": (
        GRID,
        "spec.entrypoint",
        replaced("s3://my-bucket/cache", "s3://my-bucket"),
        "at least one name",
    ),
    "model that is nowhere": (
        GRID,
        "spec.entrypoint",
        replaced("meta-llama/Llama-3.2-1B-Instruct", "models/llama/1b"),
        "model folder models/llama/1b does not exist",
    ),
    "rows that are nowhere": (JOB, "spec.entrypoint", replaced("locuslab/TOFU", "data/tofu/rows"), "data/tofu/rows: no such folder"),
    "more tokens than the model takes": (
        GRID,
        "spec.entrypoint",
        replaced("meta-llama/Llama-3.2-1B-Instruct --finetune --seeds 3 --data locuslab/TOFU", "tiny-s --num-authors 20 --max-length 9999"),
        "the model takes at most",
    ),
    "results that go with the cluster": (JOB, "spec.entrypoint", replaced("s3://my-bucket/runs/tofu", "runs/tofu"), "Name a bucket"),
    "cluster that stays": (JOB, "spec.shutdownAfterJobFinishes", False, "shutdownAfterJobFinishes"),
    "lost head is not repeated": (JOB, "spec.backoffLimit", 0, "backoffLimit"),
    "misspelt key of the runtime environment": (
        JOB,
        "spec.runtimeEnvYAML",
        "env_var: {}",
        "env_var: unknown key",
    ),
    "secret in the runtime environment": (JOB, "spec.runtimeEnvYAML", "env_vars: {HF_TOKEN: hf_abcdefghijklmnop}", "HF_TOKEN"),
    # Serve
    "misspelt key of Serve": (SERVICE, "spec.serveConfigV2", inner("http_option", {}), "http_option: unknown key"),
    "misspelt health check": (
        SERVICE,
        "spec.serveConfigV2",
        inner("applications.0.deployments", [{"name": "Gateway", "health_check_timeouts": 3}]),
        "health_check_timeouts: unknown key",
    ),
    "min_replicas above max_replicas": (
        SERVICE,
        "spec.serveConfigV2",
        inner("applications.0.deployments", [{"name": "Generator", "autoscaling_config": {"min_replicas": 9, "max_replicas": 4}}]),
        "min_replicas 9 is more than max_replicas 4",
    ),
    "import path that is not there": (
        SERVICE,
        "spec.serveConfigV2",
        inner("applications.0.import_path", "soul.orchestration.serve:app"),
        "soul.orchestration.serve has no app",
    ),
    "misspelt setting of the server": (
        SERVICE,
        "spec.serveConfigV2",
        inner("applications.0.args.replica", {}),
        "replica: unknown key",
    ),
    "alias of nothing": (
        SERVICE,
        "spec.serveConfigV2",
        inner("applications.0", told({"runs": {"a": "/a"}, "aliases": {"b": "c"}})),
        "alias of c",
    ),
    "nothing hosted": (SERVICE, "spec.serveConfigV2", inner("applications.0.deployments", []), "no runs are hosted"),
    "told differently": (SERVICE, "spec.serveConfigV2", inner("applications.0.deployments.1.user_config", {}), "told the same user_config"),
    "replicas that do not fit": (SERVICE, "spec.serveConfigV2", inner("applications.0.args.replicas.num_gpus", 2), "need 8 GPU"),
    "two ports": (SERVICE, "spec.serveConfigV2", inner("applications.0.args.port", 8001), "differ from http_options"),
    "no port": (SERVICE, "spec.serveConfigV2", inner("http_options.port", 0), "http_options.port"),
    "served to everybody without keys": (
        SERVICE,
        "spec.rayClusterConfig.workerGroupSpecs.0.template.spec.containers.0.env",
        [],
        "there is no API key",
    ),
    "probe forgotten by the server": (
        SERVICE,
        "spec.rayClusterConfig.workerGroupSpecs.0.template.spec.containers.0.livenessProbe",
        GONE,
        "livenessProbe: missing",
    ),
}


@pytest.mark.parametrize("file", FILES)
def test_what_is_shipped_is_accepted(file: str) -> None:
    assert list(complaints((CLUSTER / file).read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_rejected_and_named(name: str) -> None:
    file, path, value, says = MISTAKES[name]
    broken = yaml.safe_dump(changed(parsed(file), path, value))
    found = list(complaints(broken))
    assert any(re.search(says, line) for line in found), found
    assert "hf_abcdefghijklmnop" not in " ".join(found)


WHOLE_FILES: dict[str, tuple[str, str]] = {
    "no YAML": ("a: [1", "no YAML"),
    "a key that stands twice": ("cluster_name: a\ncluster_name: b\n", "cluster_name: stands twice"),
    "another kind of file": ("services: {}\n", "no known kind of file"),
    "nothing": ("", "empty"),
    "a list": ("- 1\n", "expected keys and values"),
    "an object of no kind": ("apiVersion: v1\nkind: Pods\n", "Pods"),
    "a policy of the wrong shape": ("apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nspec: {podSelectr: {}}\n", "podSelect"),
    "a Secret with its content": ("apiVersion: v1\nkind: Secret\nstringData: {HF_TOKEN: hf_abcdefghijklmnop}\n", "HF_TOKEN"),
    "data uploaded with every job": ("excludes: [runs]\n", "secrets, results or data"),
    "the package's data left out": ("excludes: [.env, /runs, /data, data]\n", "soul/data too"),
    "a number among the variables": ("env_vars: {OMP_NUM_THREADS: 1}\n", "OMP_NUM_THREADS"),
}  # fmt: skip


@pytest.mark.parametrize("name", WHOLE_FILES)
def test_a_broken_file_is_rejected(name: str) -> None:
    text, says = WHOLE_FILES[name]
    found = list(complaints(text))
    assert any(says in line for line in found), found


def test_a_stack_with_a_misspelt_resource_is_rejected() -> None:
    text = (CLUSTER / "aws-stack.yaml").read_text(encoding="utf-8")
    assert any("AWS::S3::Buckets" in line for line in complaints(text.replace("AWS::S3::Bucket\n", "AWS::S3::Buckets\n")))


def commands_in(text: str) -> list[str]:
    """The scripts that a page submits to a cluster, each on one line."""
    joined = re.sub(r"\\\n\s*", " ", text)
    return re.findall(r"-- (python pipelines/\S+\.py (?!\.\.\.)[^\n`]+)", joined)


# what differs in the name of its folder alone is the same command
PAGES = ("README.md", "cluster/README.md", "docs/clusters.md", "docs/grids.md", "docs/scaling.md")
TOLD = [command for page in PAGES for command in commands_in((CLUSTER.parent / page).read_text(encoding="utf-8"))]
COMMANDS = sorted({re.sub(r"/runs/\w+", "/runs/x", command) for command in TOLD})


@pytest.mark.parametrize("command", COMMANDS)
def test_what_the_pages_submit_passes_its_own_checks(command: str) -> None:
    assert list(entrypoint_complaints("it", command, must_last="://" in command)) == []


def test_the_pages_submit_runs_and_grids() -> None:
    assert {"tofu.py", "grid.py"} <= {command.split()[1].rpartition("/")[2] for command in COMMANDS}


def test_what_cannot_be_checked_from_here_is_named_and_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOUL_STORE_COPIES", str(tmp_path / "copies"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")  # nobody listens: the bucket of the file is not asked
    monkeypatch.chdir(tmp_path)
    notes: list[str] = []
    assert list(complaints((CLUSTER / GRID).read_text(encoding="utf-8"), notes)) == []
    assert [re.sub(r":.*", "", note) for note in notes] == ["model meta-llama/Llama-3.2-1B-Instruct", "rows locuslab/TOFU"]
    entrypoint = "python pipelines/unlearn.py --model /cache/m --forget s3://b/f.jsonl --retain mine.jsonl --output gs://my-bucket/r"
    notes.clear()
    assert list(entrypoint_complaints("it", entrypoint, must_last=True, notes=notes)) == []
    assert notes == ["model /cache/m: on a disk of the nodes", "rows s3://b/f.jsonl: on a store, which is not asked"]
    assert list(tmp_path.iterdir()) == []


def test_the_command_names_file_and_mistake_and_exits_with_2(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text((CLUSTER / "runtime_env.yaml").read_text(encoding="utf-8"))
    bad.write_text("env_var: {}\nexcludes: []\n")
    command = [sys.executable, str(CLUSTER / "validate.py"), str(good), str(bad), str(tmp_path / "none.yaml")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2, result.stderr
    assert result.stdout.splitlines() == [
        f"{good}: ok",
        f"{bad}: env_var: unknown key",
        f"{tmp_path / 'none.yaml'}: cannot be read (No such file or directory)",
    ]


def test_what_the_server_writes_down_for_a_cluster_is_accepted(tmp_path: Path) -> None:
    from soul.orchestration.serve import write_serve_config
    from soul.serving.settings import Hosting, Replicas, ServeConfig

    hosting = Hosting(runs={"tofu": "/runs/tofu"}, aliases={"production": "tofu"})
    path = tmp_path / "serve.yaml"
    write_serve_config(ServeConfig(hosting=hosting, host="0.0.0.0", key_hashes=("0" * 64,), replicas=Replicas(maximum=3)), path)
    assert list(complaints(path.read_text(encoding="utf-8"))) == []


def test_serve_itself_takes_the_services_config() -> None:
    from ray.serve.schema import ServeDeploySchema

    schema = ServeDeploySchema.model_validate(yaml.safe_load(parsed(SERVICE)["spec"]["serveConfigV2"]))
    (app,) = schema.applications
    assert (schema.http_options.port, app.import_path) == (8000, "soul.orchestration.serve:build_app")
    assert {deployment.name for deployment in app.deployments} == {"Gateway", "Generator"}
