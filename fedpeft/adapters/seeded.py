"""Frozen tensors from a seed: the A of FFA-LoRA is regenerated everywhere and sent nowhere.

The values must be the same to the last bit on every platform, so nothing here touches a BLAS, a vectorised sum of
unspecified order, or a transcendental function:

- the raw stream is Philox keyed by the PRF of (run seed, ``"seeded-tensor"``, module name);
- an entry is an odd 25-bit integer scaled by a power of two (exact), times the bound, rounded once;
- orthonormal rows come from Gram-Schmidt (twice, for accuracy) in float64 with elementwise products and a summation
  tree that is written out, so that each operation is one IEEE-754 rounding.

Rows are drawn one after another, so the first r rows of a rank-R tensor *are* the rank-r tensor. Clients of unequal
rank share a nested A.

The plain form is U(-1/sqrt(n), 1/sqrt(n)), what PEFT draws for A (Kaiming uniform with a = sqrt(5)).

>>> import torch
>>> a = seeded_tensor(7, "layers.0.q_proj", (4, 16))
>>> torch.equal(a[:2], seeded_tensor(7, "layers.0.q_proj", (2, 16)))
True
>>> q = seeded_tensor(7, "layers.0.q_proj", (4, 16), orthonormal=True).double()
>>> torch.allclose(q @ q.T, torch.eye(4, dtype=torch.float64), atol=1e-6)
True
"""

from __future__ import annotations

import math

import numpy as np
import torch

from fedpeft.errors import JobError
from fedpeft.prf import philox


def seeded_tensor(seed: int, module: str, shape: tuple[int, int], *, orthonormal: bool = False) -> torch.Tensor:
    """The (r, n) float32 tensor of ``module`` under run seed ``seed``.

    Args:
        seed: the run's seed.
        module: name of the layer in the base model; the tensor depends on it and not on construction order.
        shape: ``(r, n)``.
        orthonormal: rows of unit length, mutually orthogonal, so that ``norm(B @ A) == norm(B)``.

    Raises:
        JobError: more orthonormal rows than columns were asked for.
    """
    rank, width = shape
    raw = philox(seed, "seeded-tensor", module).random_raw(rank * width)
    odd = (raw >> np.uint64(40)).astype(np.int64) * 2 + 1 - 2**24
    unit = odd.astype(np.float64).reshape(rank, width) * 2.0**-24
    if not orthonormal:
        return torch.from_numpy((unit * (1.0 / math.sqrt(width))).astype(np.float32))
    if rank > width:
        raise JobError(
            f"layer {module} has {width} inputs, too few for {rank} orthonormal rows",
            field="adapter.rank",
            value=rank,
            hint="lower the rank, leave the layer out of target_modules, or set adapter.orthonormal = false",
        )
    return torch.from_numpy(_orthonormal_rows(unit).astype(np.float32))


def _orthonormal_rows(rows: np.ndarray) -> np.ndarray:
    basis = np.empty_like(rows)
    for i, row in enumerate(rows):
        for _ in range(2):
            for j in range(i):
                row = row - _tree_sum(row * basis[j]) * basis[j]
        basis[i] = row / math.sqrt(_tree_sum(row * row))
    return basis


def _tree_sum(values: np.ndarray) -> float:
    """Sum by halving: the order is fixed here and not by the library's vector width."""
    size = 1 << (len(values) - 1).bit_length()
    padded = np.zeros(size)
    padded[: len(values)] = values
    while size > 1:
        size //= 2
        padded = padded[:size] + padded[size:]
    return float(padded[0])
