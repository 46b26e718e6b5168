"""Verification of a run folder: what agrees, what does not, and what could not be checked."""

from __future__ import annotations

import shutil

import pytest
from federation_parts import CLIENTS, RUN, participant, start, whole_round
from safetensors.torch import load_file, save_file

from fedpeft.errors import FedPeftError, IntegrityError
from fedpeft.federation.folder import RunFolder
from fedpeft.federation.status import LEDGER
from fedpeft.federation.verify import verify_folder
from fedpeft.store.store import RunStore


@pytest.fixture
def folder(tiny_llama, tmp_path):
    """A run of two rounds in its folder."""
    root = tmp_path / "run"
    party = participant(tiny_llama(), aggregation={"rounds": 2})
    with RunStore.open(f"sqlite:///{root / LEDGER}", root / "blobs") as store:
        run, files = start(store, party), RunFolder(root)
        while not run.done:
            whole_round(party, run)
            files.write_state(run, run.committed_rounds)
    return root


def test_an_untouched_folder_verifies_completely(folder):
    found = verify_folder(folder)
    assert found.run_id == RUN
    assert found.checked == {"checkpoints": 2, "deltas": 2 * len(CLIENTS), "adapters": 1}
    assert found.not_checked == {"checkpoints": 0, "deltas": 0, "adapters": 0}


def test_what_is_not_there_is_reported_as_not_checked(folder):
    shutil.rmtree(folder / "blobs")
    shutil.rmtree(folder / "checkpoints")
    found = verify_folder(folder)
    assert found.checked == {"checkpoints": 0, "deltas": 0, "adapters": 0}
    assert found.not_checked == {"checkpoints": 2, "deltas": 2 * len(CLIENTS), "adapters": 1}


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_a_changed_weight_of_the_adapter_is_caught(folder, part):
    path = folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(n for n in tensors if part in n)
    tensors[name][0, 0] += 1e-6
    save_file(tensors, path)
    with pytest.raises(IntegrityError, match="is not what round 2 committed"):
        verify_folder(folder)


def test_a_checkpoint_of_another_round_is_caught(folder):
    first, second = sorted((folder / "checkpoints").iterdir())
    data = first.read_bytes()
    second.unlink()  # a hard link to the blob: replace it, do not write through it
    second.write_bytes(data)
    with pytest.raises(IntegrityError, match="is not the state that round 2 committed"):
        verify_folder(folder)


def test_a_damaged_delta_is_caught(folder):
    with RunStore.open(f"sqlite:///{folder / LEDGER}", folder / "blobs") as store:
        path = store.blobs.path(store.deltas(RUN, 1)[0].digest)
    path.chmod(0o600)
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(IntegrityError):
        verify_folder(folder)


def test_a_folder_without_a_run_is_said_to_be_one(tmp_path):
    with pytest.raises(FedPeftError, match="is not a run folder"):
        verify_folder(tmp_path)
    RunStore.open(f"sqlite:///{tmp_path / LEDGER}", tmp_path / "blobs").close()
    with pytest.raises(FedPeftError, match="holds no run"):
        verify_folder(tmp_path)
