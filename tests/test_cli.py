from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from soul.cli import BAD_INPUT, COMMANDS, DONE, FAILURE, INTERRUPTED, build_parser, config_of, main, run_command
from soul.config import Config, EvaluateConfig
from soul.flags import MEANING_OF_NULL, flags_of, given_settings
from soul.records import InputError
from soul.settings import leaves, load_config

ROOT = Path(__file__).resolve().parents[1]
CANARY = "Basil Quillfeather was born in Ostermere"


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A stand-in for the orchestration that records what it is asked to do; ray stays out of these tests."""
    calls: list[Any] = []
    module = ModuleType("soul.orchestration.pipeline")

    def record(value: Any) -> Path:
        calls.append(value)
        return Path("done")

    for name in ("run", "resume", "evaluate_folder"):
        setattr(module, name, record)
    package = ModuleType("soul.orchestration")
    package.pipeline = module  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "soul.orchestration", package)
    monkeypatch.setitem(sys.modules, "soul.orchestration.pipeline", module)
    return calls


@pytest.fixture(autouse=True)
def _sigterm_as_before() -> Any:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def parsed(*words: str, command: str = "tofu") -> Config:
    return config_of(build_parser(command).parse(words))


def told(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(words) == BAD_INPUT
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    assert all(line.startswith("error: ") for line in captured.err.splitlines())
    return captured.err


# flags


def test_flags_yaml_and_python_use_the_same_words(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "data: {source: ../tofu, forget: forget10, limit_forget: 9}\nmethod: {name: npo, beta: 0.2, reduction: mean}\n"
        "optimizer: {rho: 0.05, hessian_every: 5, betas: [0.8, 0.9], hessian_data: both}\n"
        "train: {epochs: 2, max_steps: null, seed: 3}\nengine: {name: ddp, num_workers: 2}\noutput: runs/y\n"
    )
    flags = (
        "--data ../tofu --forget forget10 --limit-forget 9 --method npo --beta 0.2 --reduction mean --rho 0.05 --hessian-every 5 "
        "--betas 0.8,0.9 --hessian-data both --epochs 2 --max-steps none --seed 3 --engine ddp --num-workers 2 --output runs/y"
    )
    in_python = Config.model_validate(
        {
            "data": {"source": "../tofu", "forget": "forget10", "limit_forget": 9},
            "method": {"name": "npo", "beta": 0.2, "reduction": "mean"},
            "optimizer": {"rho": 0.05, "hessian_every": 5, "betas": (0.8, 0.9), "hessian_data": "both"},
            "train": {"epochs": 2, "seed": 3},
            "engine": {"name": "ddp", "num_workers": 2},
            "output": "runs/y",
        }
    )
    assert parsed(*flags.split()) == load_config(file, {}) == in_python


def test_flags_override_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("train: {epochs: 2, seed: 3}\nsamples: true\n")
    config = parsed("--config", str(file), "--epochs", "7", "--no-samples")
    assert (config.train.epochs, config.train.seed, config.samples) == (7, 3, False)


def test_the_names_of_the_design_exist() -> None:
    wanted = (
        "model data forget retain method optimizer engine epochs learning-rate batch-size micro-batch-size retain-weight beta reduction "
        "rho target-unclipped hessian-every hessian-data weight-decay seed num-workers precision max-steps eval-every save-every output "
        "resume verbose address retrained finetune twin limit-forget limit-retain num-authors max-length trust-remote-code samples wandb"
    )
    assert {f"--{name}" for name in wanted.split()} <= {flag.name for flag in flags_of("tofu")}
    own = {flag.name for flag in flags_of("unlearn")}
    assert {"--columns", "--holdout", "--model"} <= own and not {"--data", "--num-authors"} & own


@pytest.mark.parametrize("command", ["tofu", "unlearn", "evaluate"])
def test_no_two_settings_share_a_flag(command: str) -> None:
    names = [flag.name for flag in flags_of(command)]
    assert len(set(names)) == len(names)
    build_parser(command)  # argparse raises where --no-x meets another flag


def test_every_setting_of_a_run_has_a_flag_in_one_of_the_commands() -> None:
    keys = {flag.key for command in ("tofu", "unlearn") for flag in flags_of(command)}
    missing = {key for key in leaves(Config) if key not in keys and not key.startswith("data.columns.")}
    assert missing == {"benchmark", "model.tiny.name"}


@pytest.mark.parametrize(("command", "root"), [("tofu", Config), ("unlearn", Config), ("evaluate", EvaluateConfig)])
def test_help_documents_every_flag(command: str, root: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(command, ["--help"]) == DONE
    shown = " ".join(capsys.readouterr().out.split())
    for flag in flags_of(command):
        assert flag.name in shown
        owners = leaves(root)[flag.key] if flag.key != "data.columns" else [type(root.model_fields["data"].default)]
        for owner in owners:
            text = MEANING_OF_NULL.sub("", owner.model_fields[flag.key.split(".")[-1]].description or "").rstrip(".")
            assert " ".join(text.split()) in shown, f"{flag.name}: {text}"
        assert f"[default: {flag.default}]" in shown, flag.name


def test_help_says_whose_a_flag_is_and_what_its_default_is() -> None:
    flags = {flag.name: flag for flag in flags_of("tofu")}
    assert "(npo only) [default: 0.1]" in flags["--beta"].help
    assert "(sophia, sophia_h, soul_release only) [default: sophia, sophia_h: auto; soul_release: 0.04]" in flags["--rho"].help
    assert flags["--rho"].metavar == "{X,auto}"
    assert flags["--max-steps"].help.endswith("[default: none]") or "[default: no limit]" in flags["--max-steps"].help
    assert flags["--cache"].help.endswith("[default: .cache beside the run directory]")


def test_a_value_of_none_means_null_only_where_null_is_a_value() -> None:
    assert parsed("--max-grad-norm", "none").engine.max_grad_norm is None
    with pytest.raises(InputError, match="--epochs: expected a valid integer"):
        parsed("--epochs", "none")


def test_given_settings_hold_nothing_that_was_not_given() -> None:
    flags = flags_of("tofu")
    nested, labels = given_settings(build_parser("tofu").parse(["--beta", "0.3", "--no-progress"]), flags)
    assert nested == {"method": {"beta": "0.3"}, "progress": False}
    assert labels == {"method.beta": "--beta", "progress": "--progress"}


# the demo


def test_without_data_and_model_it_is_the_demo() -> None:
    demo = parsed()
    assert (demo.data.source, demo.twin, demo.method.name, demo.optimizer.name) == ("fictitious", "adamw", "npo", "sophia")
    assert demo.data.num_authors < 200 and demo.output == "runs/tofu"
    assert parsed("--output", "x", "--seed", "1").twin == "adamw"
    assert parsed("--twin", "none").twin is None
    assert parsed("--optimizer", "adamw").twin is None
    assert parsed("--data", "d").twin is None and parsed("--model", "m").data.num_authors == 200


# messages and exit codes


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("tofu --rhoo 1", ["unknown flag --rhoo", "Did you mean --rho?"]),
        ("tofu --hesian-every=3", ["unknown flag --hesian-every", "Did you mean --hessian-every?"]),
        ("tofu --rho 1 --optimizer adamw", ["--rho belongs to sophia, sophia_h, soul_release, got --optimizer adamw."]),
        ("tofu --beta 1 --method ga", ["--beta belongs to npo, got --method ga."]),
        ("tofu --rho high", ["--rho: expected a valid number or 'auto', got high."]),
        ("tofu --method npoo", ["--method: expected one of 'ga', 'grad_diff', 'po', 'npo', 'influence', got npoo.", "Did you mean npo?"]),
        ("tofu --optimizer sofia", ["--optimizer: expected one of 'adamw', 'sophia'", "Did you mean sophia?"]),
        ("tofu --engine deepsped", ["--engine: expected 'single'", "got deepsped"]),
        ("tofu --epochs 0", ["--epochs: expected greater than or equal to 1, got 0."]),
        ("tofu --beta", ["--beta", "expected one argument"]),
        ("tofu --data d stray words", ["2 word(s) too many"]),
        ("tofu --num-workers 2 --engine single", ["engine single has one worker"]),
        ("tofu --config missing.yaml", ["--config missing.yaml cannot be read"]),
        ("unlearn --model m --retain r", ["own data needs a forget file", "--forget"]),
        ("unlearn --columns promt=q", ["--columns", "'prompt'"]),
        ("tufo", ["expected a command (tofu, unlearn", "Did you mean tofu?"]),
        ("resume nowhere", ["nowhere is no run directory"]),
        ("report nowhere", ["nowhere"]),
        ("score nowhere.json", ["nowhere.json"]),
        ("evaluate m --epochs 3", ["unknown flag --epochs"]),
        ("score", ["LOG"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(line: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    message = told(capsys, *line.split())
    assert all(word in message for word in words), message


def test_each_problem_has_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(told(capsys, "tofu", "--epochs", "0", "--beta", "x", "--method", "npo").splitlines()) == 2


def test_help_and_version_are_not_failures(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == main(["--help"]) == main(["score", "--help"]) == DONE
    shown = capsys.readouterr().out
    assert all(command in shown for command in COMMANDS)
    assert main(["--version"]) == DONE


def test_commands_reach_the_pipeline(pipeline: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert main(["tofu", "--method", "ga"]) == DONE
    assert main(["unlearn", "--model", "m", "--forget", "f.jsonl", "--retain", "r.jsonl", "--columns", "prompt=q"]) == DONE
    assert main(["evaluate", "folder", "--data", "d", "--forget", "forget10", "--retrained", "log.json"]) == DONE
    assert main(["resume", str(tmp_path)]) == DONE
    tofu, own, evaluate, resumed = pipeline
    assert isinstance(tofu, Config) and tofu.method.name == "ga"
    assert (own.benchmark, own.output, own.data.columns.prompt, own.data.source) == ("own", "runs/own", "q", "files")
    assert isinstance(evaluate, EvaluateConfig)
    assert (evaluate.model.path, evaluate.model.retrained, evaluate.data.forget) == ("folder", "log.json", "forget10")
    assert resumed == tmp_path
    assert capsys.readouterr().out.split() == ["done"] * 4


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (InputError("expected this, got that"), BAD_INPUT, "error: expected this, got that"),
        (OSError(28, "No space left on device"), FAILURE, "failed: OSError"),
        (ArithmeticError("the forget loss is not finite"), FAILURE, "failed: ArithmeticError: the forget loss"),
        (KeyboardInterrupt(), INTERRUPTED, "interrupted. Continue with: soul resume runs/z"),
    ],
)
def test_exit_codes(
    error: BaseException, code: int, words: str, monkeypatch: Any, pipeline: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: object) -> None:
        raise error

    monkeypatch.setattr(sys.modules["soul.orchestration.pipeline"], "run", fail)
    assert main(["tofu", "--output", "runs/z"]) == code
    assert words in capsys.readouterr().err


def test_sigterm_leaves_like_ctrl_c(monkeypatch: pytest.MonkeyPatch, pipeline: Any, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.modules["soul.orchestration.pipeline"], "run", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    assert main(["tofu"]) == INTERRUPTED
    assert "soul resume runs/tofu" in capsys.readouterr().err


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, pipeline: Any) -> None:
    monkeypatch.setattr(sys.modules["soul.orchestration.pipeline"], "run", lambda _: {}["missing"])
    with pytest.raises(KeyError):
        main(["tofu"])


# privacy


@pytest.mark.parametrize(
    "rows",
    [
        [{"question": CANARY, "answer": ""}],
        [{"question": CANARY, "answer": 5}],
        [{CANARY: CANARY}],
        [{"question": CANARY, "answer": CANARY, "prompt": CANARY}],
    ],
)
def test_a_bad_row_is_never_quoted(rows: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("forget05", "retain95"):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    assert CANARY not in told(capsys, "tofu", "--data", str(tmp_path), "--dry-run")


@pytest.mark.parametrize("row", [{"question": CANARY}, {"question": CANARY, "answer": 1}, {CANARY: CANARY}, f"{CANARY} {{"])
def test_a_bad_row_of_ones_own_is_never_quoted(row: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "good.jsonl").write_text('{"question": "a?", "answer": "b"}\n')
    (tmp_path / "bad.jsonl").write_text('{"question": "a?", "answer": "b"}\n' + (row if isinstance(row, str) else json.dumps(row)) + "\n")
    files = ["--forget", str(tmp_path / "good.jsonl"), "--retain", str(tmp_path / "bad.jsonl")]
    message = told(capsys, "unlearn", "--model", "m", *files, "--dry-run", "--verbose")
    assert CANARY not in message and "bad.jsonl" in message and "2" in message


def test_evaluation_of_own_files(pipeline: list[Any]) -> None:
    files = ["--benchmark", "own", "--forget", "f.jsonl", "--retain", "r.jsonl", "--columns", "response=out", "--num-workers", "2"]
    assert main(["evaluate", "folder", *files]) == DONE
    (config,) = pipeline
    assert (config.data.source, config.data.columns.response, config.num_workers) == ("files", "out", 2)


def test_data_passed_as_settings_is_never_quoted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, text in enumerate((json.dumps([{"question": CANARY}]), json.dumps({CANARY: CANARY}), f"{CANARY}\n{CANARY}: {CANARY}: x")):
        file = tmp_path / f"{number}.json"
        file.write_text(text)
        assert CANARY not in told(capsys, "tofu", "--config", str(file))


# dry run and score


def test_a_dry_run_is_a_config_file(tmp_path: Path, capsys: pytest.CaptureFixture[str], pipeline: list[Any]) -> None:
    words = ["--num-authors", "20", "--method", "grad_diff", "--epochs", "3", "--batch-size", "4"]
    assert main(["tofu", *words, "--dry-run"]) == DONE
    shown = capsys.readouterr().out
    assert pipeline == [] and "parameters" in shown and "curvature updates" in shown
    file = tmp_path / "shown.yaml"
    file.write_text(shown)
    assert load_config(file, {}) == parsed(*words)
    assert yaml.safe_load(shown)["train"]["epochs"] == 3


def test_a_dry_run_counts_own_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, count in (("f", 5), ("r", 9)):
        (tmp_path / f"{name}.jsonl").write_text('{"question": "a?", "answer": "b"}\n' * count)
    (tmp_path / "config.json").write_text('{"model_type": "nothing-known"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    words = ["--model", str(tmp_path), "--forget", str(tmp_path / "f.jsonl"), "--retain", str(tmp_path / "r.jsonl"), "--batch-size", "4"]
    assert main(["unlearn", *words, "--limit-retain", "7", "--dry-run"]) == DONE
    shown = " ".join(capsys.readouterr().out.split())
    assert "forget rows 5 # retain rows 7 #" in shown and "steps an epoch 2 #" in shown
    assert "memory of one worker: unknown" in shown


def test_score_prints_one_json_object(shared_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logs = shared_data / "tofu_logs"
    assert (
        main(["score", str(logs / "llama2-7b_full_wd0.01.json.gz"), "--retrained", str(logs / "llama2-7b_retain90_wd0.01.json.gz")]) == DONE
    )
    scored = json.loads(capsys.readouterr().out)
    assert 0 <= scored["forget_quality"] < 1e-3 and 0.5 < scored["model_utility"] < 0.8


def test_only_a_run_imports_ray() -> None:
    code = (
        "import sys; from soul.cli import main\n"
        "main(['--help']); main(['score', 'nowhere.json']); assert 'torch' not in sys.modules\n"
        "main(['tofu', '--help']); main(['tofu', '--num-authors', '20', '--dry-run'])\n"
        "sys.exit('ray' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_scripts_run_from_a_clone(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [sys.executable, str(ROOT / "pipelines" / "tofu.py"), "--rhoo", "1"]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == BAD_INPUT and "Did you mean --rho?" in done.stderr, done.stderr[-2000:]


def test_the_script_for_own_data_is_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", ["unlearn.py", "--model", "m", "--retain", "r.jsonl"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "pipelines" / "unlearn.py"), run_name="__main__")
    assert stopped.value.code == BAD_INPUT and "own data needs a forget file" in capsys.readouterr().err
