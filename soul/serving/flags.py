"""The flags of `soul serve`, and the settings that they make together with a config file."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from soul.records import InputError
from soul.serving.keys import VARIABLE, read_key_hashes
from soul.serving.settings import model_id_of
from soul.store import is_uri


def add_serve_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("runs", metavar="RUN", nargs="*", help="run directories, or NAME=DIR to choose the model id [default id: the folder's name]")
    add("--config", metavar="FILE", help="YAML file of settings; its runs, aliases and policy are read again when it changes")
    add("--host", help="address to listen on; other than loopback needs API keys [default: 127.0.0.1]")
    add("--port", type=int, help="port to listen on [default: 8000]")
    add("--alias", metavar="NAME=ID", action="append", default=[], help="a second name for a model, such as production=x; repeatable")
    add(
        "--policy",
        metavar="FILE",
        help="YAML file of the gate's policy: min_utility, margin, forget_metrics, ceilings, references, require_passed",
    )
    add("--allow-unevaluated", action="store_true", help="host models that the gate refuses all the same, marked as unevaluated")
    add("--api-key-file", metavar="FILE", help=f"API keys, one a line [default: those in {VARIABLE}, if it is set]")
    add("--replicas", type=int, metavar="N", help="replicas that hold models [default: 1]")
    add("--max-models", type=int, metavar="N", help="models that a replica holds; the least recently used one makes room [default: 4]")
    add("--device", choices=["auto", "gpu", "cpu"], help="what replicas compute on [default: auto, a GPU where the cluster can have some]")
    add("--gpus-per-replica", type=float, metavar="N", help="GPUs of a replica [default: 1 on GPUs]")
    add(
        "--engine",
        choices=["auto", "transformers", "vllm"],
        help="what runs the models; auto: vLLM on a GPU where it is installed, else transformers [default: auto]",
    )
    add("--build", metavar="FILE", help="write a config file for `serve deploy` on a cluster, and serve nothing")
    add("--address", metavar="ADDRESS", help="Ray cluster to join [default: RAY_ADDRESS, else a local Ray]")
    add("--verbose", action="store_true", help="log more, and show tracebacks of bad input")


def serve_overrides(parsed: argparse.Namespace, policy: dict[str, Any] | None) -> dict[str, Any]:
    """What the flags say, nested as in `ServeConfig`.

    Raises:
        InputError: a run or an alias is not NAME=VALUE where it must be, or the keys cannot be used.
    """
    hosting: dict[str, Any] = {}
    if parsed.runs:
        hosting["runs"] = _named_runs(parsed.runs)
    if parsed.alias:
        hosting["aliases"] = dict(_pair(text, "--alias") for text in parsed.alias)
    if policy is not None:
        hosting["policy"] = policy
    if parsed.allow_unevaluated:
        hosting["allow_unevaluated"] = True
    replicas = {"max_models": parsed.max_models, "num_gpus": parsed.gpus_per_replica, "engine": parsed.engine, "device": parsed.device}
    replicas |= {"minimum": parsed.replicas, "maximum": parsed.replicas}
    if parsed.config is not None and hosting:
        raise InputError(
            f"{', '.join(hosting)} given beside --config. What is hosted stands in that file, under hosting, so that it can change "
            "while the server runs: write it there."
        )
    given: dict[str, Any] = {"hosting": hosting, "replicas": {name: value for name, value in replicas.items() if value is not None}}
    given |= {name: value for name in ("host", "port") if (value := getattr(parsed, name)) is not None}
    hashes = read_key_hashes(os.environ, parsed.api_key_file)
    if hashes:
        given["key_hashes"] = hashes
    if parsed.config is not None:
        given["watch"] = str(Path(parsed.config).resolve())
    return given


def _named_runs(words: Sequence[str]) -> dict[str, str]:
    runs: dict[str, str] = {}
    for word in words:
        name, separator, folder = word.partition("=")
        if not separator:
            name, folder = model_id_of(Path(word)), word
        if name in runs:
            raise InputError(f"two runs would be called {name}. Name them apart: NAME={folder}.")
        runs[name] = folder if is_uri(folder) else str(Path(folder).expanduser().resolve())
    return runs


def _pair(text: str, flag: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not (name and separator and value):
        raise InputError(f"{flag} {text}: expected NAME=ID, such as production=x.")
    return name, value
