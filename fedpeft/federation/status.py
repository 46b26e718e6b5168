"""A run in plain data: for ``fedpeft status``, the daemon's Status call and scripts.

The same function serves a simulation's run folder and the daemon's database, so both report alike.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpeft.errors import FedPeftError
from fedpeft.federation.summary import NO_PRIVACY

if TYPE_CHECKING:
    from fedpeft.store.store import RunStore

LEDGER = "ledger.db"


def open_run_folder(directory: Path) -> RunStore:
    """The store inside a run folder. Raises :class:`FedPeftError` when ``directory`` is not one."""
    from fedpeft.store.store import RunStore

    if not (directory / LEDGER).exists():
        raise FedPeftError(
            f"is not a run folder (no {LEDGER} in it)",
            field=str(directory),
            hint="give the folder named with --out, or a run id together with --bundle",
        )
    return RunStore.open(f"sqlite:///{directory / LEDGER}", directory / "blobs")


def run_status(store: RunStore, run_id: str) -> dict[str, Any]:
    """State, rounds and clients of a run as JSON-ready data."""
    run = store.run(run_id)
    rounds = store.rounds(run_id)
    clients: dict[str, dict[str, Any]] = {}

    def client(name: str) -> dict[str, Any]:
        return clients.setdefault(
            name, {"name": name, "selected": 0, "delivered": 0, "refused": 0, "bytes_up": 0, "evaluations": []}
        )

    for row in rounds:
        for name in row.selected:
            client(name)["selected"] += 1
        for delta in store.deltas(run_id, row.number):
            entry = client(delta.client)
            entry["delivered"] += 1
            entry["bytes_up"] += delta.payload_bytes
            entry["last_round"] = row.number
            entry["weight"] = delta.weight
    for refusal in store.refusals(run_id):
        entry = client(refusal.client)
        entry["refused"] += 1
        entry["last_refusal"] = {"round": refusal.round, "code": refusal.code, "reason": refusal.reason}
    for evaluation in store.evaluations(run_id):
        client(evaluation.client)["evaluations"].append(
            {"round": evaluation.round, "split": evaluation.split, **evaluation.metrics}
        )
    return {
        "run_id": run.id,
        "name": run.name,
        "state": run.state,
        "error": run.error,
        "round": sum(row.state == "committed" for row in rounds),
        "rounds_total": run.rounds_total,
        "created_at": run.created_at.isoformat(),
        "updated_at": run.updated_at.isoformat(),
        "base_fingerprint": run.base_fingerprint,
        "privacy": NO_PRIVACY,
        "ledger_head": store.ledger_head(run_id),
        "clients": [clients[name] for name in sorted(clients)],
        "rounds": [
            {
                "number": row.number,
                "state": row.state,
                "selected": list(row.selected),
                "start_state": row.start_state,
                "end_state": row.end_state,
                **({"report": row.report} if row.report else {}),
            }
            for row in rounds
        ],
        "summary": run.summary,
    }
