"""The seams of aggregation: what a rule reads, and what it answers.

A rule never sees a file or a network. It reads accepted deltas through :class:`TensorReader`, whose implementation
streams from a blob on disk, and knows the adapter through :class:`AdapterShape`. One round is one
:class:`Aggregation`: deltas are folded in as they arrive and leave memory; :meth:`Aggregation.commit` gives the next
state and a report of plain JSON values.

Legend for shapes: A is (r, n), B is (m, r), the adapted weight is (m, n).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:  # the job schema asks for rule names, and must not wait for torch
    import torch

    from fedpeft.aggregation.fixed_point import FixedPointSpec


class TensorReader(Protocol):
    """One accepted delta. It can be read any number of times and gives the same values each time."""

    def names(self) -> Sequence[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def chunks(self, name: str, elements: int) -> Iterator[torch.Tensor]:
        """Consecutive 1-D pieces (float32 or bfloat16) of at most ``elements``; one buffer may be reused for all."""
        ...

    def tensor(self, name: str) -> torch.Tensor:
        """A whole tensor, float32, in its shape."""
        ...


class LowRankPair(Protocol):
    """The two factors of one adapted layer: its weight changes by ``scale * B @ A``."""

    @property
    def module(self) -> str: ...

    @property
    def a(self) -> str:
        """Name of the tensor A (r, n)."""
        ...

    @property
    def b(self) -> str:
        """Name of the tensor B (m, r)."""
        ...

    @property
    def scale(self) -> float:
        """alpha/r, or alpha/sqrt(r)."""
        ...


class AdapterShape(Protocol):
    """What a rule knows of the adapter."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The tensors that travel."""
        ...

    @property
    def pairs(self) -> Sequence[LowRankPair]: ...


@dataclass(frozen=True)
class Committed:
    """The next global state (travelling tensors, float32) and the round's figures (JSON values only)."""

    state: dict[str, torch.Tensor]
    report: dict[str, Any]


class Aggregation(Protocol):
    """One round in progress. Not thread-safe: the caller holds a lock."""

    def fold(self, reader: TensorReader, weight: int) -> None:
        """Add one delta. Raises :class:`~fedpeft.errors.DeltaRefused` and then leaves everything as it was."""
        ...

    def remove(self, reader: TensorReader, weight: int) -> None:
        """Take out a delta that was folded in with this weight."""
        ...

    def commit(self, readers: Iterable[tuple[TensorReader, int]] | None = None) -> Committed:
        """Combine. ``readers``: the same deltas again, for the exactness figure; ``None`` skips it."""
        ...


class Rule(Protocol):
    """A named way to combine deltas."""

    @property
    def name(self) -> str: ...

    @property
    def paper(self) -> str: ...

    @property
    def adapter_kinds(self) -> tuple[str, ...]:
        """Adapter kinds that it combines."""
        ...

    @property
    def exact(self) -> bool:
        """Whether the new state is the true weighted mean of the clients' updates in weight space."""
        ...

    def averages(self, spec: AdapterShape) -> tuple[str, ...]:
        """Names of the tensors that it averages."""
        ...

    def begin(
        self,
        start: Mapping[str, torch.Tensor],
        spec: AdapterShape,
        fixed: FixedPointSpec,
        *,
        frozen: Mapping[str, torch.Tensor] | None = None,
        precision: str = "fixed",
    ) -> Aggregation:
        """Open a round.

        Args:
            start: the state it starts from, float32, at least the travelling tensors.
            spec: names, shapes and pairs.
            fixed: public bounds, from :func:`fedpeft.aggregation.fixed_point.plan`.
            frozen: factors that never travel (FFA's A), for norms in weight space.
            precision: ``"fixed"`` or ``"float32"``.
        """
        ...
