"""Check a run folder offline: does what lies here agree with the ledger, and what could not be checked?

The ledger is a hash chain over everything that was accepted and committed. Verification recomputes the chain and then
holds the files against it: every checkpoint has the content address that its round committed, the adapter is the last
checkpoint plus the tensors that its seed regenerates, every delta that is still here has the address under which it was
accepted. A check that passed and a check that was impossible are told apart: silence is not assent.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from fedpeft.adapters.delta import PackedFile
from fedpeft.adapters.peft_folder import WEIGHTS
from fedpeft.adapters.seeded import seeded_tensor
from fedpeft.errors import DeltaRefused, FedPeftError, IntegrityError
from fedpeft.federation.status import open_run_folder
from fedpeft.job.loading import parse_job

if TYPE_CHECKING:
    from fedpeft.store.store import RunStore


@dataclass(frozen=True)
class Verification:
    """What was found.

    Attributes:
        run_id: the run.
        ledger_entries: entries of the chain that verified.
        ledger_head: its head; compare it with one that was kept elsewhere to exclude a rewritten history.
        checked: files that agree with the ledger, by kind.
        not_checked: what the ledger names but this folder does not hold, by kind.
    """

    run_id: str
    ledger_entries: int
    ledger_head: str
    checked: dict[str, int]
    not_checked: dict[str, int]


def verify_folder(directory: Path) -> Verification:
    """Verify the run in ``directory``.

    Raises:
        IntegrityError: something does not agree; names it.
        FedPeftError: this is no run folder.
    """
    with open_run_folder(directory) as store:
        runs = store.runs()
        if not runs:
            raise FedPeftError("holds no run", field=str(directory), hint="give a folder that simulate or fetch wrote")
        run_id = runs[0].id
        entries = store.verify_ledger(run_id)
        checked = {"checkpoints": 0, "deltas": 0, "adapters": 0}
        missing = dict(checked)
        for kind, present in (*_checkpoints(store, run_id, directory), *_deltas(store, run_id)):
            (checked if present else missing)[kind] += 1
        (checked if _adapter(store, run_id, directory) else missing)["adapters"] += 1
        return Verification(run_id, entries, store.ledger_head(run_id), checked, missing)


def _checkpoints(store: RunStore, run_id: str, directory: Path) -> list[tuple[str, bool]]:
    found = []
    for row in store.rounds(run_id):
        if row.state != "committed" or row.end_state is None:
            continue
        path = directory / "checkpoints" / f"round-{row.number:04d}.safetensors"
        if path.exists() and _sha256(path) != row.end_state:
            raise IntegrityError(
                f"is not the state that round {row.number} committed", field=str(path), value=_sha256(path)
            )
        found.append(("checkpoints", path.exists()))
    return found


def _deltas(store: RunStore, run_id: str) -> list[tuple[str, bool]]:
    found = []
    for row in store.rounds(run_id):
        for delta in store.deltas(run_id, row.number):
            present = store.blobs.exists(delta.digest)
            if present:
                store.blobs.verify(delta.digest)
            found.append(("deltas", present))
    return found


def _adapter(store: RunStore, run_id: str, directory: Path) -> bool:
    """Whether the adapter could be held against the last committed state. Raises if it differs."""
    ends = [r for r in store.rounds(run_id) if r.state == "committed" and r.end_state]
    path = directory / "adapter" / WEIGHTS
    if not ends or not path.exists():
        return False
    checkpoint = directory / "checkpoints" / f"round-{ends[-1].number:04d}.safetensors"
    if not checkpoint.exists():
        return False
    try:
        adapter, state = load_file(path), PackedFile(checkpoint)
    except (SafetensorError, DeltaRefused) as error:
        raise IntegrityError(f"cannot be read: {error}", field=str(path)) from None
    job = parse_job(store.run(run_id).job_toml)
    names = set(state.names())
    for name, value in adapter.items():
        if name in names:
            same = torch.equal(value.float(), state.tensor(name))
        else:
            module = name.removeprefix("base_model.model.").split(".lora_")[0]
            shape = (int(value.shape[0]), int(value.shape[-1]))
            expected = seeded_tensor(job.seed, module, shape, orthonormal=job.adapter.orthonormal)
            same = ".lora_A." in name and torch.equal(value.float(), expected)
        if not same:
            raise IntegrityError(f"{name} is not what round {ends[-1].number} committed", field=str(path))
    if names - adapter.keys():
        raise IntegrityError(f"lacks {sorted(names - adapter.keys())[0]}", field=str(path))
    return True


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
