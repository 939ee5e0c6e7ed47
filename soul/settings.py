"""Settings from a YAML file and from flags, made into a config; whatever is wrong with them is told in one line per problem.

Values of settings are shown, they are the user's own words; data is never read here. A file that was passed by mistake stays private:
neither a YAML parser's excerpt nor a key that does not look like a name is quoted.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from soul.config import SHORT_FORM, Config, expand_short_forms
from soul.records import InputError

Settings = TypeVar("Settings", bound=BaseModel)
KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_.\-]{0,39}")
SHOWN_VALUE = 60


def load_config(
    path: str | Path | None,
    overrides: Mapping[str, Any],
    *,
    labels: Mapping[str, str] | None = None,
    preset: Mapping[str, Any] | None = None,
) -> Config:
    """A run's config: the file's settings over `preset`, `overrides` over both. See `load_settings`."""
    return load_settings(Config, path, overrides, labels=labels, preset=preset)


def load_settings(
    root: type[Settings],
    path: str | Path | None,
    overrides: Mapping[str, Any],
    *,
    labels: Mapping[str, str] | None = None,
    preset: Mapping[str, Any] | None = None,
) -> Settings:
    """Validate nested settings. `labels` maps a dotted key to how messages call it, for example optimizer.rho to --rho.

    Raises:
        InputError: the file cannot be read, or a setting is unknown or out of range; one line per problem.
    """
    values, places = ({}, {}) if path is None else read_yaml(path)
    given = merge(expand_short_forms(values, defaults=False), expand_short_forms(dict(overrides), defaults=False))
    named = {**places, **(labels or {})}
    try:
        return root.model_validate(merge(_applicable(preset or {}, given), given))
    except ValidationError as error:
        raise InputError("\n".join(problems(error, root, labels=named))) from None


def merge(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """Nested: what `high` names wins, the rest of `low` stays."""
    merged = dict(low)
    for key, value in high.items():
        under = merged.get(key)
        merged[key] = merge(under, value) if isinstance(under, Mapping) and isinstance(value, Mapping) else value
    return merged


def _applicable(preset: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The preset without the settings of a method or an optimizer that is not the one chosen, and without a twin that is.

    Method influence takes one step after one pass: no twin, no epochs.
    """
    kept = dict(preset)
    method = given.get("method")
    if isinstance(method, Mapping) and method.get("name") == "influence":
        kept |= {"train": {key: value for key, value in kept.get("train", {}).items() if key != "epochs"}}
        kept.pop("twin", None)
    for section in ("method", "optimizer"):
        chosen, own = given.get(section), kept.get(section)
        if isinstance(chosen, Mapping) and isinstance(own, Mapping) and chosen.get("name", own.get("name")) != own.get("name"):
            del kept[section]
    optimizer = given.get("optimizer")
    if "twin" in given or (isinstance(optimizer, Mapping) and optimizer.get("name") == kept.get("twin")):
        for key in ("twin", "twin_learning_rate"):
            kept.pop(key, None)
    return kept


def read_yaml(path: str | Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The mapping in a YAML file, and for each dotted key where it stands.

    Raises:
        InputError: no such file, not YAML, not a mapping, or a key given twice.
    """
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise InputError(f"--config {path} cannot be read ({reason}). Expected a YAML file of settings.") from None
    try:
        node, values = yaml.compose(text, Loader=yaml.SafeLoader), yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InputError(
            f"{path}{line}: not valid YAML ({type(error).__name__}). Expected lines such as `method: {{name: npo}}`."
        ) from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML ({type(error).__name__}). Expected lines such as `method: {{name: npo}}`.") from None
    except ValueError:  # a date that does not exist, for example
        raise InputError(f"{path}: not valid YAML (a value cannot be read). Put texts in quotes.") from None
    if values is None:
        return {}, {}
    if not isinstance(values, dict):
        raise InputError(f"{path} holds a {type(values).__name__}. Expected a mapping of settings, such as `method: {{name: npo}}`.")
    places: dict[str, str] = {}
    for key, line_number in _key_lines(node, ()):
        if key in places:
            raise InputError(f"{path}, line {line_number}: {_shown_key(key)} is given twice. Give it once.")
        places[key] = f"{path}, line {line_number}: {_shown_key(key)}"
    for section, field in SHORT_FORM.items():
        if section in places and isinstance(values[section], str):
            places[f"{section}.{field}"] = places[section]
    return values, places


def _key_lines(node: yaml.Node | None, above: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        keys = (*above, str(key.value))
        yield ".".join(keys), key.start_mark.line + 1
        yield from _key_lines(value, keys)


def problems(error: ValidationError, root: type[BaseModel], *, labels: Mapping[str, str] | None = None) -> list[str]:
    """One line per wrong setting: where, what was expected, what was got, and the nearest name."""
    named = labels or {}
    lines: dict[str, tuple[ErrorDetails, list[str]]] = {}
    for detail in error.errors(include_url=False):
        key, holder = locate(root, detail["loc"])
        if detail["type"] == "extra_forbidden":
            lines[key] = (detail, [_unknown_key(key, holder, root, named)])
            continue
        lines.setdefault(key, (detail, []))[1].append(_expected(detail, is_section=_is_section(root, key)))
    return [_line(key, detail, texts, named) for key, (detail, texts) in lines.items()]


def _line(key: str, detail: ErrorDetails, texts: Sequence[str], labels: Mapping[str, str]) -> str:
    """`texts` are the alternatives of a setting that takes more than one kind of value."""
    label = labels.get(key, _shown_key(key))
    if detail["type"] in ("extra_forbidden", "value_error"):
        return texts[0].replace("{label}", label)
    if detail["type"] == "missing":
        return f"{label}: expected a value, got none."
    if detail["type"] == "union_tag_invalid":
        label, got = labels.get(f"{key}.name", key), str(detail.get("ctx", {}).get("tag"))
    else:
        got = detail["input"] if isinstance(detail["input"], str) else repr(detail["input"])
    choices = [choice for text in texts for choice in re.findall(r"'([^']+)'", text)]
    return f"{label}: expected {' or '.join(dict.fromkeys(texts))}, got {got[:SHOWN_VALUE]}.{did_you_mean(got, choices)}"


def _expected(detail: ErrorDetails, *, is_section: bool) -> str:
    """What pydantic expected, in as few words."""
    if detail["type"] == "value_error":
        message = detail["msg"].removeprefix("Value error, ")
        return message if is_section or message.startswith("--") else f"{{label}}: {message}"
    if detail["type"] == "union_tag_invalid":
        return f"one of {detail.get('ctx', {}).get('expected_tags')}"
    if detail["type"] in ("model_type", "model_attributes_type"):
        return "a mapping of settings"
    text = detail["msg"].removeprefix("Input should be ").removeprefix("Input should ").split(", unable to")[0]
    return text[:1].lower() + text[1:]


def locate(root: type[BaseModel], loc: Sequence[int | str]) -> tuple[str, type[BaseModel] | None]:
    """The dotted key behind pydantic's location, which also holds union tags, and the section that its last part belongs to."""
    keys: list[str] = []
    holder: type[BaseModel] | None = root
    tags: dict[str, type[BaseModel]] = {}
    for part in loc:
        if part in tags:
            holder, tags = tags[str(part)], {}
            continue
        if holder is None or isinstance(part, int):
            break
        keys.append(part)
        if part not in holder.model_fields:
            break
        inner = sections_in(holder.model_fields[part].annotation)
        if not inner:
            break
        tags = {str(section.model_fields["name"].default): section for section in inner} if len(inner) > 1 else {}
        holder = inner[0]
    return ".".join(keys), holder


def sections_in(annotation: Any) -> list[type[BaseModel]]:
    """The config sections that a field's type names: none for a plain value, several for a choice such as the method."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for argument in get_args(annotation) for section in sections_in(argument)]


def leaves(root: type[BaseModel], above: str = "") -> dict[str, list[type[BaseModel]]]:
    """Every dotted key that holds a value, and the sections that have it: several for the choices of a method or an optimizer."""
    found: dict[str, list[type[BaseModel]]] = {}
    for name, info in root.model_fields.items():
        inner = sections_in(info.annotation)
        if not inner:
            found.setdefault(f"{above}{name}", []).append(root)
        for section in inner:
            for key, owners in leaves(section, f"{above}{name}.").items():
                found.setdefault(key, []).extend(owners)
    return found


def _is_section(root: type[BaseModel], key: str) -> bool:
    return key not in leaves(root)


def _unknown_key(key: str, holder: type[BaseModel] | None, root: type[BaseModel], labels: Mapping[str, str]) -> str:
    """A key of another choice (rho with adamw) says whose it is; any other gets the nearest name."""
    assert holder is not None  # an unknown key is unknown to some section
    owners = leaves(root).get(key, [])
    section = key.split(".")[0]
    if owners and "name" in holder.model_fields:
        names = ", ".join(str(owner.model_fields["name"].default) for owner in owners)
        chosen = labels.get(f"{section}.name", section)
        word = chosen if chosen.startswith("--") else section
        return f"{{label}} belongs to {names}, got {word} {holder.model_fields['name'].default}."
    above, _, last = key.rpartition(".")
    same = [name for name in leaves(root) if name.split(".")[-1] == last]
    if same:
        return f"{{label}}: unknown setting here. Did you mean {' or '.join(same)}?"
    near = difflib.get_close_matches(last, holder.model_fields, n=1)
    if near:
        return f"{{label}}: unknown setting. Did you mean {f'{above}.{near[0]}'.lstrip('.')}?"
    elsewhere = [name for name in leaves(root) if difflib.get_close_matches(last, [name.split(".")[-1]], cutoff=0.8)]
    if elsewhere:
        return f"{{label}}: unknown setting. Did you mean {elsewhere[0]}?"
    return f"{{label}}: unknown setting. Expected one of {', '.join(holder.model_fields)}."


def did_you_mean(word: str, choices: Sequence[str]) -> str:
    """A sentence with the nearest choice, empty where none is near."""
    near = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f" Did you mean {near[0]}?" if near else ""


def _shown_key(key: str) -> str:
    return ".".join(part if KEY.fullmatch(part) else "(a key that looks like text)" for part in key.split(".")) if key else "settings"
