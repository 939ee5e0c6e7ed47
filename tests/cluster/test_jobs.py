"""`ray job submit` against a head with token authentication, and what `soul check` and a run say where it cannot work."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("ray")

from soul.cli import BAD_INPUT, DONE, FAILURE, INTERRUPTED
from tests.cluster.heads import ROOT, Head, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

TINY = "--num-authors 3 --forget forget05 --prepare-max-steps 20 --eval-max-new-tokens 16 --tiny-hidden-size 32 --tiny-intermediate-size 64"
TINY += " --twin none --tiny-num-layers 1 --tiny-num-heads 2 --tiny-vocab-size 400"
LONG = "--epochs 400 --save-every 10 --eval-every 0"  # `ray job stop` needs a few seconds to start
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")  # all but tab and newline


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with Head(num_cpus=4) as head:
        yield head


def words(output: Path, *more: str) -> list[str]:
    return ["pipelines/tofu.py", *TINY.split(), "--output", str(output), *more]


def soul(head: Head, *words: str, **changed: str | None) -> subprocess.CompletedProcess[str]:
    """`soul ...` with the head's environment; None takes a variable out of it."""
    merged = {**head.environment, **changed}
    environment = {name: value for name, value in merged.items() if value is not None}
    command = [sys.executable, "-c", "import sys; from soul.cli import main; sys.exit(main())", *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_a_job_runs_to_its_table_and_one_that_never_fits_ends_at_once(head: Head, tmp_path: Path) -> None:
    assert head.submit("never-fits", *words(tmp_path / "large", "--num-workers", "50"), wait=False).returncode == 0
    done = head.submit("tiny", *words(tmp_path / "run", "--epochs", "2"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert head.job("tiny")["status"] == "SUCCEEDED"
    log = head.ray("job", "logs", "tiny").stdout
    own = log[log.index("Running entrypoint") :]
    assert not CONTROL.search(own), CONTROL.search(own)
    for stage in ("train target model: 20/20", "evaluate target", "evaluate NPO with sophia"):
        assert any(line.startswith(stage) for line in own.splitlines()), stage
    assert [row.split()[0] for row in table(own)] == ["target", "SO-NPO", "retrained"]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["models"]["unlearned"] is not None

    never = head.ended("never-fits")
    assert (never["status"], never["driver_exit_code"]) == ("FAILED", BAD_INPUT)
    said = [line for line in head.log("never-fits").splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "--num-workers 50 needs 50 CPUs, the cluster has 4" in said[0]
    assert "Traceback" not in head.log("never-fits")


def test_a_cluster_that_can_be_joined_is_described(head: Head) -> None:
    done = soul(head, "check", "--address", head.address)
    assert done.returncode == DONE, done.stderr
    assert re.search(r"^CPUs +4$", done.stdout, re.MULTILINE) and re.search(r"^Ray +2\.60", done.stdout, re.MULTILINE)
    large = soul(head, "check", "--address", head.address, "--num-workers", "5")
    assert large.returncode == BAD_INPUT and "--num-workers 5 needs 5 CPUs, the cluster has 4" in large.stderr
    done = soul(head, "check", "--address", head.http, "--num-workers", "5")
    assert done.returncode == DONE, done.stderr
    assert re.search(r"^CPUs +4$", done.stdout, re.MULTILINE) and "5 workers do not fit" in done.stdout


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"RAY_AUTH_TOKEN": "f" * 64}, "refuses this environment's token"),
        ({"RAY_AUTH_TOKEN_PATH": None, "HOME": "nowhere"}, "this environment has no token"),
    ],
)
def test_authentication_is_named_within_seconds(changed: dict[str, str | None], says: str, head: Head, tmp_path: Path) -> None:
    if "HOME" in changed:
        changed = {**changed, "HOME": str(tmp_path)}
    for flags in (["check", "--address", head.address], ["check", "--address", head.http]):
        done = soul(head, *flags, **changed)
        assert done.returncode == BAD_INPUT, done.stderr
        last = done.stderr.splitlines()[-1]  # Ray's own library may warn before
        assert last.startswith("error: authentication: ") and says in last
        assert "RAY_AUTH_TOKEN" in done.stderr and "f" * 64 not in done.stderr and "Traceback" not in done.stderr


def test_a_run_says_the_same(head: Head, tmp_path: Path) -> None:
    run = ["tofu", *TINY.split(), "--output", str(tmp_path / "r"), "--address", head.address]
    done = soul(head, *run, RAY_AUTH_TOKEN="f" * 64)
    assert done.returncode == BAD_INPUT and done.stderr.splitlines()[-1].startswith("error: authentication: ")


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_stopped_job_goes_on_where_it_was(head: Head, tmp_path: Path) -> None:
    stopped, whole, cache = tmp_path / "stopped", tmp_path / "whole", tmp_path / "cache"
    command = words(stopped, *LONG.split(), "--cache", str(cache))
    assert head.submit("first", *command, wait=False).returncode == 0
    wait_until(lambda: lines(stopped / "metrics.jsonl") >= 60 or head.job("first")["status"] == "FAILED", timeout_s=1200, every_s=1)
    assert head.ray("job", "stop", "first").returncode == 0
    assert head.ended("first")["status"] == "STOPPED", head.log("first")
    reached, models = lines(stopped / "metrics.jsonl"), stamps(cache / "models")
    assert models

    again = head.submit("second", *command)
    assert again.returncode == 0, again.stdout[-3000:]
    assert head.job("second")["status"] == "SUCCEEDED"
    log = head.log("second")
    assert "target model: made before" in log and "train target model" not in log
    assert stamps(cache / "models") == models

    other = head.submit("whole", *words(whole, *LONG.split(), "--cache", str(cache)))
    assert other.returncode == 0, other.stdout[-3000:]
    assert 60 <= reached < lines(whole / "metrics.jsonl"), "the job was over before it could be stopped"
    assert rows(stopped) == rows(whole)
    assert (stopped / "model" / "model.safetensors").read_bytes() == (whole / "model" / "model.safetensors").read_bytes()
    assert table(log) == table(head.log("whole")) and len(table(log)) == 3

    third = head.submit("third", *command)
    assert third.returncode == 0 and "done before" in head.log("third")
    for name in ("first", "second", "whole", "third"):
        print(f"== {name}: {head.job(name)['status']}, {reached} steps before the stop\n{head.log(name)}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "code", "says"), [("diverges", FAILURE, "failed: "), ("interrupted", INTERRUPTED, "interrupted. Continue")]
)
def test_a_failure_is_the_jobs_status_and_its_last_line(how: str, code: int, says: str, head: Head, tmp_path: Path) -> None:
    more = ["--learning-rate", "1e30"] if how == "diverges" else LONG.split()
    assert head.submit(how, *words(tmp_path / "run", *more), wait=False).returncode == 0
    if how == "interrupted":
        wait_until(lambda: lines(tmp_path / "run" / "metrics.jsonl") >= 20, timeout_s=400)
        for process in psutil.process_iter():
            if process.name().startswith("python") and f"{tmp_path}/run" in process.cmdline():
                process.send_signal(signal.SIGINT)
    job = head.ended(how)
    assert (job["status"], job["driver_exit_code"]) == ("FAILED", code)
    log = head.log(how)
    assert [line for line in log.splitlines() if line.startswith(says)] and "Traceback" not in log


def lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.is_file() else 0


def rows(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without the clock."""
    read = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in read]


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file below."""
    return {str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def table(log: str) -> list[str]:
    """The rows of the table, without the seconds that training took."""
    lines = log.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("────"))
    rows = lines[first + 1 : next(i for i, line in enumerate(lines) if line.startswith("↑ higher"))]
    return [re.sub(r"\s[0-9.]+\s(s|min|h)\s*$", "", row).rstrip() for row in rows]
