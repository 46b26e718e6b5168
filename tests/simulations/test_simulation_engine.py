"""A whole job on one machine: the same bytes however it is computed, also after an accident; data of any origin."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers import decoders as token_decoders
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast
from transformers.trainer_utils import set_seed

from fedpeft.data.records import ClientData
from fedpeft.data.sources import write_client_folder
from fedpeft.errors import FedPeftError
from fedpeft.federation.folder import RunFolder
from fedpeft.federation.selection import select_clients
from fedpeft.federation.status import open_run_folder, run_status
from fedpeft.job.schema import Job
from fedpeft_simulations.engine import SimulationResult, simulate
from fedpeft_simulations.hosts import simulated_clients

CODE = {
    "model": {"base": "builtin:tiny-code-lm"},
    "data": {"source": "builtin:stdlib", "task": "causal-lm", "max_length": 32},
    "adapter": {"kind": "ffa-lora", "rank": 4, "target_modules": ["q_proj", "v_proj"]},
    "clients": {"count": 2},
}
DIGITS = {
    "model": {"base": "builtin:digits-vit"},
    "data": {
        "source": "builtin:digits",
        "task": "image-classification",
        "partition": {"by": "dirichlet", "alpha": 0.5},
    },
    "adapter": {"kind": "lora", "rank": 4},
    "clients": {"count": 3},
    "aggregation": {"rule": "mean", "rounds": 2},
}


def job(workload, **sections) -> Job:
    tree = {
        "name": "small",
        "seed": 7,
        "train": {"local_steps": 3, "batch_size": 16, "learning_rate": 0.003},
        "aggregation": {"rounds": 2},
        **workload,
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    return Job.model_validate(tree)


def committed_bytes(result: SimulationResult) -> dict[str, bytes]:
    """Everything in the run folder that the job determines: the states, the adapter, the job."""
    kept = [*result.directory.glob("checkpoints/*"), *result.directory.glob("adapter/*"), result.directory / "job.toml"]
    return {path.relative_to(result.directory).as_posix(): path.read_bytes() for path in kept}


def table(result: SimulationResult) -> list[dict]:
    return result.summary["clients"]


# --- the embedded workloads ------------------------------------------------------------------------------------------


FEW = {"evaluation": {"max_examples": 8}}


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory) -> SimulationResult:
    return simulate(job(DIGITS), tmp_path_factory.mktemp("digits") / "run", engine="in-process")


@pytest.mark.parametrize("workload", ["code", "digits"])
def test_processes_and_one_process_give_the_same_bytes(tmp_path, workload, digits_run):
    if workload == "digits":
        small, one = job(DIGITS), digits_run
    else:
        small = job(CODE, train={"local_steps": 2, "batch_size": 4}, aggregation={"rounds": 1}, **FEW)
        one = simulate(small, tmp_path / "one", engine="in-process")
    many = simulate(small, tmp_path / "many", engine="processes")
    assert committed_bytes(many) == committed_bytes(one)
    assert len(committed_bytes(one)) == small.aggregation.rounds + 3
    assert table(many) == table(one)
    assert many.summary["state"] == one.summary["state"]
    assert many.run_id != one.run_id


def test_the_run_folder_holds_what_it_promises(digits_run):
    folder = digits_run.directory
    summary = json.loads((folder / "summary.json").read_text())
    assert summary == json.loads(json.dumps(digits_run.summary))
    assert summary["columns"] == ["base", "local", "federated", "pooled"]
    assert summary["rounds"] == 2
    assert [row["client"] for row in summary["clients"]] == ["client-00", "client-01", "client-02"]
    for column in summary["columns"]:
        assert all(0 < row[column]["loss"] < 10 and 0 <= row[column]["accuracy"] <= 1 for row in summary["clients"])
        losses = [row[column]["loss"] for row in summary["clients"]]
        assert summary["mean"][column]["loss"] == pytest.approx(sum(losses) / 3)
    with open_run_folder(folder) as store:
        status = run_status(store, digits_run.run_id)
        store.verify_ledger(digits_run.run_id)
        deltas = [row for number in (1, 2) for row in store.deltas(digits_run.run_id, number)]
    assert status["state"] == "finished"
    assert status["summary"] == summary
    assert summary["bytes"]["up_total"] == sum(row.payload_bytes for row in deltas)
    assert len(summary["exactness_rel"]) == 2
    assert summary["exactness_rel"][1] > 0  # the plain mean of both factors is not exact, and the table says so
    assert summary["privacy"].startswith("none")


def test_training_helps(digits_run):
    mean = digits_run.summary["mean"]
    for column in ("local", "federated", "pooled"):
        assert mean[column]["loss"] < mean["base"]["loss"], column


def test_a_dirichlet_split_gives_the_clients_unlike_data(digits_run):
    clients = simulated_clients(job(DIGITS))
    shares = [[sum(r["label"] == label for r in c.train) / len(c.train) for label in range(10)] for c in clients]
    assert sum(abs(a - b) for a, b in zip(shares[0], shares[1], strict=True)) / 2 > 0.3
    sizes = {row["client"]: row["train_examples"] for row in table(digits_run)}
    assert sizes == {c.name: len(c.train) for c in clients}


def test_another_seed_is_another_run(digits_run, tmp_path):
    quick = {"evaluation": {"max_examples": 4, "baselines": []}, "train": {"local_steps": 1, "batch_size": 4}}
    states = set()
    for seed in (7, 8):
        small = job(DIGITS, **quick, aggregation={"rule": "mean", "rounds": 1}).model_copy(update={"seed": seed})
        result = simulate(small, tmp_path / str(seed), engine="in-process")
        states.add(result.summary["state"])
        assert result.summary["columns"] == ["base", "federated"]
    assert len(states) == 2


# --- who takes part --------------------------------------------------------------------------------------------------

QUICK = {
    "train": {"local_steps": 1, "batch_size": 4},
    "evaluation": {"max_examples": 4, "baselines": []},
    "aggregation": {"rule": "mean", "rounds": 3},
}


@pytest.mark.parametrize("how", [{"per_round": 2}, {"sample_rate": 0.4}])
def test_a_round_asks_those_whom_the_prf_selects(tmp_path, how):
    seen = {}

    def watch(event, facts):
        if event == "round":
            seen[facts["round"]] = tuple(facts["selected"])

    result = simulate(
        job(DIGITS, **QUICK, clients={"count": 3, **how}), tmp_path / "run", engine="in-process", watch=watch
    )
    names = [f"client-{k:02d}" for k in range(3)]
    assert seen == {t: select_clients(names, seed=7, round_number=t, **how) for t in (1, 2, 3)}
    with open_run_folder(result.directory) as store:
        for number, selected in seen.items():
            assert tuple(row.client for row in store.deltas(result.run_id, number)) == selected
    deliveries = sum(map(len, seen.values()))
    assert 0 < deliveries < 9
    assert result.summary["bytes"]["up_per_client_round"] == result.summary["bytes"]["up_total"] // deliveries


def test_more_clients_per_round_than_there_are_is_one_error(tmp_path):
    small = job(CODE, clients={"count": None, "per_round": 500})
    with pytest.raises(FedPeftError) as caught:
        simulate(small, tmp_path / "run", engine="in-process")
    assert caught.value.field == "clients.per_round"
    assert not (tmp_path / "run").exists()


# --- accidents -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "number", "nth"),
    [("client", 2, 2), ("committed", 1, 1), ("committed", 3, 1), ("baseline", None, 1)],
    ids=["between two deltas", "between two rounds", "after the last round", "in the baselines"],
)
def test_a_run_that_died_is_continued_to_the_same_bytes(tmp_path, event, number, nth):
    small = job(DIGITS, **{**QUICK, "evaluation": {"max_examples": 4, "baselines": ["local"]}})
    whole = simulate(small, tmp_path / "whole", engine="in-process")

    class Killed(BaseException):
        pass

    def die(what, facts):
        if what == event and facts.get("round") == number:
            die.left -= 1
            if not die.left:
                raise Killed

    die.left = nth
    with pytest.raises(Killed):
        simulate(small, tmp_path / "died", engine="in-process", watch=die)
    trained = []
    result = simulate(
        small,
        tmp_path / "died",
        engine="in-process",
        watch=lambda what, facts: trained.append((facts["round"], facts["client"])) if what == "client" else None,
    )
    assert committed_bytes(result) == committed_bytes(whole)
    assert table(result) == table(whole)
    names = ["client-00", "client-01", "client-02"]
    every = [(t, name) for t in (1, 2, 3) for name in names]
    done = {("client", 2): 5, ("committed", 1): 3, ("committed", 3): 9, ("baseline", None): 9}[event, number]
    assert trained == every[done:]  # what had been accepted is not trained again
    with open_run_folder(result.directory) as store:
        store.verify_ledger(result.run_id)
        assert store.run(result.run_id).state == "finished"


def test_an_error_keeps_its_parts_on_the_way_from_a_worker_process():
    error = FedPeftError("is wrong", field="train.learning_rate", value=3, hint="mend it")
    arrived = copy.copy(error)  # by the same protocol as pickling
    assert (type(arrived), str(arrived), arrived.field) == (FedPeftError, str(error), "train.learning_rate")


def test_a_process_that_dies_right_after_a_commit_leaves_no_hole_in_the_folder(tmp_path, monkeypatch):
    small = job(DIGITS, **{**QUICK, "aggregation": {"rule": "mean", "rounds": 1}})
    whole = simulate(small, tmp_path / "whole", engine="in-process")

    class Killed(BaseException):
        pass

    def die(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write_state", die)
        with pytest.raises(Killed):
            simulate(small, tmp_path / "died", engine="in-process")
    assert committed_bytes(simulate(small, tmp_path / "died", engine="in-process")) == committed_bytes(whole)


def test_a_folder_that_holds_another_job_or_a_finished_run_is_refused_untouched(tmp_path):
    small = job(DIGITS, **{**QUICK, "aggregation": {"rule": "mean", "rounds": 1}})
    result = simulate(small, tmp_path / "run", engine="in-process")
    before = {path: path.read_bytes() for path in result.directory.rglob("*.safetensors")}
    other = job(DIGITS, **{**QUICK, "aggregation": {"rule": "mean", "rounds": 2}})
    with pytest.raises(FedPeftError, match="holds a run of another job") as caught:
        simulate(other, tmp_path / "run", engine="in-process")
    assert caught.value.field == "--out"
    with pytest.raises(FedPeftError, match="finished already"):
        simulate(small, tmp_path / "run", engine="in-process")
    assert {path: path.read_bytes() for path in result.directory.rglob("*.safetensors")} == before
    assert json.loads((result.directory / "summary.json").read_text())["rounds"] == 1


# --- data and models from local folders ------------------------------------------------------------------------------


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and two special ones."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<eos>", "<pad>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = token_decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def text_folder(folder: Path, labelled: bool) -> Path:
    """Two owners with words of their own, label 1 in capitals; only ``eve`` has a held-out file."""
    words = {"ann": ["rain", "sea", "boat"], "eve": ["sun", "sand", "palm"]}
    draw = random.Random(3)
    for name, own in words.items():
        records = []
        for _ in range(50):
            label = draw.randrange(2)
            text = " ".join(draw.choice(own) for _ in range(5))
            record = {"text": text.upper() if label else text}
            records.append({**record, "label": label} if labelled else record)
        write_client_folder(ClientData(name, tuple(records[:40]), tuple(records[40:])), folder / name)
    (folder / "ann" / "heldout.jsonl").unlink()
    return folder


def test_a_language_model_and_data_from_local_folders(tiny_llama, tmp_path):
    tokenizer, model = byte_tokenizer(), tiny_llama()
    model.resize_token_embeddings(len(tokenizer))
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "base")
    small = job(
        {
            "model": {"base": str(tmp_path / "base")},
            "data": {"source": str(text_folder(tmp_path / "data", False)), "task": "causal-lm", "max_length": 16},
            "adapter": {"kind": "ffa-lora", "rank": 2, "codec": "bf16"},
        },
        train={"local_steps": 4, "batch_size": 8, "learning_rate": 0.05},
    )
    result = simulate(small, tmp_path / "run", engine="in-process")
    assert [row["client"] for row in table(result)] == ["ann", "eve"]
    assert [row["train_examples"] for row in table(result)][1] >= 40
    assert result.summary["mean"]["federated"]["loss"] < result.summary["mean"]["base"]["loss"]
    assert "accuracy" not in result.summary["mean"]["base"]
    assert result.summary["bytes"]["up_per_client_round"] < result.summary["bytes"]["down_per_client_round"]


def test_a_classifier_with_its_head_and_data_from_local_folders(tmp_path):
    tokenizer = byte_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=64,
        num_labels=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    set_seed(0)
    for part in (BertForSequenceClassification(config), tokenizer):
        part.save_pretrained(tmp_path / "base")
    small = job(
        {
            "model": {"base": str(tmp_path / "base"), "num_labels": 2},
            "data": {
                "source": str(text_folder(tmp_path / "data", True)),
                "task": "sequence-classification",
                "max_length": 40,
            },
            "adapter": {"kind": "ffa-lora", "rank": 2, "train_head": True},
        },
        train={"local_steps": 15, "batch_size": 8, "learning_rate": 0.01},
    )
    result = simulate(small, tmp_path / "run", engine="in-process")
    assert set(result.summary["mean"]) == {"base", "local", "federated", "pooled"}
    assert set(result.summary["mean"]["federated"]) == {"loss", "accuracy"}
    assert result.summary["mean"]["federated"]["loss"] < result.summary["mean"]["base"]["loss"]
    saved = load_file(result.directory / "adapter" / "adapter_model.safetensors")
    assert any("classifier" in name for name in saved)
    first, last = (load_file(result.directory / "checkpoints" / f"round-000{t}.safetensors") for t in (1, 2))
    head = next(name for name in first if name.endswith("classifier.weight"))
    assert not first[head].equal(last[head])


def test_a_diverging_job_fails_with_one_error_and_the_store_says_so(tmp_path):
    small = job(DIGITS, **{**QUICK, "train": {"local_steps": 4, "optimizer": "sgd", "learning_rate": 1e30}})
    with pytest.raises(FedPeftError, match=r"learning.rate"):
        simulate(small, tmp_path / "run", engine="in-process")
    with open_run_folder(tmp_path / "run") as store:
        (run,) = store.runs()
        assert run.state == "failed"
        assert "learning" in str(run.error)
        store.verify_ledger(run.id)
