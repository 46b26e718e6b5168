"""The schema of the job file.

One schema for simulation and deployment: what a researcher compared on one machine is what the daemon runs. Every key
has a type, a default where one is safe, and a sentence that ``fedpeft job schema`` publishes. Unknown keys are errors.
A value that this version cannot honour is refused here, before anything is started, rather than ignored: a job that
asks for a privacy mode must never run without it.

The loader in :mod:`fedpeft.job.loading` turns validation failures into one-line errors.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from fedpeft.adapters.kinds.registry import kind_names
from fedpeft.aggregation.rules.registry import rule_names
from fedpeft.errors import nearest

PositiveInt = Annotated[int, Field(ge=1)]


def _one_of(value: str, known: list[str], what: str) -> str:
    if value in known:
        return value
    guess = nearest(value, known)
    raise ValueError(
        f"{what} {value!r} is not available"
        + (f"; did you mean {guess!r}?" if guess else f"; known: {', '.join(known)}")
    )


class Section(BaseModel):
    """A table of the job file: immutable, and strict about unknown keys and about types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ModelSection(Section):
    """The frozen base model. It never travels; every participant has its own copy with the same fingerprint."""

    base: str = Field(
        description="A built-in workload ('builtin:tiny-code-lm'), a local folder, or a hub id.", min_length=1
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="Precision of the base model's matrix products; adapters are always fp32. 'bf16' needs hardware "
        "support (CUDA, or a CPU with AVX512-BF16 or AMX).",
    )
    fingerprint: str | None = Field(
        None,
        description="Expected SHA-256 fingerprint of the base model; a participant whose base differs declines.",
        pattern="^[0-9a-f]{64}$",
    )
    num_labels: PositiveInt | None = Field(None, description="Number of classes, for a classification head to be made.")


class PartitionSection(Section):
    """How a simulation splits the data over clients. A deployed client uses its own data and ignores this."""

    by: Literal["natural", "iid", "dirichlet", "quantity", "label-shard", "feature-shift"] = Field(
        "natural", description="natural owners, or a synthetic split."
    )
    alpha: float = Field(0.5, gt=0, description="Concentration of 'dirichlet' and 'quantity'; smaller is less alike.")
    shards: PositiveInt = Field(2, description="Label shards per client for 'label-shard'.")


class DataSection(Section):
    """Training data. On a deployed client its own ``client.toml`` decides where the data is."""

    source: str = Field(
        description="'builtin:stdlib', 'builtin:digits', a folder of JSONL / Parquet / text / images (one sub-folder "
        "per client), or a `datasets` id.",
        min_length=1,
    )
    task: Literal["causal-lm", "sequence-classification", "image-classification"]
    partition: PartitionSection = PartitionSection()
    max_length: PositiveInt = Field(128, description="Tokens per example for text tasks.")


class AdapterSection(Section):
    """What is trained and exchanged."""

    kind: str = Field(description="Adapter kind: 'ffa-lora' (A frozen and seeded, only B travels) or 'lora'.")
    rank: Annotated[int, Field(ge=1, le=16384)] = Field(8, description="Rank r of every low-rank pair.")
    alpha: float = Field(16.0, gt=0, description="LoRA alpha; the update is scaled by alpha / rank.")
    rank_stabilised: bool = Field(False, description="Scale by alpha / sqrt(rank) instead (rsLoRA).")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapter's input.")
    target_modules: str | list[str] = Field(
        "all-linear",
        description="'all-linear', or names (suffixes) of the modules to adapt, or one regular expression.",
    )
    orthonormal: bool = Field(
        False, description="Give the seeded A orthonormal rows, so that the norm of B is the norm of the update."
    )
    train_head: bool = Field(
        False, description="Also train and exchange the classification head (a full copy of it travels)."
    )
    codec: Literal["fp32", "bf16"] = Field("fp32", description="Number format of deltas on the wire.")
    start_from: str | None = Field(
        None, description="A PEFT adapter folder at the coordinator to start from, instead of the seeded start."
    )

    @field_validator("kind")
    @classmethod
    def _known_kind(cls, value: str) -> str:
        return _one_of(value, kind_names(), "adapter kind")

    @field_validator("alpha", "dropout", mode="before")
    @classmethod
    def _integers_are_numbers(cls, value: Any) -> Any:
        return float(value) if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("target_modules")
    @classmethod
    def _some_target(cls, value: str | list[str]) -> str | list[str]:
        if not value:
            raise ValueError("name at least one module, or 'all-linear'")
        return value

    @property
    def scale(self) -> float:
        """Factor in front of B A."""
        return self.alpha / (self.rank**0.5 if self.rank_stabilised else self.rank)


class ClientsSection(Section):
    """Who takes part in a round."""

    count: PositiveInt | None = Field(None, description="Number of clients; simulation only.")
    per_round: PositiveInt | None = Field(
        None, description="Clients per round, a fixed number chosen by PRF. Default: every client."
    )
    sample_rate: float | None = Field(
        None, gt=0, le=1, description="Instead of per_round: each client takes part with this probability (Poisson)."
    )
    min_to_commit: PositiveInt | None = Field(
        None, description="Deltas needed to commit a round at its deadline. Default: all that were selected."
    )
    deadline_s: float = Field(600.0, gt=0, description="Seconds after which a round stops waiting for a client.")

    @field_validator("deadline_s", "sample_rate", mode="before")
    @classmethod
    def _integers_are_numbers(cls, value: Any) -> Any:
        return float(value) if isinstance(value, int) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.per_round is not None and self.sample_rate is not None:
            raise ValueError("give per_round (fixed number) or sample_rate (Poisson), not both")
        if self.per_round is not None and self.min_to_commit is not None and self.min_to_commit > self.per_round:
            raise ValueError(f"min_to_commit = {self.min_to_commit} is more than per_round = {self.per_round}")
        if self.per_round is not None and self.count is not None and self.per_round > self.count:
            raise ValueError(f"per_round = {self.per_round} is more than count = {self.count}")
        return self


class TrainSection(Section):
    """The local loop of one client in one round."""

    local_steps: PositiveInt = Field(10, description="Optimiser steps per round.")
    batch_size: PositiveInt = Field(16, description="Examples per forward pass.")
    accumulate: PositiveInt = Field(1, description="Forward passes per optimiser step (gradient accumulation).")
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    learning_rate: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    momentum: float = Field(0.0, ge=0, lt=1, description="Momentum of 'sgd'.")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="Learning rate over the rounds of the run (not within one round)."
    )
    warmup_rounds: int = Field(0, ge=0, description="Rounds over which the learning rate rises linearly.")
    max_grad_norm: float | None = Field(None, gt=0, description="Clip the gradient of each step to this norm.")
    gradient_checkpointing: bool = Field(False, description="Recompute activations instead of keeping them.")
    threads: PositiveInt = Field(
        1,
        description="CPU threads of the training step. Part of the job, because the order of float sums depends on it: "
        "the same number gives the same bytes in simulation and deployment.",
    )

    @field_validator("learning_rate", "weight_decay", "momentum", "max_grad_norm", mode="before")
    @classmethod
    def _integers_are_numbers(cls, value: Any) -> Any:
        return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


class AggregationSection(Section):
    """How accepted deltas become the next global state."""

    rule: str = Field("ffa", description="Aggregation rule; `fedpeft job schema` lists the rules of this version.")
    rounds: PositiveInt = Field(10, description="Rounds to run.")
    weights: Literal["examples", "equal"] = Field(
        "examples", description="Weight of a client: its number of training examples, or 1."
    )
    max_abs: float = Field(
        64.0,
        gt=0,
        le=2.0**20,
        description="Public bound on every entry of a delta; larger entries are refused. Sets the fixed-point scale.",
    )
    max_total_weight: Annotated[int, Field(ge=1, le=2**40)] = Field(
        2**24, description="Public bound on the sum of weights in a round. Sets the fixed-point scale."
    )
    robust: Literal["none"] = "none"
    server_optimizer: Literal["none"] = "none"

    @field_validator("max_abs", mode="before")
    @classmethod
    def _integers_are_numbers(cls, value: Any) -> Any:
        return float(value) if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("rule")
    @classmethod
    def _known_rule(cls, value: str) -> str:
        return _one_of(value, rule_names(), "aggregation rule")


class PrivacySection(Section):
    """The privacy guarantee of the run. This version offers none, and says so in every output."""

    mode: Literal["none"] = "none"


class UnlearningSection(Section):
    """What is kept so that a participant can be removed later."""

    retain: Literal["nothing", "deltas"] = Field(
        "deltas", description="Keep every accepted delta, or delete its payload once its round is committed."
    )


class AuditSection(Section):
    """Attacks on the finished run. This version offers none."""

    canaries: Literal[0] = 0
    attacks: list[str] = Field(default_factory=list, max_length=0)


class EvaluationSection(Section):
    """What is measured on each client's held-out data."""

    every: int = Field(
        0, ge=0, description="Also evaluate after every n-th round; 0 means before and after the run only."
    )
    max_examples: PositiveInt | None = Field(None, description="Use at most this many held-out examples per client.")
    baselines: list[Literal["local", "pooled"]] = Field(
        default_factory=lambda: ["local", "pooled"],  # type: ignore[arg-type]
        description="Simulation only: train each client alone, and one model on all data, for as many steps as the "
        "clients of a run take.",
    )


class Job(Section):
    """A run, completely described."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$", description="Name of the job; part of the run's id.")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(0, description="Seed of every random choice of the run.")
    model: ModelSection
    data: DataSection
    adapter: AdapterSection
    clients: ClientsSection = ClientsSection()
    train: TrainSection = TrainSection()
    aggregation: AggregationSection = AggregationSection()
    privacy: PrivacySection = PrivacySection()
    unlearning: UnlearningSection = UnlearningSection()
    audit: AuditSection = AuditSection()
    evaluation: EvaluationSection = EvaluationSection()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        from fedpeft.aggregation.rules.registry import get_rule

        rule = get_rule(self.aggregation.rule)
        if self.adapter.kind not in rule.adapter_kinds:
            raise ValueError(
                f"aggregation.rule {self.aggregation.rule!r} combines adapter kinds {', '.join(rule.adapter_kinds)}, "
                f"not {self.adapter.kind!r}"
            )
        if self.adapter.train_head and self.data.task == "causal-lm":
            raise ValueError("adapter.train_head is for classification tasks; a causal language model has no such head")
        if self.train.batch_size * self.train.accumulate > self.aggregation.max_total_weight:
            raise ValueError("aggregation.max_total_weight is smaller than one batch")
        return self
