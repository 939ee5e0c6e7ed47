"""CloudFormation templates, with AWS's own linter."""

from __future__ import annotations

from collections.abc import Iterator

from cfnlint import lint


def stack_complaints(text: str) -> Iterator[str]:
    for match in lint(text):
        path = ".".join(map(str, match.path)) or f"line {match.linenumber}"
        yield f"{path}: {match.message} ({match.rule.id})"
