"""Print cluster/runtime_env.yaml with environment variables of this shell added by name, for `ray job submit --runtime-env <(...)`.

Ray puts no variable of the submitting shell into a runtime environment, and a command line shows in `ps`; a pipe does not.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

BASE = Path(__file__).with_name("runtime_env.yaml")


def with_variables(base: Mapping[str, Any], names: Sequence[str], environment: Mapping[str, str]) -> dict[str, Any]:
    """The runtime environment `base` and the values of `names`.

    Raises:
        ValueError: a name is not set.
    """
    missing = [name for name in names if not environment.get(name)]
    if missing:
        raise ValueError(f"not set in this shell: {', '.join(missing)}. Export them, or leave out those the cluster sets itself.")
    # Ray looks up $NAME in a value on the cluster and has no way to quote it
    unclear = [name for name in names if "$" in environment[name]]
    if unclear:
        raise ValueError(
            f"{', '.join(unclear)}: the value has a '$', which Ray would expand on the cluster. Set it on the cluster instead."
        )
    values = {name: environment[name] for name in names}
    return {**base, "env_vars": {**base.get("env_vars", {}), **values}}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="cluster/runtime_env.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="variables to pass, e.g. AWS_ENDPOINT_URL HF_TOKEN WANDB_API_KEY")
    names = parser.parse_args(arguments).names
    if names and sys.stdout.isatty():
        print("values would show on this terminal: use --runtime-env <(python cluster/runtime_env.py NAME ...)", file=sys.stderr)
        return 2
    try:
        document = with_variables(yaml.safe_load(BASE.read_text(encoding="utf-8")), names, os.environ)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    yaml.safe_dump(document, sys.stdout, sort_keys=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
