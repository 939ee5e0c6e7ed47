"""`ray up`'s way through AWS, with a fake AWS on loopback: aws-stack.yaml is deployed, aws.yaml bootstrapped, machines come and go."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from botocore.exceptions import ParamValidationError
from moto.server import ThreadedMotoServer
from ray.autoscaler._private.aws.config import bootstrap_aws
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.aws.utils import client_cache, resource_cache
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.tags import TAG_RAY_CLUSTER_NAME, TAG_RAY_NODE_KIND, TAG_RAY_USER_NODE_TYPE

CLUSTER = Path(__file__).resolve().parents[2] / "cluster"
REGION = "us-west-2"
REAL_IMAGE = "/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-22.04/latest/ami-id"
FAKE_IMAGE = "/soul/host-image"  # the fake looks every default up, and knows none of AWS's deep learning images

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def aws(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pytest.MonkeyPatch]:
    """A fake AWS that boto3 cannot miss, and a home for the key that Ray makes."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "fake",
            "AWS_SECRET_ACCESS_KEY": "fake",
            "AWS_DEFAULT_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
            "HOME": str(tmp_path_factory.mktemp("home")),
        }.items():
            patch.setenv(name, value)
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
            patch.delenv(name, raising=False)
        _forget_clients()
        yield patch
    _forget_clients()
    server.stop()


def _forget_clients() -> None:
    """Ray keeps its clients, and with them the address they were made for."""
    resource_cache.cache_clear()
    client_cache.cache_clear()
    boto3.DEFAULT_SESSION = None


def deploy() -> None:
    template = (CLUSTER / "aws-stack.yaml").read_text(encoding="utf-8")
    assert template.count(REAL_IMAGE) == 1
    image = boto3.client("ec2").describe_images(Owners=["amazon"])["Images"][0]["ImageId"]
    boto3.client("ssm").put_parameter(Name=FAKE_IMAGE, Value=image, Type="String")
    given = {"Bucket": "soul-runs", "SshFrom": "203.0.113.7/32"}
    boto3.client("cloudformation").create_stack(
        StackName="soul-ray",
        TemplateBody=template.replace(REAL_IMAGE, FAKE_IMAGE),
        Parameters=[{"ParameterKey": name, "ParameterValue": value} for name, value in given.items()],
        Capabilities=["CAPABILITY_NAMED_IAM"],
    )


@pytest.fixture(scope="module")
def config(aws: pytest.MonkeyPatch) -> dict[str, Any]:
    deploy()
    prepared = prepare_config(yaml.safe_load((CLUSTER / "aws.yaml").read_text(encoding="utf-8")))
    validate_config(prepared)
    for kind in prepared["available_node_types"].values():
        kind["written"] = kind["resources"]
        kind["resources"] = {}  # what the machine really has
    bootstrapped: dict[str, Any] = bootstrap_aws(AWSNodeProvider.fillout_available_node_types_resources(prepared))
    return bootstrapped


def test_every_node_boots_the_stacks_image_in_its_group_with_its_role(config: dict[str, Any]) -> None:
    (group,) = boto3.client("ec2").describe_security_groups(Filters=[{"Name": "group-name", "Values": ["soul-ray-*"]}])["SecurityGroups"]
    nodes = {name: kind["node_config"] for name, kind in config["available_node_types"].items()}
    assert {tuple(node["SecurityGroupIds"]) for node in nodes.values()} == {(group["GroupId"],)}
    (image,) = {node["ImageId"] for node in nodes.values()}
    assert image.startswith("ami-")
    assert all(node["SubnetIds"] and node["KeyName"] for node in nodes.values())
    assert nodes["head"]["IamInstanceProfile"] == {"Name": "soul-ray-head"}
    assert {nodes[name]["IamInstanceProfile"]["Name"] for name in ("cpu", "gpu_spot", "gpu_on_demand")} == {"soul-ray-worker"}


@pytest.mark.parametrize("kind", ["cpu", "gpu_spot", "gpu_on_demand"])
def test_the_file_says_what_the_machine_has(config: dict[str, Any], kind: str) -> None:
    node = config["available_node_types"][kind]
    assert node["written"] == {name: count for name, count in node["resources"].items() if name in ("CPU", "GPU")}


def test_only_ssh_from_the_given_range_is_let_in(config: dict[str, Any]) -> None:
    (group,) = boto3.client("ec2").describe_security_groups(Filters=[{"Name": "group-name", "Values": ["soul-ray-*"]}])["SecurityGroups"]
    from_outside = [rule for rule in group["IpPermissions"] if rule["IpRanges"]]
    assert [(rule["FromPort"], rule["ToPort"], [r["CidrIp"] for r in rule["IpRanges"]]) for rule in from_outside] == [
        (22, 22, ["203.0.113.7/32"])
    ]
    between = [pair["GroupId"] for rule in group["IpPermissions"] for pair in rule["UserIdGroupPairs"]]
    assert between == [group["GroupId"]]


def test_spot_and_on_demand_machines_come_up_tagged_and_go(config: dict[str, Any]) -> None:
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    for kind in ("gpu_spot", "gpu_on_demand"):
        tags = {TAG_RAY_CLUSTER_NAME: "soul", TAG_RAY_NODE_KIND: "worker", TAG_RAY_USER_NODE_TYPE: kind}
        provider.create_node(copy.deepcopy(config["available_node_types"][kind]["node_config"]), tags, 1)
    found = boto3.client("ec2").describe_instances(Filters=[{"Name": "instance-state-name", "Values": ["running"]}])
    machines = {
        next(tag["Value"] for tag in machine["Tags"] if tag["Key"] == TAG_RAY_USER_NODE_TYPE): machine
        for reservation in found["Reservations"]
        for machine in reservation["Instances"]
    }
    assert {name: machine.get("InstanceLifecycle") for name, machine in machines.items()} == {"gpu_spot": "spot", "gpu_on_demand": None}
    assert {machine["InstanceType"] for machine in machines.values()} == {"g6e.12xlarge"}
    provider.terminate_nodes([machine["InstanceId"] for machine in machines.values()])
    left = boto3.client("ec2").describe_instances(Filters=[{"Name": "instance-state-name", "Values": ["running", "pending"]}])
    assert not left["Reservations"]


def test_a_key_of_the_machine_that_aws_does_not_know_fails_before_anything_starts(config: dict[str, Any]) -> None:
    broken = copy.deepcopy(config["available_node_types"]["cpu"]["node_config"])
    broken["InstanceTyp"] = broken.pop("InstanceType")
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    with pytest.raises(ParamValidationError, match="InstanceTyp"):
        provider.create_node(broken, {TAG_RAY_CLUSTER_NAME: "soul", TAG_RAY_NODE_KIND: "worker"}, 1)
