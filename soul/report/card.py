"""README.md of an exported model: what it is, what was measured, and what nobody should conclude from that."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Final

from soul.report.comparison import run_labels
from soul.report.runs import Run
from soul.report.table import markdown_table, markdown_text
from soul.report.verdict import verdict

HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

INTENDED_USE: Final = """\
Research on unlearning: comparing methods and optimizers, and testing how well forgetting holds. Before any other use, evaluate it on your
own questions."""

LIMITS: Final = """\
- Unlearning suppresses what the model was asked to forget; it is not a guarantee that the knowledge is gone. Other questions, other
  languages, fine-tuning on related data or attacks on the weights may bring some of it back.
- The evaluation covers the rows named above and the attacks listed in the report, nothing else. A metric that is good here says nothing
  about facts that were not tested.
- It does not by itself satisfy a legal duty to erase data: the original model and its copies still exist.
- What the base model got wrong, and what it must not be used for, still holds."""


def model_card(run: Run) -> str:
    """Markdown with the front matter that the Hugging Face hub reads."""
    results = run.results
    label = run_labels([results])[0]
    judged = verdict(results)
    base = base_model(run)
    starting = f"[{base}](https://huggingface.co/{base})" if base else "a model that was trained on all rows"
    settings = "\n".join(
        f"- {markdown_text(name)}: {markdown_text(str(value))}" for name, value in results.settings.items() if value is not None
    )
    return "\n".join(
        [
            _front_matter(base),
            f"# {markdown_text(label)} on {markdown_text(results.benchmark)}",
            "",
            f"This model was made from {starting} by unlearning: it was trained to forget "
            f"{_rows(run, 'forget')} and to keep the rest, with the method {markdown_text(results.method)} and the optimizer "
            f"{markdown_text(results.optimizer)} (seed {results.seed}).",
            "",
            f"**{judged.badge[0].upper()}{judged.badge[1:]}.** {markdown_text(judged.text)}",
            "",
            "## Evaluation",
            "",
            markdown_table([results]),
            "## Intended use",
            "",
            INTENDED_USE,
            "",
            "## Limits",
            "",
            LIMITS,
            "",
            "## Training",
            "",
            settings or "The settings were not recorded.",
            "",
        ]
    )


def base_model(run: Run) -> str | None:
    """The hub id that the run started from; None for a local folder, which means nothing to a reader elsewhere."""
    model = run.config.get("model")
    path = model.get("path") if isinstance(model, dict) else model
    if not isinstance(path, str) or not HUB_ID.fullmatch(path) or Path(path).exists():
        return None
    return path


def _front_matter(base: str | None) -> str:
    """YAML; a JSON string is a YAML string."""
    lines = [f"base_model: {json.dumps(base)}"] if base else []
    return "\n".join(
        ["---", *lines, "library_name: transformers", "pipeline_tag: text-generation", "tags:", "- unlearning", "- soul", "---", ""]
    )


def _rows(run: Run, split: str) -> str:
    size = run.results.splits.get(split)
    return "some rows" if size is None else f"{size:,} question-answer rows"
