from __future__ import annotations

import csv
import gzip
import itertools
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from s3_stub import Bucket

from soul.data import files
from soul.data.files import list_files, read_rows, shown
from soul.records import InputError

CANARY = "zanzibarquokka"
ROWS: list[dict[str, Any]] = [
    {"question": 'Comma, "quote"\nand a line break?', "answer": "Čapek — 東京 \u2028 end"},
    {"question": "Second?", "answer": "x" * 5000},
    {"question": "Third?", "answer": "[not a list"},
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """`rows` in the format of the extension, by writers of other libraries than the reader's."""
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=1 + len(rows) // 20)
        return path
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8", newline="") as file:
        if name.endswith(".csv"):
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        elif name == "array.json":
            json.dump(rows, file, indent=1)
        else:
            file.write("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    return path


NAMES = [
    "a.jsonl",
    "a.JSONL",
    "a.ndjson",
    "a.json",
    "array.json",
    "a.csv",
    "a.parquet",
    "a.jsonl.gz",
    "a.json.gz",
    "a.csv.gz",
    "v1.2 b.jsonl",
]


@pytest.mark.parametrize("name", NAMES)
def test_every_format_gives_the_rows_that_were_written(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, ROWS)
    assert [row for _, row in read_rows(path)] == ROWS
    assert [row for _, row in read_rows(path.as_uri())] == ROWS


def test_numbers_are_lines_in_text_and_positions_elsewhere(tmp_path: Path) -> None:
    lines = tmp_path / "a.jsonl"
    lines.write_text('\n{"a": 1}\n\n  \n{"a": 2}\n')
    assert list(read_rows(lines)) == [(2, {"a": 1}), (5, {"a": 2})]
    # the first CSV row spans lines 2 and 3
    assert [number for number, _ in read_rows(write(tmp_path / "b.csv", ROWS))] == [2, 4, 5]
    assert [number for number, _ in read_rows(write(tmp_path / "array.json", ROWS))] == [1, 2, 3]
    assert [number for number, _ in read_rows(write(tmp_path / "c.parquet", ROWS))] == [1, 2, 3]


def test_byte_order_mark_and_windows_line_ends_are_no_data(tmp_path: Path) -> None:
    for name, text in (("a.jsonl", '{"a": "1"}\r\n{"a": null}\r\n'), ("b.csv", "a,b\r\n1,\r\n,2\r\n")):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert [row for _, row in read_rows(tmp_path / "a.jsonl")] == [{"a": "1"}, {"a": None}]
    assert [row for _, row in read_rows(tmp_path / "b.csv")] == [{"a": "1", "b": None}, {"a": None, "b": "2"}]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv", "a.parquet"])
def test_reading_streams(tmp_path: Path, name: str) -> None:
    """20 MB of rows pass through in a few MB: the first rows come before the last are read, and none are kept."""
    rows = [{"question": f"{i}?", "answer": f"{i}" * 500} for i in range(10_000)]
    path = write(tmp_path / name, rows)
    del rows
    tracemalloc.start()
    before_arrow = pa.total_allocated_bytes()
    peak_arrow, total = 0, 0
    for _, row in read_rows(path):
        total += len(row["answer"])
        peak_arrow = max(peak_arrow, pa.total_allocated_bytes() - before_arrow)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert total > 15_000_000
    assert peak < 8_000_000
    assert peak_arrow < 12_000_000


def test_the_rest_of_a_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\nnot json\n')
    assert list(itertools.islice(read_rows(path), 1)) == [(1, {"a": 1})]
    with pytest.raises(InputError, match="line 2"):
        list(read_rows(path))


GOOD = f'{{"question": "{CANARY}?", "answer": "{CANARY}"}}'
BROKEN: dict[str, tuple[str, bytes | str, str]] = {
    "cut object": ("a.jsonl", f'{GOOD}\n{{"question": "{CANARY}', "line 2"),
    "bare words": ("a.jsonl", f"{CANARY} {CANARY}", "line 1"),
    "two on a line": ("a.jsonl", f"{GOOD}{GOOD}", "line 1"),
    "list in lines": ("a.jsonl", f'{GOOD}\n["{CANARY}"]', "line 2 is a JSON list"),
    "text row": ("a.jsonl", f'{GOOD}\n"{CANARY}"', "line 2 is a JSON str"),
    "null row": ("a.jsonl", f"{GOOD}\nnull", "line 2 is a JSON NoneType"),
    "one object over lines": ("a.json", f'{{\n"question": "{CANARY}"\n}}', "line 1"),
    "array cut": ("a.json", f"[\n{GOOD},\n{GOOD}\n", "line 4"),
    "array with text behind": ("a.json", f"[{GOOD}]\n{CANARY}", "line 2"),
    "array of text": ("a.json", f'\n\n["{CANARY}"]', "row 1 is a JSON str"),
    "array error behind blank lines": ("a.json", f"\n\n[{GOOD},\n{CANARY}]", "line 4"),
    "deep nesting": ("a.jsonl", '{"a":' + "[" * 200_000 + f'"{CANARY}"', "line 1"),
    "deep array": ("a.json", "[" * 200_000 + f'"{CANARY}"', "not a JSON array"),
    "huge number": ("a.jsonl", f'{{"{CANARY}": {"9" * 5000}}}', "line 1"),
    "latin-1": ("a.jsonl", f'{GOOD}\n{{"question": "{CANARY} é"}}'.encode("latin-1"), "line 2 is not UTF-8"),
    "utf-16": ("a.csv", f"question,answer\n{CANARY},{CANARY}".encode("utf-16"), "line 1 is not UTF-8"),
    "open quote": ("a.csv", f'question,answer\n"{CANARY},{CANARY}\n', "line 2"),
    "text behind quote": ("a.csv", f'question,answer\na,b\n"{CANARY}"{CANARY},b\n', "line 3"),
    "cell too large": ("a.csv", f'question,answer\n"{CANARY * 20_000}",b\n', "line 2"),
    "too many cells": ("a.csv", f"question,answer\n{CANARY},{CANARY},{CANARY}\n", "line 2 has 3 cells"),
    "too few cells": ("a.csv", f"question,answer\na,b\n\n{CANARY}\n", "line 4 has 1 cells"),
    "repeated name": ("a.csv", f"{CANARY},{CANARY}\na,b\n", "repeated name"),
    "semicolons": ("a.csv", f"{CANARY};{CANARY}\na;b\n", "Save it with commas"),
    "header only": ("a.csv", f"{CANARY},b\n", "holds no rows"),
    "blank lines": ("a.jsonl", "\n\n \n", "holds no rows"),
    "empty array": ("a.json", "[]", "holds no rows"),
    "no gzip": ("a.jsonl.gz", GOOD, "damaged near line 1"),
    "cut gzip": ("a.jsonl.gz", gzip.compress(f"{GOOD}\n".encode() * 1000)[:-12], "damaged near line"),
    "no parquet": ("a.parquet", GOOD, "not a Parquet file"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_row_is_named_and_never_quoted(tmp_path: Path, case: str) -> None:
    name, content, expected = BROKEN[case]
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(InputError, match=expected) as caught:
        list(read_rows(path))
    assert name in str(caught.value)
    assert CANARY not in str(caught.value)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_the_canary_is_in_the_broken_files() -> None:
    """Positive control of the test above: without the canary in the content, its absence from the message says nothing."""
    without = [
        case
        for case, (_, content, _) in BROKEN.items()
        if CANARY.encode() not in (content.encode() if isinstance(content, str) else content)
        and case not in ("blank lines", "empty array", "utf-16", "cut gzip")
    ]
    assert not without
    with pytest.raises(json.JSONDecodeError) as caught:
        json.loads(f"{CANARY} {CANARY}")
    assert CANARY in caught.value.doc  # what an error would carry along without `from None`


def test_damaged_parquet_pages_are_named_by_row(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", [{"question": CANARY * 10, "answer": str(i)} for i in range(5000)])
    content = bytearray(path.read_bytes())
    content[4:200] = bytes(196)
    path.write_bytes(content)
    with pytest.raises(InputError, match="not a Parquet file that can be read") as caught:
        list(read_rows(path))
    assert CANARY not in str(caught.value)


@pytest.mark.parametrize("name", ["a.txt", "a", "a.gz", "a.parquet.gz", "a.jsonl.zip", "a.tsv"])
def test_an_unknown_extension_lists_the_known_ones(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(GOOD)
    with pytest.raises(InputError, match=r"\.jsonl, \.ndjson, \.json, \.csv, \.parquet"):
        list(read_rows(tmp_path / name))


def test_what_is_no_file_says_so(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "folder.jsonl").mkdir()
    for name, expected in (("missing.jsonl", "does not exist"), ("empty.jsonl", "is empty"), ("folder.jsonl", "is a folder")):
        with pytest.raises(InputError, match=expected):
            list(read_rows(tmp_path / name))
    with pytest.raises(InputError, match="does not exist"):
        list_files(tmp_path / "missing")


def test_an_endless_line_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_LINE_BYTES", 1 << 20)
    (tmp_path / "a.jsonl").write_bytes(b"{}\n" + b" " * (1 << 21))
    with pytest.raises(InputError, match="line 2 is longer than 1 MiB"):
        list(read_rows(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("uri", ["ftp://host/a.jsonl", "s3://data/with space.jsonl", "://a.jsonl"])
def test_a_uri_that_cannot_be_opened_names_the_schemes(uri: str) -> None:
    with pytest.raises(InputError, match="s3://, gs://"):
        list(read_rows(uri))


def test_credentials_in_a_uri_are_not_shown() -> None:
    assert shown("s3://KEY:SE/CRET@data/p/a.jsonl?endpoint_override=host&secret_key=hidden") == "s3://data/p/a.jsonl"
    assert shown("s3://data/user@host/a.jsonl") == "s3://data/user@host/a.jsonl"
    assert shown("relative/what?.jsonl") == "relative/what?.jsonl"
    with pytest.raises(InputError) as caught:
        list(read_rows("nope://KEY:SECRET@data/a.jsonl"))
    assert "SECRET" not in str(caught.value)


def test_s3_is_read_through_the_endpoint_of_the_environment(tmp_path: Path, s3: Bucket) -> None:
    for name in ("a.jsonl", "a.csv.gz", "a.parquet"):
        s3.objects[f"p/{name}"] = write(tmp_path / name, ROWS).read_bytes()
    for name in ("a.jsonl", "a.csv.gz", "a.parquet"):
        assert [row for _, row in read_rows(f"s3://data/p/{name}")] == ROWS
    assert list_files("s3://data/p") == ["a.csv.gz", "a.jsonl", "a.parquet"]
    assert any(line.startswith("GET /data/p/a.jsonl") for line in s3.requests)


def test_s3_failures_are_told_apart(s3: Bucket) -> None:
    s3.objects["p/secret.jsonl"] = GOOD.encode()
    s3.denied.add("p/secret.jsonl")
    for uri, expected in (
        ("s3://data/p/none.jsonl", "does not exist"),
        ("s3://nobucket/p/none.jsonl", "does not exist"),
        ("s3://data/p/secret.jsonl", "permission denied"),
    ):
        with pytest.raises(InputError, match=expected):
            list(read_rows(uri))


def test_permission_denied_says_what_to_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests may run as root, whom no file mode stops: the operating system's refusal is raised in its place."""
    path = write(tmp_path / "a.jsonl", ROWS)

    class Locked:
        def get_file_info(self, path: str) -> Any:
            return pa.fs.LocalFileSystem().get_file_info(path)

        def open_input_stream(self, path: str, compression: str | None) -> Any:
            raise PermissionError(13, f"{path}: Permission denied")

    monkeypatch.setattr(files, "open_filesystem", lambda uri: (Locked(), str(uri)))
    with pytest.raises(InputError, match="permission denied"):
        list(read_rows(path))
