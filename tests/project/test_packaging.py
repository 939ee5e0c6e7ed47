"""pyproject.toml, constraints.txt and the changelog agree with each other."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINNED_EXTRAS = ("dev", "peft")  # the others are not part of what the tests run with
PIN = re.compile(r"(?P<name>[A-Za-z0-9._-]+)==(?P<version>[0-9][0-9a-z.]*)")


def pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    matches = [PIN.fullmatch(line) for line in lines]
    bad = [line for line, match in zip(lines, matches, strict=True) if match is None]
    assert not bad, f"want NAME==VERSION without build tag, address or marker: {bad}"
    return {canonicalize_name(match["name"]): match["version"] for match in matches if match}


def requirements() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"]
    return [Requirement(text) for text in [*PROJECT["dependencies"], *(text for extra in PINNED_EXTRAS for text in extras[extra])]]


@pytest.mark.parametrize("requirement", requirements(), ids=lambda requirement: requirement.name)
def test_every_dependency_is_pinned_within_its_range(requirement: Requirement) -> None:
    version = pins()[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(version), f"constraints.txt: {version}, pyproject.toml: {requirement}"


def test_no_dependency_is_listed_twice_or_taken_from_an_address() -> None:
    names = [canonicalize_name(requirement.name) for requirement in requirements()]
    assert len(set(names)) == len(names)
    assert not [str(requirement) for requirement in requirements() if requirement.url]


def test_the_changelog_covers_the_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    titles = re.findall(r"^## \[(.+?)\]", text, re.MULTILINE)
    assert titles[0] == "Unreleased"
    released = [Version(title) for title in titles[1:]]
    assert released == sorted(released, reverse=True)
    assert not released or released[0] == Version(PROJECT["version"])
