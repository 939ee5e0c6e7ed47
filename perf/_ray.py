"""Part (d): the same job under Ray Train, fed by Ray Data, and as a bare loop with the local feed: seconds a step, start-up apart.

Each run is a fresh start: the bare loop in processes of its own (for two workers joined by gloo, or nccl on GPUs), Ray in a cluster of
its own that is gone before the next bare run. Both are watched from outside, through the metrics.jsonl that they write a line of after
each step: seconds a step are the time between two lines, and so hold the feed, the step and everything that runs beside them.
"""

from __future__ import annotations

import importlib.util
import json
import multiprocessing as mp
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from perf._measure import Comparison, compare
from perf._workload import SPLITS, Workload
from soul.data.store import finish_store, write_part
from soul.device import num_gpus_here
from soul.models.load import save_model
from soul.objectives.methods import GradDiff
from soul.optim.configs import AdamWConfig
from soul.train.config import TrainConfig
from soul.train.engine import EngineConfig
from soul.train.engines import make_engine
from soul.train.job import TrainJob, run_job

WARM_UP = 20  # steps before the clock starts: Ray Data's first block
STEPS_PER_ASKED = 5  # a step costs the same as in the other parts, a run much more
POLL_S = 0.005


@dataclass(frozen=True, slots=True)
class Timed:
    """Seconds until the first step was done, per step once warm, and what of these the loop itself counts: all but the wait for rows."""

    start_up: float
    per_step: float
    in_loop: float


def make_job(workload: Workload, folder: Path, *, workers: int, steps: int) -> TrainJob:
    """GradDiff with AdamW, one checkpoint at the end."""
    save_model(folder / "model", workload.build_model().cpu(), workload.tokenizer)
    for split in SPLITS:
        write_part(folder / split / "part-00000.arrow", ((row.ids, row.num_prompt) for row in workload.rows[split]))
        finish_store(folder / split)
    return TrainJob(
        model=str(folder / "model"),
        export=str(folder / "export"),
        run_dir=str(folder / "run"),
        method=GradDiff(),
        optimizer=AdamWConfig(),
        train=TrainConfig(
            epochs=10**6,
            max_steps=steps,
            batch_size=workload.batch_size * workers,
            micro_batch_size=workload.micro_batch_size,
            eval_every=0,
        ),
        engine=EngineConfig(
            name="single" if workers == 1 else "ddp", num_workers=workers, precision="bf16" if workload.precision == "bf16" else "fp32"
        ).decided("cpu" if workers > num_gpus_here() else "gpu"),
        stores={split: (str(folder / split),) for split in SPLITS},
    )


@contextmanager
def watched(metrics: Path, *, steps: int) -> Iterator[list[float]]:
    """While open, note when each line of `metrics` appears; afterwards there is one time per step."""
    times: list[float] = []
    ended = threading.Event()

    def poll() -> None:
        while not ended.is_set() and len(times) < steps:
            now = time.perf_counter()
            lines = metrics.read_bytes().count(b"\n") if metrics.is_file() else 0
            times.extend([now] * (lines - len(times)))
            ended.wait(POLL_S)

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield times
    finally:
        thread.join(timeout=5)
        ended.set()


def bare_rank(rank: int, job: TrainJob, port: int) -> None:
    """One process of the bare loop."""
    torch.set_num_threads(1)
    world = job.engine.num_workers
    if world > 1:
        os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
        dist.init_process_group("nccl" if job.engine.device == "gpu" else "gloo", rank=rank, world_size=world)
    engine = make_engine(job.engine, rank=rank, world=world, local_rank=rank)
    run_job(job, engine, resume_from=None, save_checkpoint=lambda *_: None)
    if world > 1:
        dist.destroy_process_group()


def run_bare(job: TrainJob) -> None:
    context = mp.get_context("spawn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    ranks = [context.Process(target=bare_rank, args=(rank, job, port)) for rank in range(job.engine.num_workers)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    if any(process.exitcode for process in ranks):
        raise RuntimeError(f"the bare loop's processes ended with {[process.exitcode for process in ranks]}")


def run_on_ray(job: TrainJob) -> None:
    from soul.orchestration.cluster import cluster
    from soul.orchestration.train import fit

    with cluster(None, num_workers=job.engine.num_workers, device=job.engine.device, verbose=False):
        fit(job, name="perf")


def timed(workload: Workload, how: Callable[[TrainJob], None], *, workers: int, steps: int) -> Timed:
    with tempfile.TemporaryDirectory(prefix="soul-perf-") as name:
        job = make_job(workload, Path(name), workers=workers, steps=WARM_UP + steps)
        started = time.perf_counter()
        with watched(Path(job.run_dir) / "metrics.jsonl", steps=WARM_UP + steps) as times:
            how(job)
        assert len(times) == WARM_UP + steps, f"expected {WARM_UP + steps} steps, saw {len(times)}"
        rows = [json.loads(line) for line in (Path(job.run_dir) / "metrics.jsonl").read_text().splitlines()]
        in_loop = (rows[-1]["seconds"] - rows[WARM_UP - 1]["seconds"]) / steps
        return Timed(times[0] - started, (times[-1] - times[WARM_UP - 1]) / steps, in_loop)


def compare_with_ray(workload: Workload, *, rounds: int, steps: int) -> list[Comparison]:
    """Empty, with a line saying so, where Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        print("(d) needs ray, which is not installed here")
        return []
    found = []
    for workers in (1, 2):
        if workers > max(torch.cuda.device_count(), os.cpu_count() or 1) or workload.batch_size * workers > len(workload.rows["forget"]):
            print(f"(d) with {workers} workers left out: too few processors, or fewer rows than a step takes")
            continue
        sides: dict[str, list[Timed]] = {"Ray": [], "bare": []}
        for number in range(rounds):
            pair = [("bare", run_bare), ("Ray", run_on_ray)]
            for name, how in pair if number % 2 == 0 else reversed(pair):
                sides[name].append(timed(workload, how, workers=workers, steps=STEPS_PER_ASKED * steps))
        label = f"{workers} worker{'s, ddp' if workers > 1 else ''}"
        for field, what, aim in (
            ("per_step", "seconds a step", 1.05),
            ("in_loop", "of it in the loop", None),
            ("start_up", "start-up", None),
        ):
            above, below = ((name, [getattr(run, field) for run in sides[name]]) for name in ("Ray", "bare"))
            found.append(compare("d", f"{label}, {what}", above, below, unit="s", aim=aim))
    return found
