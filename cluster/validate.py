"""Check cluster files before a cloud is asked for anything: `python cluster/validate.py FILES`, by default those of this folder.

Launcher files go through Ray's own validator and AWS's description of a machine, pods through Kubernetes' schema, the rest through
strict models; then come mistakes that those let pass: open dashboards, images that move, secrets in the file, spot without a fallback.
A job's command is run as far as its last check before Ray starts, with a folder in the place of the bucket; what cannot be checked from
here (models and data on the hub, on a store or on a disk of the nodes) is named.
Needs what `make install` installs. Exit codes: 0 no complaint, 2 complaints (one line each).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone runs without installation

from cluster.checks.common import secret_complaints

FOLDER = Path(__file__).resolve().parent
RAY_KINDS = ("RayCluster", "RayJob", "RayService")


class _Loader(yaml.SafeLoader):
    """A key that stands twice is an error; CloudFormation's short forms are read as what they hold."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        doubled = sorted({str(key) for key in keys if keys.count(key) > 1})
        if doubled:
            raise yaml.constructor.ConstructorError(None, None, f"{', '.join(doubled)}: stands twice", node.start_mark)
        return super().construct_mapping(node, deep=deep)


def _short_form(loader: _Loader, suffix: str, node: yaml.Node) -> Any:
    del suffix
    if isinstance(node, yaml.ScalarNode):
        return loader.construct_scalar(node)
    return loader.construct_sequence(node, deep=True) if isinstance(node, yaml.SequenceNode) else None


_Loader.add_multi_constructor("!", _short_form)


def complaints(text: str, notes: list[str] | None = None) -> Iterator[str]:
    """About every document of a file's text; `notes` receives what could not be checked from here."""
    try:
        documents = [document for document in yaml.load_all(text, Loader=_Loader) if document is not None]
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        yield f"line {mark.line + 1 if mark else '?'}: no YAML: {getattr(error, 'problem', error)}"
        return
    if not documents:
        yield "document: empty"
    for index, document in enumerate(documents):
        prefix = f"document {index + 1}: " if len(documents) > 1 else ""
        yield from (prefix + line for line in document_complaints(document, text, notes))


def document_complaints(document: Any, text: str = "", notes: list[str] | None = None) -> list[str]:
    """What kind of file it is shows in its keys. What checks a kind is imported only for it: Ray alone takes a second."""
    if not isinstance(document, dict):
        return ["document: expected keys and values"]
    if "AWSTemplateFormatVersion" in document:
        from cluster.checks.stack import stack_complaints

        return [*stack_complaints(text), *secret_complaints(document)]
    if document.get("kind") in RAY_KINDS:
        from cluster.checks.kuberay import kuberay_complaints

        return kuberay_complaints(document, notes)
    if "apiVersion" in document or "kind" in document:
        from cluster.checks.pods import object_complaints

        return [*object_complaints(document), *secret_complaints(document)]
    if "cluster_name" in document or "available_node_types" in document:
        from cluster.checks.launcher import launcher_complaints

        return launcher_complaints(document)
    if "applications" in document:
        from cluster.checks.serving import serve_complaints

        return list(serve_complaints(document))
    if set(document) & {"excludes", "env_vars", "working_dir"}:
        from cluster.checks.job import runtime_env_complaints

        return list(runtime_env_complaints(document))
    return [f"document: no known kind of file. Its keys are {', '.join(sorted(map(str, document)))}"]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="cluster/validate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="YAML files; default: all of this folder")
    files = parser.parse_args(arguments).files or sorted(FOLDER.rglob("*.yaml"))
    failed = False
    for file in files:
        notes: list[str] = []
        try:
            found = list(complaints(file.read_text(encoding="utf-8"), notes))
        except OSError as error:
            found = [f"cannot be read ({error.strerror})"]
        failed = failed or bool(found)
        not_checked = f" (not checked: {'; '.join(notes)})" if notes else ""
        print(f"{file}: ok{not_checked}" if not found else "\n".join(f"{file}: {line}" for line in found))
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
