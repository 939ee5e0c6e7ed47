"""lm-eval's own client against the endpoint: what it measures is what torch says. Needs `lm-eval` (extra `eval`) on PATH."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import yaml

from soul.data.fictitious import fictitious_splits
from soul.models.load import load_model, load_tokenizer
from tests.serving.conftest import KEY, Served

LM_EVAL = shutil.which("lm-eval")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(LM_EVAL is None, reason="lm-eval is not installed")]
TASK = {
    "task": "invented",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "invented.jsonl"}},
    "test_split": "test",
    "output_type": "loglikelihood",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_target": " {{answer}}",
    "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
}


@pytest.mark.parametrize("batch_size", [1, 4])
def test_every_log_likelihood_equals_torch(served: Served, tmp_path: Path, batch_size: int) -> None:
    assert LM_EVAL is not None
    folder = served.folder("good")
    rows = fictitious_splits(2, num_holdout_authors=1)["full"][:9]
    (tmp_path / "invented.jsonl").write_text("".join(json.dumps({"question": row.prompt, "answer": row.response}) + "\n" for row in rows))
    (tmp_path / "invented.yaml").write_text(yaml.safe_dump(TASK))
    model = f"model=good,base_url={served.url}/v1/completions,tokenizer={folder},num_concurrent=3"
    task = ["--include_path", ".", "--tasks", "invented", "--batch_size", str(batch_size), "--output_path", "out", "--log_samples"]
    subprocess.run(
        [LM_EVAL, "run", "--model", "local-completions", "--model_args", model, *task],
        cwd=tmp_path,
        env={**os.environ, "OPENAI_API_KEY": KEY, "HF_HOME": str(tmp_path / "hub"), "PYTHONPATH": ""},
        check=True,
        timeout=250,
        capture_output=True,
    )
    torch_model, tokenizer = load_model(folder).eval(), load_tokenizer(folder)
    (file,) = (tmp_path / "out").rglob("samples_*.jsonl")
    samples = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(samples) == len(rows)
    for sample in samples:
        asked = sample["arguments"]["gen_args_0"]
        ids = tokenizer.encode(asked["arg_0"] + asked["arg_1"], add_special_tokens=False)
        first = len(tokenizer.encode(asked["arg_0"], add_special_tokens=False))
        with torch.inference_mode():
            logps = torch.log_softmax(torch_model(input_ids=torch.tensor([ids])).logits[0], dim=-1)
        want = sum(float(logps[place - 1, ids[place]]) for place in range(first, len(ids)))
        is_greedy = all(int(logps[place - 1].argmax()) == ids[place] for place in range(first, len(ids)))
        logp, told_greedy = sample["resps"][0][0]
        assert float(logp) == pytest.approx(want, abs=1e-3)
        assert str(told_greedy) == str(is_greedy)
