"""Settings of a server: what may be asked of it, where it listens, how many replicas do the work."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from soul.device import Device, Wanted
from soul.serving.policy import Policy
from soul.store import is_uri

ModelId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}$")]
Count = Annotated[int, Field(ge=1, strict=True)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
EngineKind = Literal["auto", "transformers", "vllm"]
LOOPBACK: Final = ("127.0.0.1", "localhost", "::1")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """What one loaded model may use. `max_models`: how many share a replica's `num_gpus` GPUs."""

    kind: EngineKind = "auto"
    max_rows: int = 32
    max_batch_tokens: int = 65_536
    max_top: int = 20
    max_models: int = 1
    num_gpus: float = 0.0
    device: Device = "cpu"


class Limits(_Section):
    """Per request, and (`max_rows`, `max_batch_tokens`, `max_requests`) per replica."""

    max_body_bytes: Count = 2**20
    max_prompts: Count = 64
    max_choices: Count = 8
    max_new_tokens: Count = 1024
    default_new_tokens: Count = 256
    max_stops: Count = 4
    max_top: Count = 20
    timeout_s: Seconds = 120.0
    max_rows: Count = 32
    max_batch_tokens: Count = 65_536
    max_requests: Count = 64

    @model_validator(mode="after")
    def _ordered(self) -> Limits:
        if self.default_new_tokens > self.max_new_tokens:
            raise ValueError(f"default_new_tokens ({self.default_new_tokens}) must not exceed max_new_tokens ({self.max_new_tokens})")
        return self


class Replicas(_Section):
    """`maximum` above `minimum` lets Serve add replicas while each has more than `target_requests` in flight.

    `gateways`: processes with the routes. Two keep answering while one is replaced or lost.
    `engine`: what runs the models; auto is vLLM on a GPU where it is installed, else transformers. `device`: auto is a GPU where the
    cluster has or can add some. `num_gpus`: of one replica (null: 1 on GPUs).
    """

    engine: EngineKind = "auto"
    gateways: Count = 1
    minimum: Count = 1
    maximum: Count = 1
    target_requests: Annotated[float, Field(gt=0)] = 8.0
    num_cpus: Annotated[float, Field(ge=0)] = 0.5
    device: Wanted = "auto"
    num_gpus: Annotated[float, Field(ge=0)] | None = None
    max_models: Count = 4
    drain_s: Seconds = 30.0

    @model_validator(mode="after")
    def _ordered(self) -> Replicas:
        if self.maximum < self.minimum:
            raise ValueError(f"replicas.maximum ({self.maximum}) must be at least replicas.minimum ({self.minimum})")
        if (self.device == "gpu" and self.num_gpus == 0) or (self.device == "cpu" and self.num_gpus):
            raise ValueError(f"replicas.num_gpus ({self.num_gpus:g}) does not go with replicas.device {self.device}")
        return self

    @property
    def wants(self) -> Wanted:
        """A number of GPUs says what device is meant."""
        if self.device != "auto" or self.num_gpus is None:
            return self.device
        return "gpu" if self.num_gpus else "cpu"

    def decided(self, device: Device) -> Replicas:
        """With the driver's decision in place of auto: on GPUs each replica has one of its own, unless told otherwise."""
        default = 1.0 if device == "gpu" else 0.0
        return self.model_copy(update={"device": device, "num_gpus": default if self.num_gpus is None else self.num_gpus})


class Hosting(_Section):
    """What is served: this part can change while the server runs. `runs`: model id -> run directory. `aliases`: name -> model id."""

    runs: dict[ModelId, str] = Field(default_factory=dict)
    aliases: dict[ModelId, ModelId] = Field(default_factory=dict)
    policy: Policy = Field(default_factory=Policy)
    allow_unevaluated: bool = False

    @model_validator(mode="after")
    def _names(self) -> Hosting:
        both = sorted(self.runs.keys() & self.aliases.keys())
        if both:
            raise ValueError(f"{', '.join(both)}: a run and an alias cannot share a name")
        doubled = [name for name in [*self.runs, *self.aliases, *self.aliases.values()] if ".." in name]
        if doubled:
            raise ValueError(f"{', '.join(doubled)}: a model id cannot hold two dots in a row")
        return self


class ServeConfig(_Section):
    """`watch`: a YAML file whose runs, aliases and policy are read again when it changes."""

    hosting: Hosting = Field(default_factory=Hosting)
    watch: str | None = None
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65_535, strict=True)] = 8000
    limits: Limits = Field(default_factory=Limits)
    replicas: Replicas = Field(default_factory=Replicas)
    key_hashes: tuple[Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")], ...] = ()

    @model_validator(mode="after")
    def _keys_off_loopback(self) -> ServeConfig:
        if not self.on_loopback and not self.key_hashes:
            raise ValueError(
                f"host {self.host} can be reached from other machines, and there is no API key. Set SOUL_API_KEYS or --api-key-file, "
                "or keep to 127.0.0.1."
            )
        return self

    @property
    def on_loopback(self) -> bool:
        return self.host in LOOPBACK

    @property
    def engine_settings(self) -> EngineSettings:
        limits, size = self.limits, self.replicas
        assert size.device != "auto" and size.num_gpus is not None, "the driver decides: ServeConfig.decided"
        rows, tokens, top = limits.max_rows, limits.max_batch_tokens, limits.max_top
        return EngineSettings(size.engine, rows, tokens, top, size.max_models, size.num_gpus, size.device)

    def decided(self, device: Device) -> ServeConfig:
        """As `Replicas.decided`."""
        return self.model_copy(update={"replicas": self.replicas.decided(device)})

    @property
    def max_in_flight(self) -> int:
        """Requests that a gateway lets in at a time."""
        return self.limits.max_requests * self.replicas.maximum


def located(config: ServeConfig, file: str | None) -> ServeConfig:
    """Run directories that a config file names are relative to its own folder."""
    if file is None:
        return config
    base = Path(file).resolve().parent
    given = config.hosting.runs.items()
    runs = {name: folder if is_uri(folder) else str((base / Path(folder).expanduser()).resolve()) for name, folder in given}
    return config.model_copy(update={"hosting": config.hosting.model_copy(update={"runs": runs})})


def model_id_of(folder: Path) -> str:
    """The id that a run directory gets when none is given."""
    return folder.resolve().name
