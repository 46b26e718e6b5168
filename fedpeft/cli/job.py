"""``fedpeft job`` and ``fedpeft data``."""

from __future__ import annotations

import json
from pathlib import Path

from rich.table import Table

from fedpeft.cli.tables import err, out, size
from fedpeft.job import job_schema, load_job


def check_job(path: Path, overrides: list[str], as_json: bool) -> None:
    job = load_job(path, overrides)
    from fedpeft.federation.participant import Participant

    with err.status("loading the base model"):
        participant = Participant(job)
    spec = participant.spec
    facts = {
        "name": job.name,
        "base": job.model.base,
        "base_fingerprint": participant.fingerprint,
        "adapter": spec.kind,
        "adapted_layers": len(spec.pairs),
        "tensors_that_travel": len(spec.tensors),
        "tensors_regenerated": len(spec.seeded),
        "numbers_that_travel": spec.elements,
        "payload_bytes": spec.payload_bytes(job.adapter.codec),
        "rule": job.aggregation.rule,
        "rounds": job.aggregation.rounds,
        "privacy": "none: this job carries no formal privacy guarantee",
    }
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    table = Table(show_header=False, box=None)
    for key, value in facts.items():
        table.add_row(key.replace("_", " "), size(value) if key == "payload_bytes" else str(value))  # type: ignore[arg-type]
    out.print(table)
    out.print(f"{path}: ok")


def print_schema() -> None:
    print(json.dumps(job_schema(), indent=2))


def export_data(path: Path, directory: Path, overrides: list[str], as_json: bool) -> None:
    job = load_job(path, overrides)
    from fedpeft.bundle import check_name
    from fedpeft.data.sources import write_client_folder
    from fedpeft_simulations.hosts import simulated_clients

    written = {}
    for client in simulated_clients(job):
        check_name(client.name)  # it becomes the name of a folder, and a data set may call its owners anything
        write_client_folder(client, directory / client.name)
        written[client.name] = {"train": len(client.train), "heldout": len(client.heldout)}
    if as_json:
        print(json.dumps(written, indent=2))
        return
    for name, counts in written.items():
        out.print(f"{directory / name}: {counts['train']} training and {counts['heldout']} held-out records")
