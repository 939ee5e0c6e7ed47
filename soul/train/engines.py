"""Engines by name."""

from __future__ import annotations

from soul.device import seen
from soul.train.ddp import DDPEngine
from soul.train.deepspeed import DeepSpeedEngine
from soul.train.engine import Engine, EngineConfig
from soul.train.fsdp import FSDPEngine
from soul.train.single import SingleEngine

ENGINES: dict[str, type[SingleEngine | DDPEngine | FSDPEngine | DeepSpeedEngine]] = {
    "single": SingleEngine,
    "ddp": DDPEngine,
    "fsdp": FSDPEngine,
    "deepspeed": DeepSpeedEngine,
}


def make_engine(config: EngineConfig, *, rank: int, world: int, local_rank: int) -> Engine:
    """The engine of this rank, one of `world`; with more than one rank, or sharded, it joins the process group that exists already.

    A config that no driver has decided about (a script's, a test's, torchrun's) is decided by what this process sees.

    Raises:
        InputError: an engine of one process on several, or on a GPU that is not there.
    """
    decided = config.decided(seen()) if config.device == "auto" else config.decided(config.device)
    return ENGINES[config.name](decided, rank=rank, world=world, local_rank=local_rank)
