"""Deltas in memory for the aggregation tests, and the float64 numpy reference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch


class MemoryDelta:
    """A delta whose chunks share one buffer, as a file reader's do."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]):
        self.tensors = dict(tensors)

    def names(self) -> Sequence[str]:
        return sorted(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def chunks(self, name: str, elements: int) -> Iterator[torch.Tensor]:
        flat = self.tensors[name].reshape(-1)
        buffer = torch.empty(min(elements, flat.numel()), dtype=flat.dtype)
        for begin in range(0, flat.numel(), elements):
            piece = flat[begin : begin + elements]
            yield buffer[: piece.numel()].copy_(piece)
        buffer.fill_(float("nan"))

    def tensor(self, name: str) -> torch.Tensor:
        return self.tensors[name].float()


@dataclass(frozen=True)
class Pair:
    module: str
    a: str
    b: str
    scale: float


@dataclass(frozen=True)
class Shape:
    shapes: dict[str, tuple[int, ...]]
    pairs: tuple[Pair, ...] = ()


def random_delta(
    shapes: Mapping[str, tuple[int, ...]], seed: int, size: float = 1e-2, dtype: torch.dtype = torch.float32
) -> MemoryDelta:
    generator = torch.Generator().manual_seed(seed)
    return MemoryDelta(
        {name: (torch.randn(shape, generator=generator) * size).to(dtype) for name, shape in shapes.items()}
    )


def numpy_mean(deltas: Sequence[MemoryDelta], weights: Sequence[int], name: str) -> np.ndarray:
    values = np.stack([d.tensor(name).double().numpy() for d in deltas])
    return np.tensordot(np.asarray(weights, np.float64), values, 1) / sum(weights)
