"""One machine of the launcher files: `node_config`, which Ray passes on unread, against what AWS and Google Cloud take."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, Final, Literal

import botocore.session
import botocore.validate
from pydantic import Field, ValidationError, model_validator

from cluster.checks.common import Count, Strict, model_complaints

_AWS_GPU: Final = re.compile(r"^(g|p)\d")
_GCP_GPU: Final = re.compile(r"^(a2|a3|a4|g2|g4)-")
_RAYS_KEYS: Final = ("SubnetIds",)  # Ray's own, replaced before AWS sees it


class _Disk(Strict):
    class Parameters(Strict):
        diskSizeGb: Count
        sourceImage: str
        diskType: str | None = None

        @model_validator(mode="after")
        def _pinned(self) -> _Disk.Parameters:
            if "/family/" in self.sourceImage:
                raise ValueError("sourceImage is a family, which is another image tomorrow. Name one image")
            return self

    boot: bool
    autoDelete: bool
    type: Literal["PERSISTENT", "SCRATCH"] = "PERSISTENT"
    initializeParams: Parameters


class _Scheduling(Strict):
    preemptible: bool = False
    provisioningModel: Literal["SPOT", "STANDARD"] = "STANDARD"
    instanceTerminationAction: Literal["DELETE", "STOP"] | None = None
    onHostMaintenance: Literal["TERMINATE", "MIGRATE"] | None = None
    automaticRestart: bool | None = None

    @model_validator(mode="after")
    def _never_restarted(self) -> _Scheduling:
        if self.provisioningModel == "SPOT" and self.automaticRestart is not False:
            raise ValueError("a spot machine cannot restart by itself: automaticRestart: false")
        return self


class _Account(Strict):
    email: str = Field(pattern=r"^[^@\s]+@[^@\s]+$")
    scopes: list[str]


class _Accelerator(Strict):
    acceleratorType: str
    acceleratorCount: Count


class _Metadata(Strict):
    class Item(Strict):
        key: str
        value: str

    items: list[Item]


class GcpMachine(Strict):
    """The fields of Compute Engine's Instance that these files use."""

    machineType: str
    disks: list[_Disk] = Field(min_length=1)
    scheduling: _Scheduling = Field(default_factory=_Scheduling)
    serviceAccounts: list[_Account] = Field(default_factory=list)
    guestAccelerators: list[_Accelerator] = Field(default_factory=list)
    metadata: _Metadata | None = None
    labels: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _gpus_do_not_migrate(self) -> GcpMachine:
        has_gpus = bool(self.guestAccelerators or _GCP_GPU.match(self.machineType))
        if has_gpus and self.scheduling.onHostMaintenance != "TERMINATE":
            raise ValueError("machines with GPUs cannot migrate: scheduling.onHostMaintenance: TERMINATE")
        return self


def machine_complaints(where: str, node: Mapping[str, Any], *, provider: str) -> Iterator[str]:
    if provider == "aws":
        yield from _aws_complaints(where, node)
    elif provider == "gcp":
        try:
            GcpMachine.model_validate(node)
        except ValidationError as error:
            yield from model_complaints(error, where)


def _aws_complaints(where: str, node: Mapping[str, Any]) -> Iterator[str]:
    """AWS's own description of RunInstances, and an image that stays what it is."""
    request = {key: value for key, value in node.items() if key not in _RAYS_KEYS} | {"MinCount": 1, "MaxCount": 1}
    report = botocore.validate.ParamValidator().validate(request, _run_instances())
    for line in report.generate_report().splitlines():
        yield f"{where}: {line}"
    if "InstanceType" not in node:
        yield f"{where}.InstanceType: missing"
    if not str(node.get("ImageId", "")).startswith("ami-") and "LaunchTemplate" not in node:
        yield f"{where}: no host image: Ray would take one of 2023. Name an ami- or the LaunchTemplate of aws-stack.yaml"
    if str(node.get("LaunchTemplate", {}).get("Version", "")).startswith("$"):
        yield f"{where}.LaunchTemplate.Version: not pinned. Name a number: nodes of one cluster could boot different images"
    if "IamInstanceProfile" not in node:
        yield f"{where}.IamInstanceProfile: missing: the machine could not read the bucket without keys"


@cache
def _run_instances() -> Any:
    return botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape


def is_spot(node: Mapping[str, Any], *, provider: str) -> bool:
    if provider == "aws":
        return bool((node.get("InstanceMarketOptions") or {}).get("MarketType") == "spot")
    scheduling = node.get("scheduling") or {}
    return isinstance(scheduling, Mapping) and (scheduling.get("provisioningModel") == "SPOT" or bool(scheduling.get("preemptible")))


def num_gpus(node: Mapping[str, Any], *, provider: str) -> int | None:
    """Whether the machine has GPUs, as a number that is right about zero; None where its type does not tell."""
    if provider == "aws" and "InstanceType" in node:
        return int(_AWS_GPU.match(node["InstanceType"]) is not None)
    if provider == "gcp" and "machineType" in node:
        attached = sum(entry.get("acceleratorCount", 0) for entry in node.get("guestAccelerators") or [])
        return attached or int(_GCP_GPU.match(node["machineType"]) is not None)
    return None
