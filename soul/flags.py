"""Command-line flags, generated from the config sections: one flag per setting, with the setting's own description and default.

Flags carry text; the config validates it, so that ranges and choices fail with the same words as in YAML and Python.
"""

from __future__ import annotations

import argparse
import re
import types
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from soul.benchmarks.presets import PRESETS
from soul.config import Config, EvaluateConfig
from soul.grid_config import GridConfig
from soul.settings import leaves, load_settings, read_yaml

ROOTS: dict[str, type[BaseModel]] = {"tofu": Config, "unlearn": Config, "evaluate": EvaluateConfig, "grid": GridConfig}

# Settings that a command has no use for: it decides them itself, or they belong to the other kind of data.
LEFT_OUT: dict[str, tuple[str, ...]] = {
    "tofu": ("benchmark", "data.holdout", "data.columns", "model.tiny.name"),
    "unlearn": ("benchmark", "data.source", "data.num_authors", "data.seed", "data.revision", "model.tiny"),
    "evaluate": ("model.path", "model.finetune", "model.tiny", "model.export_dtype"),
    "grid": ("data.holdout", "data.columns"),
}
# A flag is the last word of its setting, unless that word would be ambiguous or clumsy.
NAMES = {
    "data.source": "data",
    "data.seed": "data-seed",
    "data.revision": "data-revision",
    "model.path": "model",
    "method.name": "method",
    "optimizer.name": "optimizer",
    "engine.name": "engine",
}
PREFIXES = {"prepare": "prepare-", "model.tiny": "tiny-", "evaluate": "eval-"}
TITLES = {
    "": "run",
    "data": "data",
    "model": "model",
    "model.tiny": "tiny model (trained from scratch when there is no --model)",
    "prepare": "preparation (training of target and retrained model, where they are not given)",
    "method": "method",
    "optimizer": "optimizer",
    "train": "unlearning",
    "engine": "engine",
    "evaluate": "evaluation",
}
NONE_WORDS = ("none", "null")
MEANING_OF_NULL = re.compile(r" \(null: (.*)\)$")


@dataclass(frozen=True, slots=True)
class Flag:
    """One setting as a flag. `owners` are the choices of a method or optimizer that have it, empty where all do."""

    key: str
    name: str
    description: str
    default: str
    owners: tuple[str, ...]
    metavar: str
    is_switch: bool
    is_optional: bool
    is_list: bool

    @property
    def section(self) -> str:
        return self.key.rpartition(".")[0]

    @property
    def help(self) -> str:
        """The description with owners and default; argparse reads % as a format."""
        only = f" ({', '.join(self.owners)} only)" if self.owners else ""
        return f"{self.description}{only} [default: {self.default}]".replace("%", "%%")


def flags_of(command: str) -> list[Flag]:
    """The flags of a command, in the order of its config."""
    root = ROOTS[command]
    left_out = LEFT_OUT[command]
    defaults = root.model_fields
    found = []
    for key, owners in _settings(root).items():
        if any(key == item or key.startswith(f"{item}.") for item in left_out):
            continue
        section = key.split(".")[0]
        default = defaults[section].default if section in defaults else PydanticUndefined
        found.append(_flag(key, owners, num_choices=len(_choices(root, section)), default_section=default))
    sections = list(dict.fromkeys(flag.section for flag in found))
    return sorted(found, key=lambda flag: (sections.index(flag.section), flag.key not in NAMES))


def _settings(root: type[BaseModel]) -> dict[str, list[type[BaseModel]]]:
    """`leaves`, with the column map as the one setting it is on a command line."""
    found: dict[str, list[type[BaseModel]]] = {}
    for key, owners in leaves(root).items():
        if key.startswith("data.columns."):
            found["data.columns"] = [type(root.model_fields["data"].default)]
        else:
            found[key] = owners
    return found


def _choices(root: type[BaseModel], section: str) -> Sequence[type[BaseModel]]:
    """The alternatives of a section, such as the methods; one or none for the others."""
    return leaves(root).get(f"{section}.name", []) if section in ("method", "optimizer") else []


def _flag(key: str, owners: list[type[BaseModel]], *, num_choices: int, default_section: Any) -> Flag:
    section, _, last = key.rpartition(".")
    infos = [owner.model_fields[last] for owner in owners]
    names = [str(owner.model_fields["name"].default) for owner in owners] if num_choices > 1 else []
    is_choice = bool(names) and last == "name"
    annotation = infos[0].annotation
    texts = [" ".join((owner.__doc__ or "").split()).split(". ")[0] for owner in owners] if is_choice else [_text(info) for info in infos]
    defaults = [str(default_section.name)] if is_choice else [_default(info) for info in infos]
    return Flag(
        key=key,
        name=f"--{NAMES.get(key) or PREFIXES.get(section, '') + last.replace('_', '-')}",
        description=_by_name(names, [text.rstrip(".") for text in texts]),
        default=_by_name(names, defaults),
        owners=tuple(names) if len(names) < num_choices else (),
        metavar="{" + ",".join(names) + "}" if is_choice else _metavar(annotation),
        is_switch=annotation is bool,
        is_optional=type(None) in get_args(annotation),
        is_list=_is_list(annotation),
    )


def _by_name(names: Sequence[str], texts: Sequence[str]) -> str:
    """One text where all say the same, else each behind the names it is true of."""
    if len(set(texts)) == 1:
        return texts[0]
    holders = {text: [name for name, own in zip(names, texts, strict=True) if own == text] for text in texts}
    return "; ".join(f"{', '.join(holders[text])}: {text}" for text in holders)


def _text(info: FieldInfo) -> str:
    return MEANING_OF_NULL.sub("", info.description or "")


def _default(info: FieldInfo) -> str:
    """In the words of the command line; for null what it stands for, if the description says so."""
    value = info.default
    meaning = MEANING_OF_NULL.search(info.description or "")
    if value is None or isinstance(value, BaseModel):
        return meaning[1] if meaning else "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _members(annotation: Any) -> list[Any]:
    """The types that a setting can have, null left out."""
    members = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    return [_bare(member) for member in members if member is not type(None)]


def _bare(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _is_list(annotation: Any) -> bool:
    return any(get_origin(member) in (tuple, list) for member in _members(annotation))


def _metavar(annotation: Any) -> str:
    """What a value looks like: {a,b}, N for a whole number, X for any number, TEXT."""
    if _is_list(annotation):
        return "A,B"
    shown = []
    for member in _members(annotation):
        if get_origin(member) is Literal:
            shown.append(",".join(map(str, get_args(member))))
        else:
            shown.append({int: "N", float: "X"}.get(member, "TEXT"))
    return shown[0] if len(shown) == 1 and shown[0] in ("N", "X", "TEXT") else "{" + ",".join(shown) + "}"


def add_flags(parser: argparse.ArgumentParser, flags: Iterable[Flag]) -> None:
    """One group of flags per section."""
    groups: dict[str, argparse._ArgumentGroup] = {}
    for flag in flags:
        if flag.section not in groups:
            groups[flag.section] = parser.add_argument_group(TITLES[flag.section])
        group = groups[flag.section]
        if flag.is_switch:
            group.add_argument(flag.name, dest=flag.key, action=argparse.BooleanOptionalAction, default=None, help=flag.help)
        else:
            group.add_argument(flag.name, dest=flag.key, default=None, metavar=flag.metavar, help=flag.help)


def given_settings(parsed: argparse.Namespace, flags: Iterable[Flag]) -> tuple[dict[str, Any], dict[str, str]]:
    """The flags that were given as nested settings, and the flag behind each dotted key for messages."""
    nested: dict[str, Any] = {}
    labels: dict[str, str] = {}
    for flag in flags:
        value = getattr(parsed, flag.key)
        if value is None:
            continue
        labels[flag.key] = flag.name
        place = nested
        *sections, last = flag.key.split(".")
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = _value(flag, value)
    return nested, labels


def _value(flag: Flag, value: Any) -> Any:
    if isinstance(value, bool):
        return value
    if flag.is_optional and value.lower() in NONE_WORDS:
        return None
    return [part.strip() for part in value.split(",")] if flag.is_list else value


def grid_config_of(parsed: argparse.Namespace) -> GridConfig:
    """The config that the flags of `grid` describe, with what its preset brings along.

    Raises:
        InputError: a setting is unknown, out of range or means nothing here; one line per problem.
    """
    overrides, labels = given_settings(parsed, flags_of("grid"))
    chosen = overrides.get("preset") or (read_yaml(parsed.config)[0].get("preset") if parsed.config else None)
    return load_settings(GridConfig, parsed.config, overrides, labels=labels, preset=PRESETS.get(str(chosen), {}))
