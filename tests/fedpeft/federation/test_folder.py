"""The run folder: complete files, that stock tools read."""

from __future__ import annotations

import json

import pytest
import torch
from federation_parts import CLIENTS, EXAMPLES, deliver, forged, open_store, participant, start
from peft import PeftModel
from safetensors.torch import load_file

from fedpeft.federation.folder import RunFolder
from fedpeft.job.loading import load_job

IDS = torch.randint(0, 64, (2, 10), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def committed(tiny_llama, tmp_path):
    party = participant(tiny_llama(), adapter={"kind": "ffa-lora"}, aggregation={"rule": "ffa"})
    with open_store(tmp_path / "run") as store:
        run = start(store, party)
        round_ = run.open_round(CLIENTS)
        for client in CLIENTS:
            deliver(round_, client, forged(party, round_, client, weight=EXAMPLES[client]))
        round_.commit()
        folder = RunFolder(tmp_path / "run")
        folder.write_state(run, 1)
        yield party, run, folder


def test_the_adapter_of_the_folder_is_the_committed_state_for_stock_peft(tiny_llama, committed):
    party, run, folder = committed
    party.adapter.write(run.state())
    theirs = PeftModel.from_pretrained(tiny_llama(), str(folder.root / "adapter")).eval()
    assert torch.equal(theirs(IDS).logits, party.adapter.model(IDS).logits)
    assert not torch.equal(theirs(IDS).logits, tiny_llama()(IDS).logits)


def test_a_checkpoint_is_the_packed_state_and_writing_it_again_changes_nothing(committed):
    _, run, folder = committed
    checkpoint = folder.root / "checkpoints" / "round-0001.safetensors"
    assert checkpoint.read_bytes() == run.store.blobs.path(run.state_digest).read_bytes()
    loaded = load_file(checkpoint)
    assert all(torch.equal(loaded[name], value) for name, value in run.state().items())
    before = {path: path.read_bytes() for path in folder.root.rglob("*") if path.suffix in (".safetensors", ".json")}
    folder.write_state(run, 1)
    assert {path: path.read_bytes() for path in before} == before


def test_the_job_reads_back_as_it_was(committed):
    party, _, folder = committed
    folder.write_job(party.job)
    assert load_job(folder.root / "job.toml") == party.job


def test_events_are_lines_of_json_in_order_and_files_are_replaced_whole(tmp_path):
    folder = RunFolder(tmp_path / "new" / "run")
    folder.log("round", round=1, loss=0.5)
    folder.log("evaluation", client="Zürich\n", loss=None)
    lines = (folder.root / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [
        {"event": "round", "round": 1, "loss": 0.5},
        {"event": "evaluation", "client": "Zürich\n", "loss": None},
    ]
    for rounds in (1, 2):
        folder.write_summary({"rounds": rounds})
    assert json.loads((folder.root / "summary.json").read_text()) == {"rounds": 2}
    assert sorted(path.name for path in folder.root.iterdir()) == ["metrics.jsonl", "summary.json"]
