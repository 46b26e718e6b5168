"""What a participant does: hold the base model, train the adapter from a given state, hand over the difference.

A participant is *resident*: base model and adapter stay loaded while states and data come and go. An agent has one per
job; the simulator uses one for many clients in turn. Nothing of one client's round is left behind for the next, since
every round begins by writing the complete global state and a fresh optimiser.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fedpeft.adapters.attach import State, attach
from fedpeft.adapters.delta import content_address, difference, pack
from fedpeft.adapters.fingerprint import base_fingerprint
from fedpeft.adapters.manifest import manifest_for
from fedpeft.adapters.peft_folder import read_peft_folder
from fedpeft.adapters.spec import AdapterSpec
from fedpeft.data.encode import Encoded, encode
from fedpeft.errors import FedPeftError
from fedpeft.models import LoadedBase, load_base
from fedpeft.training.loop import Progress, evaluate, train_round

if TYPE_CHECKING:
    from fedpeft.data.records import Record
    from fedpeft.job.schema import Job, TrainSection


@dataclass(frozen=True)
class ClientUpdate:
    """One client's contribution to one round.

    Attributes:
        payload: the packed delta.
        digest: its content address.
        weight: the client's weight in the mean.
        metrics: figures of the local training.
    """

    payload: bytes
    digest: str
    weight: int
    metrics: Mapping[str, float]


class Participant:
    """Base model and adapter of one job, loaded once.

    Raises:
        FedPeftError: the base cannot be loaded, its fingerprint is not the job's, or the adapter does not fit it.
    """

    def __init__(self, job: Job, *, base: LoadedBase | None = None, device: str = "cpu"):
        self.job = job
        self.base = base or load_base(job.model.base, job.data.task, job.model.num_labels)
        self.fingerprint = base_fingerprint(self.base.model.state_dict())
        if job.model.fingerprint not in (None, self.fingerprint):
            raise FedPeftError(
                f"the base model here has fingerprint {self.fingerprint[:16]}..., the job expects "
                f"{str(job.model.fingerprint)[:16]}...",
                field="model.fingerprint",
                hint="every participant needs the same base model files",
            )
        self.adapter = attach(
            self.base.model,
            job.adapter,
            seed=job.seed,
            task=job.data.task,
            fingerprint=self.fingerprint,
            base_name=job.model.base,
        )
        self._first_values = self.adapter.read()
        self.adapter.model.to(device)

    @property
    def spec(self) -> AdapterSpec:
        return self.adapter.spec

    def initial_state(self) -> State:
        """The state before round 1: that of the job's PEFT folder, or the seeded start, which equals the base."""
        if self.job.adapter.start_from is not None:
            return read_peft_folder(Path(self.job.adapter.start_from).expanduser(), self.spec, self.job.seed)
        return {name: value.clone() for name, value in self._first_values.items()}

    def encode(self, records: Sequence[Record]) -> Encoded:
        """Training or held-out examples as tensors."""
        return encode(records, self.job.data.task, self.base, self.job.data.max_length)

    def train(
        self,
        client: str,
        data: Encoded,
        state: Mapping[str, torch.Tensor],
        *,
        run_id: str,
        round_number: int,
        start_digest: str,
        progress: Progress | None = None,
    ) -> ClientUpdate:
        """One round of local training from ``state``; returns the packed difference."""
        trained, metrics = self.train_state(client, data, state, round_number=round_number, progress=progress)
        weight = len(data) if self.job.aggregation.weights == "examples" else 1
        manifest = manifest_for(
            self.spec,
            run_id=run_id,
            round=round_number,
            client=client,
            start_state=start_digest,
            codec=self.job.adapter.codec,
            example_count=len(data),
            weight=weight,
            metrics=metrics,
        )
        payload = pack(difference(trained, state), manifest)
        return ClientUpdate(payload, content_address(payload), weight, metrics)

    def train_state(
        self,
        client: str,
        data: Encoded,
        state: Mapping[str, torch.Tensor],
        *,
        round_number: int,
        section: TrainSection | None = None,
        progress: Progress | None = None,
    ) -> tuple[State, dict[str, float]]:
        """The trained tensors themselves and the figures of the training.

        ``section`` replaces the job's ``[train]``, for baselines.
        """
        self.adapter.write(state)
        result = train_round(
            self.adapter,
            data,
            section or self.job.train,
            seed=self.job.seed,
            client=client,
            round_number=round_number,
            rounds_total=self.job.aggregation.rounds,
            precision=self.job.model.precision,
            progress=progress,
        )
        return self.adapter.read(), result.metrics()

    def evaluate(self, data: Encoded, state: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Loss (and accuracy) of the base with ``state`` on ``data``."""
        self.adapter.write(state)
        if (limit := self.job.evaluation.max_examples) is not None:
            data = Encoded({name: tensor[:limit] for name, tensor in data.tensors.items()})
        return evaluate(self.adapter.model, data, threads=self.job.train.threads, precision=self.job.model.precision)
