"""What the documents tell the reader to type exists: scripts, flags, make targets, links."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from itertools import dropwhile, groupby
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted(
    {ROOT / "README.md", *ROOT.glob("*.md"), *(path for folder in ("cluster", "perf", "docs") for path in ROOT.glob(f"{folder}/**/*.md"))}
)
FENCE = re.compile(r"^[ ]*```(?:bash|sh|shell|console)[^\n]*\n(.*?)^[ ]*```", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)#\s]+)")
OWN_FOLDERS = ("soul", "pipelines", "perf", "cluster", "tests", "docs")
# the scripts that share soul.cli's parsers; the rest are asked for their own --help
CLI_SCRIPTS = {"pipelines/tofu.py": "tofu", "pipelines/unlearn.py": "unlearn"}
PYTHONS = ("python", "python3", ".venv/bin/python", "torchrun", ".venv/bin/torchrun")


def commands(text: str) -> list[list[str]]:
    """The shell commands of `text`'s fenced blocks, each as its words: prompts, comments and environment settings removed, lines joined."""
    found = []
    for block in FENCE.findall(text):
        pending = ""
        for line in block.replace("\\\n", " ").splitlines():
            pending += re.sub(r"^\s*\$ ", "", line) + "\n"
            try:
                tokens = list(shell_tokens(pending))
            except ValueError:  # a quotation goes on in the next line
                continue
            pending = ""
            for separator, words in groupby(tokens, lambda token: set(token) <= set("&|;")):
                command = list(dropwhile(lambda word: re.fullmatch(r"[A-Z_]+=.*", word), words))
                found += [command] if command and not separator else []
        assert not pending.strip(), f"a quotation is never closed: {pending}"
    return found


def shell_tokens(line: str) -> Iterator[str]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;")
    lexer.whitespace_split = True
    return lexer


@cache
def make_targets() -> frozenset[str]:
    return frozenset(re.findall(r"^([a-z][a-z-]*):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))


@cache
def cli_flags(command: str) -> frozenset[str]:
    from soul.cli import build_parser

    return frozenset(flag for action in build_parser(command)._actions for flag in action.option_strings)


@cache
def script_flags(script: str) -> frozenset[str]:
    done = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"{script} --help fails: {done.stderr[-500:]}"
    return frozenset(re.findall(r"(?<![\w-])--?[a-z][a-z0-9-]*", done.stdout))


def unknown_flags(words: list[str], known: frozenset[str]) -> list[str]:
    flags = [word.split("=")[0] for word in words if re.match(r"--?[a-zA-Z]", word)]
    return [flag for flag in flags if flag not in known]


def complaints(words: list[str]) -> list[str]:
    """What is wrong with one command, as far as it concerns this project."""
    line = shlex.join(words)
    if "--" in words:  # ray job submit ... -- python ...
        cut = words.index("--")
        return complaints(words[:cut]) + complaints(words[cut + 1 :])
    paths = [word for word in words[1:] if word.split("/")[0] in OWN_FOLDERS and "/" in word and "*" not in word]
    found = [f"{line}: no {path} in this project" for path in paths if not (ROOT / path).exists()]
    if found:
        return found
    script = next((path for path in paths if path.endswith(".py")), None)
    program = Path(words[0]).name
    if program == "make":
        targets = [word for word in words[1:] if "=" not in word and not word.startswith("-")]
        found = [f"{line}: no such target" for target in targets if target not in make_targets()]
    elif program == "soul" and len(words) > 1 and not words[1].startswith("-"):
        found = [f"{line}: soul has no {flag}" for flag in unknown_flags(words[2:], cli_flags(words[1]))]
    elif words[0] in PYTHONS and script is not None:
        known = cli_flags(CLI_SCRIPTS[script]) if script in CLI_SCRIPTS else script_flags(script)
        found = [f"{line}: {script} has no {flag}" for flag in unknown_flags(words[words.index(script) + 1 :], known)]
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_it_says_to_type_exists(document: Path) -> None:
    if not document.exists():
        pytest.skip(f"{document.name} is not written yet")
    text = document.read_text()
    spans = [shlex.split(span) for span in SPAN.findall(FENCE.sub("", text)) if re.match(r"make [a-z]", span)]
    found = [complaint for words in [*commands(text), *spans] for complaint in complaints(words)]
    found += [f"link to {target}, which does not exist" for target in LINK.findall(text) if not (document.parent / target).exists()]
    assert not found, "\n".join(found)


EXAMPLE = """
```bash
$ make check && make tset   # run it all; make it so
RAY_ADDRESS=auto ray job submit --working-dir . -- python pipelines/none.py --seed 1
.venv/bin/python tests/project/test_readme.py \\
    --no-such-flag
curl http://127.0.0.1:8000/v1/models -d '{"a": 1,
  "b": ";"}' | head
```
"""


def test_commands_are_read_as_a_shell_reads_them() -> None:
    assert commands(EXAMPLE) == [
        ["make", "check"],
        ["make", "tset"],
        ["ray", "job", "submit", "--working-dir", ".", "--", "python", "pipelines/none.py", "--seed", "1"],
        [".venv/bin/python", "tests/project/test_readme.py", "--no-such-flag"],
        ["curl", "http://127.0.0.1:8000/v1/models", "-d", '{"a": 1,\n  "b": ";"}'],
        ["head"],
    ]


def test_each_breach_is_seen() -> None:
    assert [len(complaints(words)) for words in commands(EXAMPLE)] == [0, 1, 1, 1, 0, 0]
