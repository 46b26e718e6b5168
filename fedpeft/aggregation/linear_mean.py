"""The linear-mean primitive: ``new = start + (sum_k w_k delta_k) / (sum_k w_k)`` over a whole state.

Deltas are folded in as they come and forgotten, so memory is one accumulator, a few blocks and, at the end, the new
state. The last step is ``float32(float64(start) + mean)`` elementwise, which IEEE arithmetic fixes: the same bytes
everywhere.

Two accumulators serve it. :class:`~fedpeft.aggregation.fixed_point.FixedPointAccumulator` is the default and the one
that reproducibility, resumption and exact removal rest on. :class:`FloatAccumulator` is a plain float32 sum: half the
memory, more speed, and a result whose last bits depend on the order of arrival. It is there for benchmarks,
and for runs that need none of those promises.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import numpy as np
import torch

from fedpeft.aggregation import fused
from fedpeft.aggregation.fixed_point import (
    CHUNK,
    COMMIT_BLOCK,
    FixedPointAccumulator,
    FixedPointSpec,
    check_block,
    check_layout,
    check_weight,
    commit_chunks,
    refuse_piece,
)
from fedpeft.aggregation.protocols import TensorReader
from fedpeft.errors import DeltaRefused, FedPeftError

FLOAT_BLOCK = 131_072  # elements: 512 KiB of float32 and as much of the sum, in the core's cache


class Accumulator(Protocol):
    """A weighted sum of deltas and its mean."""

    total_weight: int
    clients: int

    def fold(self, reader: TensorReader, weight: int) -> None: ...

    def remove(self, reader: TensorReader, weight: int) -> None: ...

    def mean_chunks(self, name: str, elements: int) -> Iterator[torch.Tensor]: ...

    def mean(self, name: str) -> torch.Tensor: ...

    def commit(self, name: str, start: torch.Tensor, new: torch.Tensor) -> None: ...

    def error_bound(self) -> float: ...


class FloatAccumulator:
    """A float32 weighted sum: fast, but order dependent and only approximately invertible.

    A delta that is refused half-way is subtracted again, which restores the sum up to float32 rounding.

    Args:
        spec: formats from :func:`fedpeft.aggregation.fixed_point.plan`; only the bounds matter.
        compiled: use compiled loops where there are any.
    """

    def __init__(self, spec: FixedPointSpec, compiled: bool = True):
        self.spec = spec
        self.compiled = compiled
        self.total_weight = 0
        self.clients = 0
        self._sums = {name: torch.zeros(tensor.elements) for name, tensor in spec.items()}
        self._folds = 0

    def fold(self, reader: TensorReader, weight: int) -> None:
        """Add ``weight * delta``. Raises :class:`~fedpeft.errors.DeltaRefused` as the fixed-point accumulator does."""
        check_weight(weight, self.total_weight, self.spec.max_total_weight)
        check_layout(reader, self.spec)
        self._add(reader, weight)
        self.total_weight += weight
        self.clients += 1

    def remove(self, reader: TensorReader, weight: int) -> None:
        """Subtract a delta that was folded in; exact only up to float32 rounding."""
        if not isinstance(weight, int) or not 0 <= weight <= self.total_weight or self.clients == 0:
            raise DeltaRefused("weight", "is not in the sum with this weight", field="weight", value=weight)
        check_layout(reader, self.spec)
        self._add(reader, -weight)
        self.total_weight -= weight
        self.clients -= 1

    def mean_chunks(self, name: str, elements: int = COMMIT_BLOCK) -> Iterator[torch.Tensor]:
        """The weighted mean in consecutive 1-D float64 pieces. Raises FedPeftError if the sum of weights is zero."""
        if self.total_weight == 0:
            raise FedPeftError("nothing to combine: the sum of weights is zero", field="weight", value=0)
        for piece in self._sums[name].split(elements) if self._sums[name].numel() else ():
            yield piece.double().div_(self.total_weight)

    def mean(self, name: str) -> torch.Tensor:
        """The weighted mean of one tensor, float64, in its shape."""
        pieces = list(self.mean_chunks(name, max(self._sums[name].numel(), 1)))
        shape = self.spec[name].shape
        return pieces[0].reshape(shape) if pieces else torch.zeros(shape, dtype=torch.float64)

    def commit(self, name: str, start: torch.Tensor, new: torch.Tensor) -> None:
        """``new = float32(float64(start) + mean)``, both 1-D float32 and contiguous. Raises as :meth:`mean_chunks`."""
        loop = fused.float_commit() if self.compiled else None
        if loop is None or self.total_weight == 0:
            commit_chunks(self.mean_chunks(name), start, new)
            return
        loop(self._sums[name].numpy(), float(self.total_weight), fused.as_array(start), new.numpy())

    def error_bound(self) -> float:
        """The standard bound of recursive float32 summation for entries at ``max_abs``; it grows with the folds."""
        return (self._folds + 2) * 2.0**-24 * max((t.max_abs for t in self.spec.values()), default=0.0)

    def _add(self, reader: TensorReader, weight: int) -> None:
        added = 0
        try:
            for _ in self._blocks(reader, weight, None):
                added += 1
        except BaseException:
            for _ in self._blocks(reader, -weight, added):
                pass
            raise
        self._folds += 1

    def _blocks(self, reader: TensorReader, weight: int, stop: int | None) -> Iterator[None]:
        """Add block by block, yielding after each; end after ``stop`` of them."""
        done = 0
        for name, tensor in self.spec.items():
            total, position = self._sums[name], 0
            for chunk in reader.chunks(name, CHUNK):
                if position + chunk.numel() > tensor.elements:
                    raise DeltaRefused("shape", "has more elements than its shape says", field=name)
                loop = fused.float_fold(chunk.dtype) if self.compiled else None
                step = CHUNK if loop else FLOAT_BLOCK
                for begin in range(0, chunk.numel(), step):
                    if done == stop:
                        return
                    piece = chunk if chunk.numel() <= step else chunk[begin : begin + step]
                    part = total[position : position + piece.numel()]
                    if loop:
                        values, bound = fused.as_array(piece), fused.float32_bound(tensor.max_abs)
                        added = loop(values, part.numpy(), bound, np.float32(weight))
                        if added < values.size:
                            loop(values[:added], part[:added].numpy(), bound, np.float32(-weight))
                            refuse_piece(piece, FLOAT_BLOCK, tensor.max_abs, name)
                    else:
                        wide = piece if piece.dtype == torch.float32 else piece.float()
                        check_block(wide, tensor.max_abs, name)
                        part.add_(wide, alpha=weight)
                    position += piece.numel()
                    done += 1
                    yield
            if position != tensor.elements:
                raise DeltaRefused("shape", "has fewer elements than its shape says", field=name)


class LinearMean:
    """One round's mean over the tensors of ``spec``.

    Args:
        start: the state that the round starts from; at least the tensors of ``spec``, float32.
        spec: formats from :func:`fedpeft.aggregation.fixed_point.plan`.
        precision: ``"fixed"`` (reproducible, invertible) or ``"float32"`` (faster, order dependent).

    Raises:
        FedPeftError: ``start`` lacks a tensor, has another shape or dtype, or ``precision`` is unknown.
    """

    def __init__(self, start: Mapping[str, torch.Tensor], spec: FixedPointSpec, precision: str = "fixed"):
        for name, tensor in spec.items():
            if name not in start:
                raise FedPeftError("is missing from the starting state", field=name)
            if tuple(start[name].shape) != tensor.shape or start[name].dtype != torch.float32:
                raise FedPeftError(f"must be float32 of shape {tensor.shape} in the starting state", field=name)
        if precision not in ("fixed", "float32"):
            raise FedPeftError("is no precision", field="precision", value=precision, hint="use fixed or float32")
        self.start = start
        self.spec = spec
        self.precision = precision
        self.accumulator: Accumulator = FixedPointAccumulator(spec) if precision == "fixed" else FloatAccumulator(spec)

    def fold(self, reader: TensorReader, weight: int) -> None:
        """Add one delta; see :meth:`FixedPointAccumulator.fold`."""
        self.accumulator.fold(reader, weight)

    def remove(self, reader: TensorReader, weight: int) -> None:
        """Take one delta out; see :meth:`FixedPointAccumulator.remove`."""
        self.accumulator.remove(reader, weight)

    def commit(self) -> dict[str, torch.Tensor]:
        """The new state, float32. The sum is kept, so that a later removal can commit again.

        Raises:
            FedPeftError: the sum of weights is zero.
        """
        state: dict[str, torch.Tensor] = {}
        for name, tensor in self.spec.items():
            old = self.start[name].contiguous().reshape(-1)
            new = torch.empty(tensor.elements)
            self.accumulator.commit(name, old, new)
            state[name] = new.reshape(tensor.shape)
        return state
