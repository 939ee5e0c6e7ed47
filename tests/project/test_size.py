"""The rules about form that no linter has: sizes, words that announce unfinished work, paths of one machine, files that do not compile."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("soul", "pipelines", "perf", "cluster", "tests")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
# spelt with dashes, or this file would hold them
UNFINISHED = re.compile(r"\b(" + "TO-DO|FIX-ME|X-XX|Not-ImplementedError|place-holder".replace("-", "") + r")\b")
# an image's own home is the same on every machine
MACHINE_PATH = re.compile(r"(?<![\w.:])/(?:home|root|work|mnt)/(?!ray\b)\w+")


def files(*endings: str) -> list[Path]:
    inside = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if "__pycache__" not in path.parts]
    return sorted(path for path in [*inside, *ROOT.glob("*"), ROOT / ".ci" / "run"] if path.is_file() and path.name.endswith(endings))


def long_functions(source: str) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines >= MAX_FUNCTION_LINES:
                yield node.name, lines


def lines_with(pattern: re.Pattern[str], paths: list[Path]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{number}: {match[0]}"
        for path in paths
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if (match := pattern.search(line))
    ]


def test_files_are_short() -> None:
    sizes = {path.relative_to(ROOT): len(path.read_text().splitlines()) for path in files(".py")}
    assert len(sizes) > 10
    assert not {str(path): lines for path, lines in sizes.items() if lines >= MAX_FILE_LINES}


def test_functions_are_short() -> None:
    paths = [path for path in files(".py") if path.relative_to(ROOT).parts[0] != "tests"]
    assert not [f"{path.relative_to(ROOT)}: {name} ({lines} lines)" for path in paths for name, lines in long_functions(path.read_text())]


def test_nothing_announces_unfinished_work() -> None:
    found = lines_with(UNFINISHED, files(".py", ".md", ".yaml", ".yml", ".toml", ".j2", "Makefile", "Dockerfile", "run"))
    assert not found, "\n".join(found)


def test_no_path_of_one_machine() -> None:
    found = lines_with(MACHINE_PATH, files(".py", ".md", ".yaml", ".yml", ".toml", ".txt", ".j2", "Makefile", "Dockerfile", "run"))
    assert not found, "\n".join(found)


def test_every_file_compiles_without_a_warning() -> None:
    for path in files(".py"):
        with warnings.catch_warnings(action="error"):  # SyntaxWarning: bad escapes, `is` with a literal
            compile(path.read_text(), str(path), "exec")


def test_breaches_are_seen(tmp_path: Path) -> None:
    long = "async def f():\n" + "    pass\n" * (MAX_FUNCTION_LINES - 1)
    assert list(long_functions(long)) == [("f", MAX_FUNCTION_LINES)]
    assert not list(long_functions(long.replace("    pass\n", "", 1)))
    word, path = "FIX" + "ME", "/ro" + "ot/data"
    assert UNFINISHED.search(f"# {word}: later")
    assert not UNFINISHED.search(f"{word}S")
    assert MACHINE_PATH.search(f"open('{path}')")
    assert not MACHINE_PATH.search("/ho" + "me/ray/anaconda3")
    assert not MACHINE_PATH.search("s3://bucket" + path)
