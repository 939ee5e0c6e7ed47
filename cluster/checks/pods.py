"""Pods and other objects of Kubernetes: its own schema, then what a pod of a Ray cluster has to have here."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

import kubernetes_validate

from cluster.checks.common import image_complaints

VERSION: Final = "1.34"
GPU: Final = "nvidia.com/gpu"
_QUANTITY: Final = re.compile(r"^(\d+(?:\.\d+)?)(m|k|Ki|M|Mi|G|Gi|T|Ti)?$")
_FACTOR: Final = {None: 1.0, "m": 1e-3, "k": 1e3, "Ki": 2**10, "M": 1e6, "Mi": 2**20, "G": 1e9, "Gi": 2**30, "T": 1e12, "Ti": 2**40}


def object_complaints(document: Mapping[str, Any]) -> Iterator[str]:
    """A plain object of Kubernetes against the schema of its kind."""
    yield from _schema_complaints(document, "")


def template_complaints(where: str, template: Mapping[str, Any], *, is_ray: bool) -> Iterator[str]:
    """A pod template; `is_ray`: its first container runs Ray, so it has probes and shares nothing it need not."""
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod", **template.get("metadata", {})}, "spec": template.get("spec", {})}
    broken = list(_schema_complaints(pod, where))
    yield from broken
    if broken:
        return
    spec = template["spec"]
    security = spec.get("securityContext") or {}
    if security.get("runAsNonRoot") is not True:
        yield f"{where}.spec.securityContext.runAsNonRoot: want true"
    for kind in ("initContainers", "containers"):
        for index, container in enumerate(spec.get(kind) or []):
            runs_ray = is_ray and kind == "containers" and index == 0
            yield from _container_complaints(f"{where}.spec.{kind}[{index}]", container, runs_ray=runs_ray)
    if any(volume.get("hostPath") for volume in spec.get("volumes") or []):
        yield f"{where}.spec.volumes: hostPath opens the node's own files to the pod"
    yield from _mount_complaints(where, spec)


def _schema_complaints(document: Mapping[str, Any], where: str) -> Iterator[str]:
    try:
        kubernetes_validate.validate(dict(document), VERSION, strict=True)
    except kubernetes_validate.ValidationError as error:
        path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error.path)
        yield f"{where}{path}: {error.message}".lstrip(".")
    except (kubernetes_validate.InvalidSchemaError, kubernetes_validate.SchemaNotFoundError):
        yield f"{where or 'kind'}: {document.get('apiVersion')} {document.get('kind')} is no object of Kubernetes {VERSION}"


def _container_complaints(where: str, container: Mapping[str, Any], *, runs_ray: bool) -> Iterator[str]:
    if "image" not in container:
        yield f"{where}.image: missing"
    else:
        yield from image_complaints(f"{where}.image", container["image"])
    resources = container.get("resources") or {}
    asked, limit = resources.get("requests") or {}, resources.get("limits") or {}
    for name in ("cpu", "memory"):
        if name not in asked or name not in limit:
            yield f"{where}.resources: {name} needs a request and a limit: Ray and the scheduler size nodes by them"
        elif (low := quantity(asked[name])) is not None and (high := quantity(limit[name])) is not None and low > high:
            yield f"{where}.resources: the request of {name} ({asked[name]}) is more than its limit ({limit[name]})"
    if GPU in asked and asked.get(GPU) != limit.get(GPU):
        yield f"{where}.resources: {GPU} is requested without the same limit, which Kubernetes refuses"
    if runs_ray:
        for probe in ("readinessProbe", "livenessProbe"):
            if probe not in container:
                yield f"{where}.{probe}: missing"
    if (container.get("securityContext") or {}).get("privileged"):
        yield f"{where}.securityContext.privileged: a privileged container owns its node"
    for port in container.get("ports") or []:
        if not 1 <= port["containerPort"] <= 65_535:
            yield f"{where}.ports: {port['containerPort']} is no port"


def _mount_complaints(where: str, spec: Mapping[str, Any]) -> Iterator[str]:
    volumes = {volume["name"] for volume in spec.get("volumes") or []}
    for container in [*(spec.get("initContainers") or []), *spec["containers"]]:
        for mount in container.get("volumeMounts") or []:
            if mount["name"] not in volumes:
                yield f"{where}.spec.volumes: no volume {mount['name']!r}, which {container['name']} mounts"


def quantity(value: object) -> float | None:
    """A number of Kubernetes: 500m, 16Gi, 4. None for what is none."""
    found = _QUANTITY.match(str(value))
    return float(found[1]) * _FACTOR[found[2]] if found else None


def gpus_of(template: Mapping[str, Any]) -> int:
    containers = (template.get("spec") or {}).get("containers") or []
    return sum(int(((container.get("resources") or {}).get("limits") or {}).get(GPU, 0)) for container in containers)


def variables_of(template: Mapping[str, Any]) -> set[str]:
    """The environment variables that the first container gets by name."""
    containers = (template.get("spec") or {}).get("containers") or [{}]
    return {str(entry.get("name")) for entry in containers[0].get("env") or []}
