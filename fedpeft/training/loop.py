"""The local loop: a few optimiser steps on one client's data, from the round's global state.

Deterministic: which examples are seen and which dropout masks are drawn is a function of (run seed, client, round), the
number of CPU threads is part of the job, and the optimiser starts fresh every round (a client keeps nothing between
rounds, so it may miss some, or move to another machine).

Batches walk through seeded permutations of the client's examples. The walk continues from round to round: step s of
round t is step (t-1)*local_steps + s of one endless sequence, so every example is seen before any is seen again.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fedpeft.errors import FedPeftError
from fedpeft.prf import prf_int, torch_generator
from fedpeft_kernels.precision import compute_dtype

if TYPE_CHECKING:
    from fedpeft.adapters.attach import AttachedAdapter
    from fedpeft.data.encode import Encoded
    from fedpeft.job.schema import TrainSection

Progress = Callable[[int, int, float], None]
"""Called after each step with (steps done, steps in all, loss of the step). May raise to abandon the round."""


@dataclass(frozen=True)
class TrainResult:
    """Figures of one client's local training.

    Attributes:
        steps: optimiser steps taken.
        loss_first: training loss of the first step.
        loss_mean: mean training loss over the steps.
    """

    steps: int
    loss_first: float
    loss_mean: float

    def metrics(self) -> dict[str, float]:
        return {"train_loss_first": self.loss_first, "train_loss_mean": self.loss_mean, "steps": float(self.steps)}


def train_round(
    adapter: AttachedAdapter,
    data: Encoded,
    section: TrainSection,
    *,
    seed: int,
    client: str,
    round_number: int,
    rounds_total: int,
    precision: str = "fp32",
    progress: Progress | None = None,
) -> TrainResult:
    """Train ``adapter`` in place, from the values it holds, for one round.

    Args:
        adapter: adapter on its base; holds the round's starting state.
        data: the client's encoded training examples.
        section: ``[train]`` of the job.
        seed: the run's seed.
        client: the client's name.
        round_number: 1-based.
        rounds_total: rounds of the run, for the learning-rate schedule.
        precision: the job's ``model.precision``.
        progress: told after each step.

    Raises:
        FedPeftError: the loss stopped being finite, or the model has no gradient checkpointing.
    """
    parameters = list(adapter.parameters.values())
    device = parameters[0].device
    optimizer = _optimizer(section, parameters, learning_rate(section, round_number, rounds_total))
    batches = _batches(
        data, section, seed, client, first_batch=(round_number - 1) * section.local_steps * section.accumulate
    )
    losses: list[float] = []
    with _training_mode(adapter.model, section), _seeded(prf_int(seed, "dropout", client, round_number), device):
        for step in range(section.local_steps):
            optimizer.zero_grad(set_to_none=True)
            loss_sum = 0.0
            for _ in range(section.accumulate):
                batch = {k: v.to(device) for k, v in next(batches).items()}
                with _autocast(precision, device):
                    loss = adapter.model(**batch).loss
                (loss / section.accumulate).backward()
                loss_sum += loss.item()
            losses.append(loss_sum / section.accumulate)
            if not math.isfinite(losses[-1]):
                raise FedPeftError(
                    f"the training loss became {losses[-1]} in round {round_number}, step {step + 1}",
                    field="train.learning_rate",
                    value=section.learning_rate,
                    hint="lower it, or set train.max_grad_norm",
                )
            if section.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(parameters, section.max_grad_norm)
            optimizer.step()
            if progress:
                progress(step + 1, section.local_steps, losses[-1])
    return TrainResult(len(losses), losses[0], sum(losses) / len(losses))


@torch.no_grad()
def evaluate(
    model: Any, data: Encoded, *, batch_size: int = 32, threads: int = 1, precision: str = "fp32"
) -> dict[str, float]:
    """Loss and, for classification, accuracy on ``data``.

    The loss of a language model is the mean over tokens; the mean of a classifier is over examples. Both are sums over
    batches in a fixed order, so the figure does not depend on anything but model and data.

    Returns:
        ``{"loss", "count"}`` and ``"accuracy"`` for classification; ``count`` is tokens or examples.
    """
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    total = count = correct = 0.0
    with _threads(threads):
        for begin in range(0, len(data), batch_size):
            batch = {k: v[begin : begin + batch_size].to(device) for k, v in data.tensors.items()}
            with _autocast(precision, device):
                output = model(**batch)
            labels = batch["labels"]
            if labels.ndim == 2:
                weight = float((labels[:, 1:] != -100).sum())
            else:
                weight = float(len(labels))
                correct += float((output.logits.argmax(-1) == labels).sum())
            total += float(output.loss) * weight
            count += weight
    model.train(training)
    result = {"loss": total / max(count, 1.0), "count": count}
    if labels.ndim == 1:
        result["accuracy"] = correct / max(count, 1.0)
    return result


def learning_rate(section: TrainSection, round_number: int, rounds_total: int) -> float:
    """Learning rate of a round: linear warm-up over ``warmup_rounds``, then the schedule, which does not reach zero."""
    if round_number <= section.warmup_rounds:
        return section.learning_rate * round_number / (section.warmup_rounds + 1)
    if section.schedule == "constant":
        return section.learning_rate
    span = max(rounds_total - section.warmup_rounds, 1)
    done = (round_number - 1 - section.warmup_rounds) / span
    share = 1 - done if section.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return section.learning_rate * share


def _permutation(examples: int, epoch: int, seed: int, client: str) -> torch.Tensor:
    return torch.randperm(examples, generator=torch_generator(seed, "batch-order", client, epoch))


def _batches(
    data: Encoded, section: TrainSection, seed: int, client: str, first_batch: int
) -> Iterator[Mapping[str, torch.Tensor]]:
    examples, size = len(data), min(section.batch_size, len(data))
    epoch, order = -1, torch.empty(0, dtype=torch.long)
    position = first_batch * size
    while True:
        picks = []
        for at in range(position, position + size):
            if at // examples != epoch:
                epoch = at // examples
                order = _permutation(examples, epoch, seed, client)
            picks.append(int(order[at % examples]))
        position += size
        index = torch.tensor(picks)
        yield {k: v[index] for k, v in data.tensors.items()}


def _optimizer(section: TrainSection, parameters: list[torch.nn.Parameter], rate: float) -> torch.optim.Optimizer:
    if section.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=rate, momentum=section.momentum, weight_decay=section.weight_decay)
    kind = torch.optim.AdamW if section.optimizer == "adamw" else torch.optim.Adam
    return kind(parameters, lr=rate, weight_decay=section.weight_decay)


@contextlib.contextmanager
def _training_mode(model: Any, section: TrainSection) -> Iterator[None]:
    if section.gradient_checkpointing:
        try:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        except ValueError as error:
            raise FedPeftError(
                f"the base model cannot do it: {str(error).rstrip('.')}",
                field="train.gradient_checkpointing",
                value=True,
                hint="leave it out",
            ) from error
    model.train()
    try:
        with _threads(section.threads):
            yield
    finally:
        if section.gradient_checkpointing:
            model.gradient_checkpointing_disable()
        model.eval()


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's global generator, which dropout draws from, seeded for this block only."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def _autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    dtype = compute_dtype(precision, device)
    return torch.autocast(device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext()
