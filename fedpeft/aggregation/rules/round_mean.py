"""One round of a rule that averages tensors: the linear mean, plus the figures of its report.

The report's keys, all plain JSON values:

``rule``, ``precision``, ``clients``, ``total_weight``
    what was combined, and how.
``rounding_bound``
    largest absolute rounding error of an entry of the mean.
``exactness_abs``, ``exactness_rel``, ``exactness_floor``, ``exactness_note``
    distance from the true weighted mean of the updates (:mod:`fedpeft.aggregation.exactness`), relative to its norm,
    and the rounding error of the distance itself. ``None`` with a note if it was not measured.
``update_norm``, ``delta_norm``
    size of the step: in weight space (``None`` if a frozen factor is not at hand), and of the averaged tensors as one
    vector.
``client_norms``
    each client's update in weight space, in the order of the readers, or ``None``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from fedpeft.aggregation.exactness import measure, update_norm
from fedpeft.aggregation.fixed_point import FixedPointSpec
from fedpeft.aggregation.linear_mean import COMMIT_BLOCK, LinearMean
from fedpeft.aggregation.protocols import AdapterShape, Committed, TensorReader


class RoundMean:
    """An open round; see :class:`fedpeft.aggregation.protocols.Aggregation`."""

    def __init__(
        self,
        rule: str,
        start: Mapping[str, torch.Tensor],
        spec: AdapterShape,
        fixed: FixedPointSpec,
        frozen: Mapping[str, torch.Tensor],
        precision: str,
    ):
        self._rule, self._spec = rule, spec
        self._mean = LinearMean(start, fixed, precision)
        self._known = {**frozen, **start}
        factors = {name for pair in spec.pairs for name in (pair.a, pair.b)}
        self._plain = tuple(name for name in fixed if name not in factors)

    def fold(self, reader: TensorReader, weight: int) -> None:
        """Add one delta."""
        self._mean.fold(reader, weight)

    def remove(self, reader: TensorReader, weight: int) -> None:
        """Take one delta out."""
        self._mean.remove(reader, weight)

    def commit(self, readers: Iterable[tuple[TensorReader, int]] | None = None) -> Committed:
        """The next state and the report. Raises FedPeftError if the sum of weights is zero."""
        state = self._mean.commit()
        accumulator = self._mean.accumulator
        report: dict[str, Any] = {
            "rule": self._rule,
            "precision": self._mean.precision,
            "clients": accumulator.clients,
            "total_weight": accumulator.total_weight,
            "rounding_bound": accumulator.error_bound(),
            **self._step_norms(),
            **self._exactness(readers),
        }
        return Committed(state, report)

    def _step_norms(self) -> dict[str, float | None]:
        accumulator, fixed = self._mean.accumulator, self._mean.spec
        squares = {
            name: sum(float(piece.square().sum()) for piece in accumulator.mean_chunks(name, COMMIT_BLOCK))
            for name in fixed
        }
        weight2: float | None = sum(squares[name] for name in self._plain)
        for pair in self._spec.pairs:
            if weight2 is None or pair.a not in self._known or pair.b not in self._known:
                weight2 = None
                continue
            changes = [accumulator.mean(name) if name in fixed else None for name in (pair.a, pair.b)]
            weight2 += update_norm(pair, self._known, changes[0], changes[1]) ** 2
        return {
            "update_norm": None if weight2 is None else math.sqrt(weight2),
            "delta_norm": math.sqrt(sum(squares.values())),
        }

    def _exactness(self, readers: Iterable[tuple[TensorReader, int]] | None) -> dict[str, Any]:
        fixed = self._mean.spec
        figures: dict[str, Any] = {
            "exactness_abs": 0.0,
            "exactness_rel": 0.0,
            "exactness_floor": self._mean.accumulator.error_bound(),
            "exactness_note": "exact up to rounding: no low-rank pair has both factors averaged",
            "client_norms": None,
        }
        moving = any(pair.a in fixed and pair.b in fixed for pair in self._spec.pairs)
        if readers is None:
            if moving:
                note = "not measured: the deltas were not at hand at commit"
                figures.update(exactness_abs=None, exactness_rel=None, exactness_floor=None, exactness_note=note)
            return figures
        found = measure(self._spec.pairs, self._known, list(readers), self._plain)
        if found.client_norms is not None:
            figures["client_norms"] = list(found.client_norms)
        if moving:
            figures.update(
                exactness_abs=found.distance,
                exactness_rel=found.relative if math.isfinite(found.relative) else None,
                exactness_floor=found.floor,
                exactness_note="distance from the weighted mean of the updates, by the covariance of the factors",
            )
        return figures
