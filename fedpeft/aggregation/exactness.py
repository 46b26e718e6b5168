r"""How far a commit is from the true weighted mean of the clients' updates.

Averaging the factors of a low-rank pair is not averaging the products. With p_k the normalised weights and s the scale,
the mean that everybody meant is ``M = sum p_k s B_k A_k``; what averaging gives is ``s Bbar Abar``. The difference is
the covariance of the factors ::

    M - s Bbar Abar = sum_k p_k s (B_k - Bbar)(A_k - Abar)

It vanishes if either factor is common to all (FFA-LoRA freezes A: the rule is exact), and is otherwise a figure that
belongs in every round's report.

No (m, n) matrix is ever formed. The Frobenius inner product of two products needs r-by-r blocks only,
``<B_i A_i, B_j A_j> = trace((B_j^T B_i)(A_i A_j^T))``, hence for stacks of factors it is the sum over the elementwise
product of two small Gram matrices. Clients are read in groups of a bounded size and groups in pairs, so memory does not
grow with the number of clients. All arithmetic is float64 on *differences*, which keeps small updates of large factors
accurate: ``B_k A_k - B_0 A_0 = dB_k A_k + B_0 dA_k``.

Tensors outside of pairs (biases, heads) are averaged exactly, by linearity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from fedpeft.aggregation.protocols import LowRankPair, TensorReader

GROUP_BYTES = 32 << 20  # float64 factors of one group of clients; two groups are held at a time
EPSILON = 2.0**-52

Factors = tuple[torch.Tensor, torch.Tensor]  # B stack (m, R), A stack (R, n), float64
Delta = tuple[TensorReader, int]


@dataclass(frozen=True)
class Exactness:
    """Figures of one commit, Frobenius norms in weight space.

    Attributes:
        distance: norm of M - s Bbar Abar over all pairs.
        relative: ``distance`` over the norm of M; 0 if both are 0.
        floor: rounding error of ``distance`` itself; a distance below it means exact up to rounding.
        target_norm: norm of M over all pairs.
        client_norms: norm of each delta's update, in the order of the deltas; ``None`` if a frozen factor is not known.
        by_module: relative distance per module.
    """

    distance: float
    relative: float
    floor: float
    target_norm: float
    client_norms: tuple[float, ...] | None
    by_module: dict[str, float]


def measure(
    pairs: Sequence[LowRankPair],
    start: Mapping[str, torch.Tensor],
    deltas: Sequence[Delta],
    plain: Sequence[str] = (),
) -> Exactness:
    """Measure one commit.

    Args:
        pairs: the low-rank pairs. A factor whose name is not in the deltas is common to all clients.
        start: the starting state; may hold frozen factors too. A pair with a common factor needs none of them.
        deltas: the readers with their weights, the same that were folded in.
        plain: names of averaged tensors outside of pairs, for the clients' norms.

    Complexity: O(K^2 r^2 (m + n)) operations for K clients, memory bounded by two groups of 32 MiB.
    """
    deltas = list(deltas)
    total = sum(weight for _, weight in deltas)
    shares = [weight / total if total else 0.0 for _, weight in deltas]
    sent = set(deltas[0][0].names()) if deltas else set()
    distance2 = target2 = floor2 = 0.0
    by_module: dict[str, float] = {}
    client2: list[float] | None = [0.0] * len(deltas)
    for pair in pairs:
        if client2 is not None and pair.a in start and pair.b in start:
            for k, (reader, _) in enumerate(deltas):
                client2[k] += (
                    update_norm(pair, start, _change(reader, pair.a, sent), _change(reader, pair.b, sent)) ** 2
                )
        else:
            client2 = None
        both = pair.a in sent and pair.b in sent
        if not both:
            by_module[pair.module] = 0.0
            target2 += _common_target2(pair, start, deltas, shares, sent)
            continue
        mean_a, mean_b = _mean(deltas, shares, pair.a), _mean(deltas, shares, pair.b)
        start_a, start_b = start[pair.a].double(), start[pair.b].double()
        error2, size2 = _sum_norm2(_terms(pair, deltas, shares, -mean_b, -mean_a), pair.scale)
        goal2, _ = _sum_norm2(_terms(pair, deltas, shares, start_b, start_a), pair.scale)
        distance2, target2, floor2 = distance2 + error2, target2 + goal2, floor2 + size2 * EPSILON
        by_module[pair.module] = _ratio(math.sqrt(error2), math.sqrt(goal2))
    if client2 is not None:
        for k, (reader, _) in enumerate(deltas):
            client2[k] += sum(float(reader.tensor(name).double().square().sum()) for name in plain)
    distance, target = math.sqrt(distance2), math.sqrt(target2)
    return Exactness(
        distance=distance,
        relative=_ratio(distance, target),
        floor=math.sqrt(floor2),
        target_norm=target,
        client_norms=None if client2 is None else tuple(math.sqrt(v) for v in client2),
        by_module=by_module,
    )


def update_norm(
    pair: LowRankPair, start: Mapping[str, torch.Tensor], change_a: torch.Tensor | None, change_b: torch.Tensor | None
) -> float:
    """Norm of ``s (B0 + dB)(A0 + dA) - s B0 A0``; ``None`` for a factor that does not change."""
    start_a, start_b = start[pair.a].double(), start[pair.b].double()  # (r, n), (m, r)
    columns, rows = [], []
    if change_b is not None:
        columns.append(change_b.double())
        rows.append(start_a if change_a is None else start_a + change_a.double())
    if change_a is not None:
        columns.append(start_b)
        rows.append(change_a.double())
    if not columns:
        return 0.0
    norm2, _ = _gram((torch.cat(columns, 1), torch.cat(rows, 0)), (torch.cat(columns, 1), torch.cat(rows, 0)))
    return pair.scale * math.sqrt(max(norm2, 0.0))


def _change(reader: TensorReader, name: str, sent: set[str]) -> torch.Tensor | None:
    return reader.tensor(name) if name in sent else None


def _mean(deltas: Sequence[Delta], shares: Sequence[float], name: str) -> torch.Tensor:
    """Weighted mean of one tensor's change, float64."""
    mean = torch.zeros(deltas[0][0].shape(name), dtype=torch.float64)
    for (reader, _), share in zip(deltas, shares, strict=True):
        mean.add_(reader.tensor(name), alpha=share)
    return mean


def _common_target2(
    pair: LowRankPair,
    start: Mapping[str, torch.Tensor],
    deltas: Sequence[Delta],
    shares: Sequence[float],
    sent: set[str],
) -> float:
    """Squared norm of M for a pair with a common factor: a single product. 0 if the frozen factor is not known."""
    if pair.a not in start or pair.b not in start or not deltas:
        return 0.0
    factors = {}
    for name in (pair.a, pair.b):
        factors[name] = start[name].double()
        if name in sent:
            factors[name] = factors[name] + _mean(deltas, shares, name)
    stack = (factors[pair.b], factors[pair.a])
    return pair.scale**2 * max(_gram(stack, stack)[0], 0.0)


def _terms(
    pair: LowRankPair, deltas: Sequence[Delta], shares: Sequence[float], shift_b: torch.Tensor, shift_a: torch.Tensor
) -> Callable[[], Iterator[Factors]]:
    """Groups of stacked factors ``p_k (dB_k + shift_b)``, ``dA_k + shift_a``; can be read again and again."""
    per_client = 8 * (shift_a.numel() + shift_b.numel())
    size = max(1, GROUP_BYTES // max(per_client, 1))
    used = [(reader, share) for (reader, _), share in zip(deltas, shares, strict=True) if share]

    def groups() -> Iterator[Factors]:
        for begin in range(0, len(used), size):
            members = used[begin : begin + size]
            yield (
                torch.cat([(reader.tensor(pair.b).double() + shift_b) * share for reader, share in members], 1),
                torch.cat([reader.tensor(pair.a).double() + shift_a for reader, _ in members], 0),
            )

    return groups


def _sum_norm2(groups: Callable[[], Iterator[Factors]], scale: float) -> tuple[float, float]:
    """Squared norm of a sum of products, and the size of the terms that it was summed from."""
    total = size = 0.0
    for i, left in enumerate(groups()):
        # The diagonal pair uses what is in hand; earlier groups are read again. Both halves are equal.
        value, terms = _gram(left, left)
        total, size = total + value, size + terms
        for j, right in enumerate(groups()):
            if j >= i:
                break
            value, terms = _gram(left, right)
            total, size = total + 2 * value, size + 2 * terms
    return scale**2 * max(total, 0.0), scale**2 * size


def _gram(left: Factors, right: Factors) -> tuple[float, float]:
    """Inner product of two stacked products through (R, R) blocks, and the sum of its absolute terms."""
    product = (left[0].T @ right[0]).mul_(left[1] @ right[1].T)
    return float(product.sum()), float(product.abs().sum())


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else (0.0 if part == 0.0 else math.inf)
