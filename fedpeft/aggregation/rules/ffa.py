"""FFA-LoRA: A is frozen and common, only B moves; ``Bbar = sum p_k B_k`` is then the exact mean of the updates.

``M = sum p_k s B_k A_0 = s Bbar A_0``: one factor common, no covariance, no bias. Half of LoRA's payload at equal rank
for square layers, linear (so that masking and exact removal apply), and noise enters linearly too. A_0 never travels:
it is regenerated from a seed and the layer's name.

Paper: Sun et al., "Improving LoRA in Privacy-preserving Federated Learning" (ICLR 2024).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from fedpeft.aggregation.protocols import AdapterShape, Aggregation
from fedpeft.errors import FedPeftError

if TYPE_CHECKING:
    import torch

    from fedpeft.aggregation.fixed_point import FixedPointSpec


class FfaRule:
    """The mean of B under a frozen, common A."""

    name = "ffa"
    paper = "FFA-LoRA, Sun et al. 2024"
    adapter_kinds = ("ffa-lora",)
    exact = True

    def averages(self, spec: AdapterShape) -> tuple[str, ...]:
        """The factors B, and plain tensors such as a head."""
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
        """Open a round; see :meth:`fedpeft.aggregation.protocols.Rule.begin`.

        Raises:
            FedPeftError: a factor A travels, so that the mean would not be exact.
        """
        from fedpeft.aggregation.rules.round_mean import RoundMean

        for pair in spec.pairs:
            if pair.a in spec.shapes:
                raise FedPeftError(
                    "travels, but the rule ffa needs it frozen",
                    field=pair.a,
                    hint='set adapter.kind = "ffa-lora", or aggregation.rule = "mean"',
                )
        return RoundMean(self.name, start, spec, fixed, frozen or {}, precision)
