"""What an adapter is made of: names and shapes, without values.

A spec is derived from the job and the base model alone, so the coordinator and every client arrive at the same one and
an incoming delta can be held against it.

Shape legend: ``r`` rank, ``m`` out features, ``n`` in features; A is ``(r, n)``, B is ``(m, r)``; the update of a layer
is ``scale * B @ A``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

CODEC_BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class TensorSpec:
    """One tensor that travels."""

    name: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class SeededSpec:
    """A frozen tensor that never travels: every participant regenerates it (see :mod:`fedpeft.adapters.seeded`)."""

    name: str
    shape: tuple[int, int]
    module: str
    orthonormal: bool


def short_seeded(seeded: tuple[SeededSpec, ...]) -> tuple[SeededSpec, ...]:
    """One entry ``*`` for "the A of every pair", when all were made alike; their shapes follow from rank and base."""
    kinds = {(s.shape[0], s.orthonormal) for s in seeded}
    if len(kinds) != 1 or not all(s.name.endswith(".lora_A.weight") for s in seeded):
        return seeded
    ((rank, orthonormal),) = kinds
    return (SeededSpec("*", (rank, 0), "*", orthonormal),)


@dataclass(frozen=True)
class LowRankPair:
    """The two factors of one adapted layer; ``scale`` is alpha/r, or alpha/sqrt(r) when rank-stabilised."""

    module: str
    a: str
    b: str
    rank: int
    scale: float


@dataclass(frozen=True)
class AdapterSpec:
    """An adapter without its values.

    Attributes:
        kind: adapter kind, a name of :mod:`fedpeft.adapters.kinds.registry`.
        tensors: what travels, sorted by name.
        seeded: what is regenerated instead.
        pairs: the low-rank pairs, for rules and figures that need the product B A.
        peft_config: content of a standard ``adapter_config.json``.
        base_fingerprint: SHA-256 of the base model that the adapter belongs to.
        peft_changes: what in ``peft_config`` differs from PEFT's defaults; the part that a manifest carries.
    """

    kind: str
    tensors: tuple[TensorSpec, ...]
    seeded: tuple[SeededSpec, ...]
    pairs: tuple[LowRankPair, ...]
    peft_config: dict[str, Any]
    base_fingerprint: str
    peft_changes: dict[str, Any] = field(default_factory=dict)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {t.name: t.shape for t in self.tensors}

    @property
    def elements(self) -> int:
        """Numbers that travel, per client and direction."""
        return sum(t.elements for t in self.tensors)

    def payload_bytes(self, codec: str) -> int:
        """Tensor bytes of one delta, without its header."""
        return self.elements * CODEC_BYTES[codec]
