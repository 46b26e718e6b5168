"""Who takes part in a round: a PRF of (run seed, client, round), never a draw from a list.

The score of a client does not depend on which others exist or are online, so adding or removing a client changes nobody
else's participation under Poisson sampling, and a replay reproduces it.

>>> names = ["a", "b", "c", "d"]
>>> chosen = select_clients(names, seed=7, round_number=1, per_round=2)
>>> chosen == select_clients(reversed(names), seed=7, round_number=1, per_round=2)
True
>>> len(chosen)
2
"""

from __future__ import annotations

from collections.abc import Iterable

from fedpeft.prf import prf_uniform


def select_clients(
    clients: Iterable[str],
    *,
    seed: int,
    round_number: int,
    per_round: int | None = None,
    sample_rate: float | None = None,
) -> tuple[str, ...]:
    """Names of the clients that take part, sorted.

    Args:
        clients: every client that could be asked: those enrolled, not merely those online.
        seed: the run's seed.
        round_number: 1-based.
        per_round: exactly so many (all, if fewer exist): those with the smallest scores.
        sample_rate: each client independently with this probability (Poisson); may select nobody.

    Without ``per_round`` and ``sample_rate`` every client takes part.
    """
    score = {name: prf_uniform(seed, "select-client", name, round_number) for name in clients}
    if sample_rate is not None:
        return tuple(sorted(name for name in score if score[name] < sample_rate))
    ranked = sorted(score, key=lambda name: (score[name], name))
    return tuple(sorted(ranked[:per_round]))
