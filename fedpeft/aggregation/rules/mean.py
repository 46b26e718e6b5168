"""FedIT: the plain weighted mean of everything that travels.

``Abar = sum p_k A_k``, ``Bbar = sum p_k B_k`` with ``p_k = w_k / sum w``. For low-rank pairs this is not the mean of
the updates: the report's exactness figure says by how much it misses (the covariance of the factors). For biases, heads
and other plain tensors it is exact.

Paper: Zhang et al., "Towards Building the Federated GPT: Federated Instruction Tuning" (ICASSP 2024), the mean itself
being FedAvg of McMahan et al. (AISTATS 2017).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from fedpeft.aggregation.protocols import AdapterShape, Aggregation

if TYPE_CHECKING:
    import torch

    from fedpeft.aggregation.fixed_point import FixedPointSpec


class MeanRule:
    """FedAvg of both factors."""

    name = "mean"
    paper = "FedIT, Zhang et al. 2024 (FedAvg, McMahan et al. 2017)"
    adapter_kinds = ("lora", "ffa-lora")
    exact = False

    def averages(self, spec: AdapterShape) -> tuple[str, ...]:
        """Everything that travels."""
        return tuple(sorted(spec.shapes))

    def begin(
        self,
        start: Mapping[str, torch.Tensor],
        spec: AdapterShape,
        fixed: FixedPointSpec,
        *,
        frozen: Mapping[str, torch.Tensor] | None = None,
        precision: str = "fixed",
    ) -> Aggregation:
        """Open a round; see :meth:`fedpeft.aggregation.protocols.Rule.begin`."""
        from fedpeft.aggregation.rules.round_mean import RoundMean

        return RoundMean(self.name, start, spec, fixed, frozen or {}, precision)
