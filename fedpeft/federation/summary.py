"""The final table of a run: every client's held-out scores under each model, and what travelled.

A simulation has four columns (base, local, federated, pooled); a deployment has two, since nobody there may pool data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedpeft.federation.run import FederatedRun

COLUMNS = ("base", "local", "federated", "pooled")
NO_PRIVACY = "none: this run carries no formal privacy guarantee"
MOST_SCORE = 1e12  # sums of such scores stay finite
Scores = Mapping[str, Mapping[str, float]]


def summarise(run: FederatedRun, scores: Mapping[str, Scores], train_examples: Mapping[str, int]) -> dict[str, Any]:
    """The summary as JSON-ready data.

    Args:
        run: a run with its rounds committed.
        scores: column -> client -> metrics; a client without scores in some column is left out of the table.
        train_examples: training examples per client, where known.
    """
    columns = [c for c in COLUMNS if c in scores]
    names = sorted(set.intersection(*(set(scores[c]) for c in columns))) if columns else []
    rows: list[dict[str, Any]] = [
        {"client": name, "train_examples": train_examples.get(name), **{c: dict(scores[c][name]) for c in columns}}
        for name in names
    ]
    keys = ["loss"] + (["accuracy"] if all("accuracy" in r[c] for r in rows for c in columns) else [])
    reports = [row.report for row in run.store.rounds(run.run_id) if row.report]
    up, down = (sum(r[key] for r in reports) for key in ("bytes_up", "bytes_down"))
    deliveries = sum(r["accepted"] for r in reports)
    return {
        "run_id": run.run_id,
        "rounds": len(reports),
        "columns": columns,
        "clients": rows,
        "mean": {c: {k: sum(r[c][k] for r in rows) / len(rows) for k in keys} for c in columns if rows},
        "bytes": {
            "up_per_client_round": up // deliveries if deliveries else 0,
            "down_per_client_round": down // deliveries if deliveries else 0,
            "up_total": up,
            "down_total": down,
            "tensors_per_delta": run.spec.payload_bytes(run.job.adapter.codec),
        },
        "exactness_rel": [r.get("exactness_rel") for r in reports],
        "privacy": NO_PRIVACY,
        "state": run.state_digest,
    }


def are_scores(metrics: Mapping[str, float]) -> bool:
    """Whether figures that a participant sent can stand in a table."""
    known = metrics.keys() <= {"loss", "accuracy", "count"} and "loss" in metrics
    return known and all(math.isfinite(value) and abs(value) < MOST_SCORE for value in metrics.values())
