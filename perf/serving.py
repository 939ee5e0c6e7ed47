"""The server under load: tokens per second against a raw batched loop, then steady requests through an alias update and a SIGKILL.

    python perf/serving.py RUN [RUN] [--seconds 45] [--output FILE]

RUN is a run directory; its models are hosted whatever the gate says. With two, the alias moves from the first to the second.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil
import requests
import torch
import yaml

from soul.data.chat import ChatFormat
from soul.data.fictitious import fictitious_splits
from soul.evaluate.generate import generate_batch, stop_ids
from soul.models.load import load_model, load_tokenizer
from soul.orchestration import serve
from soul.orchestration.cluster import cluster
from soul.serving.gate import Hashes, read_catalogue
from soul.serving.settings import ServeConfig
from soul.settings import load_settings

PORT: Final = 8765
URL: Final = f"http://127.0.0.1:{PORT}/v1/completions"
BATCH: Final = 32
NEW_TOKENS: Final = 64
REPEATS: Final = 5


@dataclass
class Load:
    """Clients that ask one after the other until told to stop; every answer is (seconds since the start, seconds taken, status)."""

    prompts: Sequence[list[int]]
    num_clients: int
    pause_s: float
    answers: list[tuple[float, float, int]] = field(default_factory=list)
    models: list[str] = field(default_factory=list)
    started: float = 0.0

    def run(self, seconds: float) -> None:
        self.started = time.monotonic()
        with ThreadPoolExecutor(self.num_clients) as pool:
            list(pool.map(self._client, range(self.num_clients), [self.started + seconds] * self.num_clients))

    def _client(self, number: int, end: float) -> None:
        session = requests.Session()
        turn = number
        while time.monotonic() < end:
            body: Any = {"model": "production", "prompt": self.prompts[turn % len(self.prompts)], "max_tokens": 24, "temperature": 0}
            begun = time.monotonic()
            try:
                reply = session.post(URL, json=body, timeout=60)
                status = reply.status_code
                self.models.append(reply.json().get("model", ""))
            except requests.RequestException:
                status = 0
            self.answers.append((begun - self.started, time.monotonic() - begun, status))
            turn += self.num_clients
            time.sleep(self.pause_s)


def throughput(folder: Path, prompts: Sequence[list[int]]) -> dict[str, float]:
    """Tokens per second, taken in turn: the raw loop, one request with the same batch, as many requests with one prompt each."""
    torch.set_num_threads(1)
    model, tokenizer = load_model(str(folder)).eval(), load_tokenizer(str(folder))
    batch = list(prompts[:BATCH])
    eos_ids = stop_ids(model.generation_config, tokenizer)
    session = requests.Session()

    def raw() -> int:
        rows = generate_batch(model, batch, pad_id=0, eos_ids=eos_ids, max_new_tokens=NEW_TOKENS, device=torch.device("cpu"))
        return sum(map(len, rows))

    def ask(prompt: Any) -> int:
        body = {"model": "production", "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0}
        reply = (session if isinstance(prompt[0], list) else requests).post(URL, json=body, timeout=120)
        reply.raise_for_status()
        return int(reply.json()["usage"]["completion_tokens"])

    def singly() -> int:
        with ThreadPoolExecutor(BATCH) as pool:
            return sum(pool.map(ask, batch))

    ways: dict[str, Callable[[], int]] = {"raw batched generate": raw, "one request": lambda: ask(batch), f"{BATCH} requests": singly}
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(REPEATS + 1):
        for name, way in ways.items():
            begun = time.perf_counter()
            tokens = way()
            if turn:  # the first turn warms up
                speeds[name].append(tokens / (time.perf_counter() - begun))
    return {name: statistics.median(values) for name, values in speeds.items()}


def kill_a_replica() -> int:
    """SIGKILL one of this script's own replicas."""
    mine = psutil.Process().children(recursive=True)
    victim = next(process for process in mine if "Generator" in " ".join(process.cmdline()))
    os.kill(victim.pid, signal.SIGKILL)
    return int(victim.pid)


def summary(answers: Sequence[tuple[float, float, int]], since: float, until: float) -> dict[str, float]:
    taken = sorted(seconds for begun, seconds, _ in answers if since <= begun < until)
    failed = sum(status != 200 for begun, _, status in answers if since <= begun < until)
    if not taken:
        return {"requests": 0, "failed": failed}
    p99 = taken[min(len(taken) - 1, int(0.99 * len(taken)))]
    return {"requests": len(taken), "failed": failed, "p50_ms": round(1000 * statistics.median(taken), 1), "p99_ms": round(1000 * p99, 1)}


def write_hosting(file: Path, runs: dict[str, str], production: str) -> None:
    document = {"hosting": {"runs": runs, "aliases": {"production": production}, "allow_unevaluated": True}}
    document |= {"replicas": {"minimum": 2, "maximum": 2, "num_cpus": 0.5}}
    staging = file.with_suffix(".new")
    staging.write_text(yaml.safe_dump(document))
    os.replace(staging, file)


def under_load(file: Path, runs: dict[str, str], prompts: Sequence[list[int]], seconds: float) -> dict[str, Any]:
    """Thirds: undisturbed, an alias update at the start of the second, a SIGKILL at the start of the third."""
    load = Load(prompts, num_clients=4, pause_s=0.05)
    first, *_, last = [*runs, *runs]
    third = seconds / 3
    timers = [threading.Timer(third, write_hosting, (file, runs, last)), threading.Timer(2 * third, kill_a_replica)]
    for timer in timers:
        timer.start()
    load.run(seconds)
    phases = {"before": (0, third), "after the update": (third, 2 * third), "after the SIGKILL": (2 * third, seconds)}
    told: dict[str, Any] = {name: summary(load.answers, *span) for name, span in phases.items()}
    told["statuses"] = {
        str(status): sum(found == status for _, _, found in load.answers) for status in {found for _, _, found in load.answers}
    }
    told["answered by"] = {name: load.models.count(name) for name in dict.fromkeys([first, last])}
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--seconds", type=float, default=45, help="length of the load test [default: 45]")
    parser.add_argument("--output", metavar="FILE", help="also write the result here, as JSON")
    given = parser.parse_args()
    runs = {Path(run).resolve().name: str(Path(run).resolve()) for run in given.runs}
    folder = Path(given.runs[0]) / "model"
    tokenizer: Any = load_tokenizer(str(folder))
    prompts = [ChatFormat().prompt_ids(record.prompt, tokenizer) for record in fictitious_splits(40)["forget05"]]
    with tempfile.TemporaryDirectory() as temporary, cluster(None, num_workers=1, device="auto", verbose=False) as device:
        file = Path(temporary) / "serving.yaml"
        write_hosting(file, runs, next(iter(runs)))
        config = load_settings(ServeConfig, file, {"port": PORT, "watch": str(file)}).decided(device)
        serve.start(config, read_catalogue(config.hosting, on_loopback=True, hashes=Hashes()))
        speeds = throughput(folder, prompts)
        result = {
            "tokens_per_s": {name: round(speed) for name, speed in speeds.items()},
            "load": under_load(file, runs, prompts, given.seconds),
        }
        serve.stop()
    print(json.dumps(result, indent=2))
    if given.output is not None:
        Path(given.output).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
