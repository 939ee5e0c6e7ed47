"""RayCluster, RayJob and RayService (ray.io/v1, KubeRay 1.7): strict models of their own fields, then what KubeRay takes and should not.

Pod templates are checked against Kubernetes' schema. The operator's webhooks and its CEL rules are not rebuilt here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Final, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from cluster.checks.common import Count, Strict, model_complaints, pinned_version, secret_complaints
from cluster.checks.job import entrypoint_complaints, runtime_env_complaints
from cluster.checks.pods import gpus_of, quantity, template_complaints, variables_of
from cluster.checks.serving import serve_complaints

Name = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")]
Parameters = dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]*$")], str]  # of `ray start`, all text
Seconds = Annotated[int, Field(ge=0, strict=True)]
Yes = Literal[True]


class _Metadata(Strict):
    name: Name
    namespace: Name | None = None
    labels: dict[str, str] = Field(default_factory=dict)
    annotations: dict[str, str] = Field(default_factory=dict)


class _Autoscaler(Strict):
    version: Literal["v2"]
    idleTimeoutSeconds: Seconds = 60
    upscalingMode: Literal["Default", "Aggressive", "Conservative"] = "Default"
    resources: dict[str, dict[str, str]]
    image: str | None = None
    imagePullPolicy: Literal["Always", "IfNotPresent", "Never"] | None = None
    env: list[dict[str, Any]] = Field(default_factory=list)
    envFrom: list[dict[str, Any]] = Field(default_factory=list)
    securityContext: dict[str, Any] | None = None
    volumeMounts: list[dict[str, Any]] = Field(default_factory=list)


class _Authentication(Strict):
    mode: Literal["token"]


class _Head(Strict):
    rayStartParams: Parameters
    template: dict[str, Any]
    serviceType: Literal["ClusterIP"] = "ClusterIP"
    enableIngress: Literal[False] = False
    resources: dict[str, str] = Field(default_factory=dict)
    labels: dict[str, str] = Field(default_factory=dict)


class _Workers(Strict):
    groupName: Name
    minReplicas: Count
    maxReplicas: Count
    replicas: Count | None = None
    numOfHosts: Annotated[int, Field(ge=1)] = 1
    idleTimeoutSeconds: Seconds | None = None
    priority: int = 0
    suspend: bool = False
    rayStartParams: Parameters = Field(default_factory=dict)
    resources: dict[str, str] = Field(default_factory=dict)
    labels: dict[str, str] = Field(default_factory=dict)
    template: dict[str, Any]

    @model_validator(mode="after")
    def _ordered(self) -> _Workers:
        if self.minReplicas > self.maxReplicas:
            raise ValueError(f"minReplicas {self.minReplicas} is more than maxReplicas {self.maxReplicas}")
        if self.replicas is not None and not self.minReplicas <= self.replicas <= self.maxReplicas:
            raise ValueError(f"replicas {self.replicas} is not between minReplicas and maxReplicas")
        return self


class ClusterSpec(Strict):
    rayVersion: str
    enableInTreeAutoscaling: Yes
    autoscalerOptions: _Autoscaler
    authOptions: _Authentication
    headGroupSpec: _Head
    workerGroupSpecs: list[_Workers] = Field(min_length=1)
    headServiceAnnotations: dict[str, str] = Field(default_factory=dict)
    networkPolicy: dict[str, Any] | None = None
    suspend: bool = False


class JobSpec(Strict):
    entrypoint: Annotated[str, Field(min_length=1)]
    rayClusterSpec: ClusterSpec
    submissionMode: Literal["K8sJobMode", "HTTPMode"] = "K8sJobMode"
    backoffLimit: Annotated[int, Field(ge=1)]  # a lost head is repeated on a new cluster
    activeDeadlineSeconds: Annotated[int, Field(gt=0)]
    shutdownAfterJobFinishes: Yes  # else its machines go on costing
    ttlSecondsAfterFinished: Seconds
    runtimeEnvYAML: str = ""
    submitterConfig: dict[str, int] | None = None
    submitterPodTemplate: dict[str, Any] | None = None
    entrypointNumCpus: Annotated[float, Field(ge=0)] = 0.0
    entrypointNumGpus: Annotated[float, Field(ge=0)] = 0.0
    metadata: dict[str, str] = Field(default_factory=dict)
    suspend: bool = False


class _Upgrade(Strict):
    type: Literal["NewCluster", "None"]


class ServiceSpec(Strict):
    serveConfigV2: str
    rayClusterConfig: ClusterSpec
    upgradeStrategy: _Upgrade | None = None
    excludeHeadPodFromServeSvc: bool = False
    rayServiceInitializingTimeoutSeconds: Seconds | None = None
    rayClusterDeletionDelaySeconds: Seconds | None = None
    suspend: bool = False


SPECS: Final[dict[str, type[Strict]]] = {"RayCluster": ClusterSpec, "RayJob": JobSpec, "RayService": ServiceSpec}


def kuberay_complaints(document: Mapping[str, Any], notes: list[str] | None = None) -> list[str]:
    """`notes` receives what could not be checked from here."""
    if document.get("apiVersion") != "ray.io/v1":
        return [f"apiVersion: {document.get('apiVersion')} is not served by KubeRay 1.7 for every kind. Want ray.io/v1"]
    unknown = sorted(set(document) - {"apiVersion", "kind", "metadata", "spec"})
    found = [f"{key}: unknown key" for key in unknown]
    found += _shape_complaints(_Metadata, document.get("metadata", {}), "metadata")
    broken = _shape_complaints(SPECS[str(document["kind"])], document.get("spec", {}), "spec")
    found += broken
    if not broken:  # the rest relies on the shape
        found += _spec_complaints(str(document["kind"]), document["spec"], notes)
    found += [line for line in secret_complaints(document) if line not in found]
    return found


def _shape_complaints(model: type[Strict], document: Any, where: str) -> list[str]:
    try:
        model.model_validate(document)
    except ValidationError as error:
        return list(model_complaints(error, where))
    return []


def _spec_complaints(kind: str, spec: Mapping[str, Any], notes: list[str] | None) -> Iterator[str]:
    if kind == "RayCluster":
        yield from cluster_complaints("spec", spec)
    elif kind == "RayJob":
        cluster = spec["rayClusterSpec"]
        yield from cluster_complaints("spec.rayClusterSpec", cluster)
        room = _capacity(cluster)
        yield from entrypoint_complaints("spec.entrypoint", spec["entrypoint"], must_last=True, capacity=room, notes=notes)
        yield from _inner_yaml(
            "spec.runtimeEnvYAML", spec.get("runtimeEnvYAML", ""), lambda inner, where: runtime_env_complaints(inner, where)
        )
        if "submitterPodTemplate" in spec:
            yield from template_complaints("spec.submitterPodTemplate", spec["submitterPodTemplate"], is_ray=False)
    else:
        cluster = spec["rayClusterConfig"]
        yield from cluster_complaints("spec.rayClusterConfig", cluster)
        templates = [cluster["headGroupSpec"]["template"], *(group["template"] for group in cluster["workerGroupSpecs"])]
        keys = all("SOUL_API_KEYS" in variables_of(template) for template in templates)
        yield from _inner_yaml(
            "spec.serveConfigV2",
            spec["serveConfigV2"],
            lambda inner, where: serve_complaints(inner, where=where, keys_on_nodes=keys, capacity=_capacity(cluster)),
        )


def _inner_yaml(where: str, text: str, check: Any) -> Iterator[str]:
    """A document inside a document, which KubeRay passes on unread."""
    if not text.strip():
        return
    try:
        inner = yaml.safe_load(text)
    except yaml.YAMLError:
        yield f"{where}: is no YAML"
        return
    yield from check(inner, where)


def cluster_complaints(where: str, spec: Mapping[str, Any]) -> Iterator[str]:
    if str(spec["rayVersion"]) != pinned_version("ray"):
        yield f"{where}.rayVersion: {spec['rayVersion']}, constraints.txt has {pinned_version('ray')}"
    head = spec["headGroupSpec"]
    yield from _group_complaints(f"{where}.headGroupSpec", head)
    groups = {f"{where}.workerGroupSpecs[{index}]": group for index, group in enumerate(spec["workerGroupSpecs"])}
    names = [group["groupName"] for group in groups.values()]
    if len(set(names)) < len(names):
        yield f"{where}.workerGroupSpecs: two groups with the same groupName"
    for path, group in groups.items():
        yield from _group_complaints(path, group)
        if is_spot(group):
            same = [other for other in groups.values() if not is_spot(other) and gpus_of(other["template"]) == gpus_of(group["template"])]
            if not same:
                yield f"{path}: spot machines without a fallback. Add an on-demand group with as many GPUs"
            elif all(other.get("priority", 0) >= group.get("priority", 0) for other in same):
                yield f"{path}: spot is not tried first. Give it a higher priority than the on-demand group"


def _group_complaints(where: str, group: Mapping[str, Any]) -> Iterator[str]:
    template = group["template"]
    yield from template_complaints(f"{where}.template", template, is_ray=True)
    spec = template.get("spec") or {}
    if spec.get("restartPolicy") != "Never":
        yield f"{where}.template.spec.restartPolicy: want Never: autoscaler v2 replaces pods itself"
    if "app.kubernetes.io/part-of" not in (template.get("metadata") or {}).get("labels", {}):
        yield f"{where}.template.metadata.labels: without app.kubernetes.io/part-of: soul the network policies of base.yaml do not hold"
    for name, value in (group.get("rayStartParams") or {}).items():
        if name.endswith("port") and not (value.isdecimal() and 1 <= int(value) <= 65_535):
            yield f"{where}.rayStartParams.{name}: {value} is no port"


def is_spot(group: Mapping[str, Any]) -> bool:
    """By the labels of its nodes: soul/market, or the ones of GKE, EKS and Karpenter."""
    labels = ((group["template"].get("spec") or {}).get("nodeSelector") or {}).items()
    return any(
        re.search(r"spot", f"{key}={value}", re.IGNORECASE) and str(value).lower() not in ("false", "on-demand") for key, value in labels
    )


def _capacity(spec: Mapping[str, Any]) -> dict[str, float]:
    """What the worker groups can grow to."""
    total = {"CPU": 0.0, "GPU": 0.0}
    for group in spec["workerGroupSpecs"]:
        containers = (group["template"].get("spec") or {}).get("containers") or [{}]
        limits = (containers[0].get("resources") or {}).get("limits") or {}
        total["CPU"] += (quantity(limits.get("cpu", 0)) or 0.0) * group["maxReplicas"]
        total["GPU"] += gpus_of(group["template"]) * group["maxReplicas"]
    return total
