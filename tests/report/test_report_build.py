"""Built reports: well-formed, self-contained, deterministic, harmless whatever the runs are called, and true to the results."""

from __future__ import annotations

import json
import os
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
import yaml

from soul.records import InputError
from soul.report.build import build_report
from soul.report.card import model_card
from soul.report.runs import load_run
from soul.report.words import ATTACKS, METRICS, OVERALL

RunDirs = Callable[..., Path]
VOID = {"meta", "br", "hr", "img", "input", "link", "col", "wbr"}
HOSTILE = '<script>alert("x")</script><img src=https://evil.example/p.png>|`$a$\' onload="y'


class Page(HTMLParser):
    """Checks nesting and collects what the tests ask for."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"doubled attribute in <{tag}>"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def pair(run_dir: RunDirs) -> list[Path]:
    return [run_dir("so"), run_dir("fo", optimizer="adamw", forget=0.41, retain=0.955, train_s=281.0)]


def test_one_run_reports_into_its_directory(run_dir: RunDirs) -> None:
    folder = run_dir("so")
    files = build_report([folder])
    assert files.html == folder / "report.html" and files.markdown == folder / "report.md" and files.cards == ()
    assert {path.name for path in files.figures} >= {"trade-off.svg", "forget-curve.svg", "retain-curve.svg", "unclipped-fraction.svg"}
    assert not [path for path in folder.rglob("*") if path.name.startswith(".")]


def test_the_page_is_well_formed_accessible_and_self_contained(pair: list[Path], tmp_path: Path) -> None:
    text = build_report(pair, tmp_path / "out").html.read_text()
    page = Page(text)
    assert "http://" not in text and "https://" not in text and "@import" not in text
    assert not page.all("script") and not page.all("link") and not page.all("img")
    assert all(target.startswith("#") for tag, at in page.tags for target in [at.get("href") or at.get("src") or "#"])
    assert all(reference.startswith("#") for reference in re.findall(r"url\(['\"]?([^)]*)\)", text))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    wanted = {target[1:] for _, at in page.tags if (target := at.get("href"))} | set(re.findall(r"url\(#([^)]+)\)", text))
    assert wanted <= set(ids)
    assert all(attributes.get("scope") for attributes in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table")) >= 5
    assert len(page.all("svg")) == len(page.all("figure")) == len(page.all("figcaption")) == 8
    assert all(attributes.get("role") == "img" and attributes.get("aria-label") for attributes in page.all("svg"))
    assert page.all("html")[0]["lang"] == "en" and len(page.all("h1")) == 1
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text


def test_page_and_markdown_name_every_run_number_and_reason(pair: list[Path], tmp_path: Path) -> None:
    files = build_report(pair, tmp_path / "out")
    markdown = re.sub(r"\\(.)", r"\1", files.markdown.read_text())
    for text in (Page(files.html.read_text()).text, markdown):
        for words in ("SO-NPO (sophia)", "FO-NPO (adamw)", "target", "retrained", "0.120", "0.410", "−20.7", "5.2 min", "1.11 ×", "0.999"):
            assert words in text.replace("\u00a0", " "), words
        assert "the device keeps no peak (CPU)" in text and "learning_rate" in text and "not the optimizers" in text
        for table in (METRICS, OVERALL, ATTACKS):
            assert all(word.meaning in text for word in table.values())


def test_many_runs_begin_with_the_table(run_dir: RunDirs, tmp_path: Path) -> None:
    folders = [run_dir(f"s{seed}", seed=seed) for seed in range(4)]
    text = Page(build_report(folders, tmp_path / "out").html.read_text()).text
    order = [
        text.index(words)
        for words in ("Of 4 runs", "Before and after", "SO-NPO (sophia), seed 3", "Run by run", "After unlearning the model")
    ]
    assert order == sorted(order) and text.count("After unlearning the model") == 4


def test_two_builds_are_equal_byte_for_byte(pair: list[Path], tmp_path: Path) -> None:
    first = build_report(pair, tmp_path / "a")
    with mpl.rc_context({"font.size": 31, "axes.grid": False, "svg.fonttype": "path", "lines.linewidth": 9}):
        second = build_report(pair, tmp_path / "b")  # whatever the user's matplotlibrc says
    for one, other in zip((first.html, first.markdown, *first.figures), (second.html, second.markdown, *second.figures), strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_markdown_tables_are_rectangular_and_figures_exist(pair: list[Path], tmp_path: Path) -> None:
    files = build_report(pair, tmp_path / "out")
    text = files.markdown.read_text()
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1
    linked = re.findall(r"\]\((figures/[^)]+)\)", text)
    assert len(linked) == 8
    assert {files.markdown.parent / name for name in linked} == set(files.figures)
    for path in files.figures:
        root = ET.parse(path).getroot()
        assert root.tag.endswith("svg") and root.find("{http://www.w3.org/2000/svg}title") is not None


def test_hostile_names_are_shown_not_obeyed(run_dir: RunDirs, tmp_path: Path) -> None:
    folder = run_dir("h", method=HOSTILE)
    (folder / "model").mkdir()
    document = json.loads((folder / "results.json").read_text())
    document |= {"benchmark": HOSTILE, "settings": {HOSTILE: HOSTILE}}
    document["models"]["retrained"]["reasons"]["forget_quality"] = HOSTILE
    (folder / "results.json").write_text(json.dumps(document))
    (folder / "manifest.json").write_text(json.dumps({"versions": {HOSTILE: HOSTILE}, "command": ["python", HOSTILE]}))
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 1.0, "terms": {HOSTILE: 1.0}}) + "\n")
    files = build_report([folder], tmp_path / "out")
    page = Page(files.html.read_text())
    assert not page.all("script") and not page.all("img")
    assert not any("onload" in attributes for _, attributes in page.tags)
    assert HOSTILE in page.text
    markdown = "\n".join(line for line in files.markdown.read_text().splitlines() if not line.startswith("    "))  # indented code is inert
    for text in (markdown, files.cards[0].read_text()):
        assert "<script" not in text and "<img" not in text
    for path in files.figures:
        assert not [element for element in ET.parse(path).iter() if element.tag.rpartition("}")[2] in ("script", "image")]


def test_bare_results_are_enough(run_dir: RunDirs, tmp_path: Path) -> None:
    folder = run_dir("bare", retrained=False)
    (folder / "metrics.jsonl").unlink()
    document = json.loads((folder / "results.json").read_text()) | {"epochs": [], "splits": {}, "settings": {}}
    for model in document["models"].values():
        if model:
            model |= dict.fromkeys(
                ("retain", "real_authors", "world_facts", "forget_quality", "forget_quality_ks", "model_utility", "mia_auc")
            )
            model["reasons"] = dict.fromkeys(("retain", "real_authors", "world_facts", "forget_quality"), "own data has none")
            model["reasons"] |= dict.fromkeys(("forget_quality_ks", "model_utility", "mia_auc"), "own data has none")
    (folder / "results.json").write_text(json.dumps(document))
    files = build_report([folder])
    text = Page(files.html.read_text()).text
    assert (
        "None was run" in text and "neither a recorded command nor a configuration" in text and "not measured (own data has none)" in text
    )
    assert files.figures == ()


def test_reproduction_command(run_dir: RunDirs) -> None:
    folder = run_dir("a b")
    (folder / "config.json").write_text(json.dumps({"benchmark": "own"}))
    assert (
        "python pipelines/unlearn.py --config 'a b/config.json' --output 'a b-again'" in Page(build_report([folder]).html.read_text()).text
    )
    for command in (["python", "pipelines/tofu.py", "--seed", "1"], ["tofu.py", "--seed", "1"], "python pipelines/tofu.py --seed 1"):
        (folder / "manifest.json").write_text(json.dumps({"command": command}))
        assert load_run(folder).command == "python pipelines/tofu.py --seed 1"
    text = Page(build_report([folder]).html.read_text()).text
    assert "python pipelines/tofu.py --seed 1" in text and "a b/config.json" not in text


def test_the_model_card(run_dir: RunDirs) -> None:
    folder = run_dir("so")
    (folder / "model").mkdir()
    (folder / "config.json").write_text(json.dumps({"model": {"path": "meta-llama/Llama-3.2-1B-Instruct"}}))
    (path,) = build_report([folder]).cards
    assert path == folder / "model" / "README.md"
    _, front, body = path.read_text().split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": "meta-llama/Llama-3.2-1B-Instruct",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["unlearning", "soul"],
    }
    for words in ("0.120", "## Intended use", "## Limits", "not a guarantee", "400 question-answer rows"):
        assert words in body


@pytest.mark.parametrize("path", ["/abs/model", "./runs/target", "runs/with/three", "plain", "org/na me", None, 3])
def test_a_local_target_is_no_base_model(run_dir: RunDirs, path: object) -> None:
    run = load_run(run_dir("so"))
    assert "base_model" not in model_card(replace(run, config={"model": {"path": path}}))
    assert 'base_model: "org/name"' in model_card(replace(run, config={"model": {"path": "org/name"}}))


def test_a_folder_named_like_a_hub_id_is_no_base_model(run_dir: RunDirs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = replace(load_run(run_dir("so")), config={"model": {"path": "models/target"}})
    assert "base_model" in model_card(run)
    (tmp_path / "models" / "target").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert "base_model" not in model_card(run)


def test_bad_runs_are_input_errors(run_dir: RunDirs, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least one run"):
        build_report([])
    with pytest.raises(InputError, match="not there"):
        build_report([tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"results\.json"):
        build_report([tmp_path / "empty"])
    folder = run_dir("broken")
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json is not JSON"):
        build_report([folder])
    assert not (folder / "report.html").exists()


def test_a_crash_leaves_the_old_report(run_dir: RunDirs, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run_dir("so")
    old = build_report([folder]).html.read_bytes()
    document: dict[str, Any] = json.loads((folder / "results.json").read_text())
    document["seed"] = 77
    (folder / "results.json").write_text(json.dumps(document))

    def crash_on_html(source: str, target: Path) -> None:
        if Path(target).name == "report.html":
            raise OSError("disk full")
        original(source, target)

    original = os.replace
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", crash_on_html)
        with pytest.raises(OSError, match="disk full"):
            build_report([folder])
    assert (folder / "report.html").read_bytes() == old
    assert build_report([folder]).html.read_bytes() != old
