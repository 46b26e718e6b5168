"""The coordinator's state machine, on a real store: what a round commits, what it refuses, what survives its death."""

from __future__ import annotations

import itertools
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from federation_parts import (
    CLIENTS,
    EXAMPLES,
    RUN,
    deliver,
    forged,
    job,
    open_store,
    participant,
    same,
    start,
    train,
    whole_round,
)
from safetensors.torch import load
from transformers import LlamaConfig, LlamaForCausalLM

from fedpeft.errors import DeltaRefused, FedPeftError, JobError, RunFailed
from fedpeft.federation.participant import Participant
from fedpeft.federation.run import FederatedRun, pack_state
from fedpeft.federation.selection import select_clients
from fedpeft.federation.status import LEDGER, open_run_folder, run_status
from fedpeft.models import load_base
from fedpeft.store.export import export_run


@pytest.fixture
def store(tmp_path):
    with open_store(tmp_path / "run") as opened:
        yield opened


def mean_by_hand(start_state, payloads, weights):
    """float64: start + sum w delta / sum w, from the bytes as stock safetensors reads them."""
    total = sum(weights.values())
    deltas = {client: load(payload) for client, payload in payloads.items()}
    return {
        name: value.double() + sum(weights[c] * deltas[c][name].double() for c in deltas) / total
        for name, value in start_state.items()
    }


# --- what is committed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "rule"), [("lora", "mean"), ("ffa-lora", "ffa")])
@pytest.mark.parametrize("weights", ["examples", "equal"])
def test_the_new_state_is_the_old_plus_the_weighted_mean_of_the_deltas(tiny_llama, store, kind, rule, weights):
    party = participant(tiny_llama(), adapter={"kind": kind}, aggregation={"rule": rule, "weights": weights})
    run = start(store, party)
    for _ in range(2):
        before, round_ = run.state(), run.open_round(CLIENTS)
        payloads = {client: train(party, round_, client) for client in CLIENTS}
        for client, payload in payloads.items():
            accepted = deliver(round_, client, payload)
            assert accepted.weight == (EXAMPLES[client] if weights == "examples" else 1)
            assert accepted.new
        report = round_.commit()
        expected = mean_by_hand(before, payloads, EXAMPLES if weights == "examples" else dict.fromkeys(CLIENTS, 1))
        step = max(float((expected[n] - before[n]).abs().max()) for n in before)
        assert step > 1e-3
        after = run.state()
        for name in expected:
            assert float((after[name].double() - expected[name]).abs().max()) < 1e-6 * max(step, 1.0), name
        assert report["bytes_up"] == sum(map(len, payloads.values()))
        assert report["accepted"] == 3
    assert run.done


def test_weights_by_examples_and_equal_weights_are_different_means(tiny_llama, tmp_path):
    digests = set()
    for weights in ("examples", "equal"):
        party = participant(tiny_llama(), aggregation={"weights": weights})
        with open_store(tmp_path / weights) as store:
            run = start(store, party)
            whole_round(party, run)
            digests.add(run.state_digest)
    assert len(digests) == 2


def test_the_order_of_arrival_leaves_no_trace(tiny_llama, tmp_path):
    digests = set()
    for number, order in enumerate(itertools.permutations(CLIENTS)):
        party = participant(tiny_llama())
        with open_store(tmp_path / str(number)) as store:
            run = start(store, party)
            round_ = run.open_round(order)
            for client in order:  # very unlike in size, so that a float sum would depend on the order
                scale = {"ann": 1e-6, "bob": 1.0, "eve": 30.0 / 5}[client]
                deliver(round_, client, forged(party, round_, client, weight=EXAMPLES[client], scale=scale))
            round_.commit()
            digests.add(run.state_digest)
    assert len(digests) == 1


def test_deltas_may_arrive_on_many_threads_and_more_than_once(tiny_llama, tmp_path):
    def committed(folder, deliveries):
        party = participant(tiny_llama())
        with open_store(folder) as store:
            run = start(store, party)
            round_ = run.open_round(CLIENTS)
            payloads = {c: forged(party, round_, c, weight=EXAMPLES[c]) for c in CLIENTS}
            with ThreadPoolExecutor(6) as pool:
                accepted = list(pool.map(lambda client: deliver(round_, client, payloads[client]), deliveries))
            assert sum(a.new for a in accepted) == 3
            round_.commit()
            assert len(store.deltas(RUN, 1)) == 3
            return run.state_digest

    assert committed(tmp_path / "threads", CLIENTS * 2) == committed(tmp_path / "once", CLIENTS)


def test_the_report_of_the_plain_mean_says_how_far_it_is_from_the_mean_of_the_updates(tiny_llama, store):
    party = participant(tiny_llama())
    run = start(store, party)
    whole_round(party, run)  # so that B is no longer zero
    before, round_ = run.state(), run.open_round(CLIENTS)
    payloads = {client: train(party, round_, client) for client in CLIENTS}
    for client, payload in payloads.items():
        deliver(round_, client, payload)
    report = round_.commit()
    total = sum(EXAMPLES.values())
    p = {c: EXAMPLES[c] / total for c in CLIENTS}
    deltas = {c: load(payload) for c, payload in payloads.items()}
    error2 = 0.0
    norms2 = dict.fromkeys(CLIENTS, 0.0)
    for pair in party.spec.pairs:
        a = {c: before[pair.a].double() + deltas[c][pair.a].double() for c in CLIENTS}
        b = {c: before[pair.b].double() + deltas[c][pair.b].double() for c in CLIENTS}
        a_mean, b_mean = sum(p[c] * a[c] for c in CLIENTS), sum(p[c] * b[c] for c in CLIENTS)
        covariance = 2.0 * sum(p[c] * (b[c] - b_mean) @ (a[c] - a_mean) for c in CLIENTS)  # scale = alpha / rank = 2
        base = before[pair.b].double() @ before[pair.a].double()
        mean = 2.0 * sum(p[c] * (b[c] @ a[c] - base) for c in CLIENTS)
        assert torch.allclose(mean - 2.0 * (b_mean @ a_mean - base), covariance, atol=1e-12)
        error2 += float(covariance.square().sum())
        for c in CLIENTS:
            norms2[c] += float((2.0 * (b[c] @ a[c] - base)).square().sum())
    assert report["exactness_abs"] == pytest.approx(error2**0.5, rel=1e-6)
    assert report["exactness_abs"] > 1e-6
    assert report["client_update_norms"] == pytest.approx({c: norms2[c] ** 0.5 for c in CLIENTS}, rel=1e-6)


def test_ffa_is_exact_and_says_so(tiny_llama, store):
    party = participant(tiny_llama(), adapter={"kind": "ffa-lora"}, aggregation={"rule": "ffa"})
    report = whole_round(party, start(store, party))
    assert report["exactness_rel"] == 0.0
    assert all(norm > 0 for norm in report["client_update_norms"].values())


def square_llama():
    """Projections of 512 x 512."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=512,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=32,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval().requires_grad_(False)


# Whole objects, headers included: also where the tensors are small.
@pytest.mark.parametrize(("base", "rank", "most"), [("square", 8, 0.51), ("tiny-code-lm", 8, 0.51)])
def test_ffa_sends_half_of_what_the_plain_mean_sends_headers_included(store, base, rank, most):
    sizes = {}
    for kind, rule in (("lora", "mean"), ("ffa-lora", "ffa")):
        adapter = {"kind": kind, "rank": rank, "target_modules": ["q_proj", "o_proj"]}
        settings = {"adapter": adapter, "aggregation": {"rule": rule}}
        if base == "square":
            party = participant(square_llama(), **settings)
        else:
            loaded = load_base("builtin:tiny-code-lm", "causal-lm")
            party = Participant(job(**settings), base=loaded)
        run = FederatedRun.create(store, f"run-{kind}", party.job, party.spec, party.initial_state())
        round_ = run.open_round(["ann"])
        payload = train(party, round_, "ann")
        sizes[kind] = len(payload)
        assert len(payload) > party.spec.payload_bytes("fp32")
    assert sizes["ffa-lora"] <= most * sizes["lora"], sizes


# --- death and resurrection ------------------------------------------------------------------------------------------


def test_a_run_resumed_in_mid_round_commits_the_same_bytes_and_asks_nobody_twice(tiny_llama, tmp_path):
    party = participant(tiny_llama())
    with open_store(tmp_path / "whole") as store:
        whole = start(store, party)
        while not whole.done:
            whole_round(party, whole)
        expected = whole.state_digest

    with open_store(tmp_path / "killed") as store:
        run = start(store, party)
        whole_round(party, run)
        round_ = run.open_round(CLIENTS)
        deliver(round_, "eve", train(party, round_, "eve"))
        deliver(round_, "ann", train(party, round_, "ann"))
        del run, round_  # the process dies here: nothing is finished, closed or flushed by the run

    with open_store(tmp_path / "killed") as store:
        resumed = FederatedRun.resume(store, RUN, party.spec, party.initial_state())
        assert resumed.job == party.job
        assert resumed.committed_rounds == 1
        round_ = resumed.open_round([*CLIENTS, "somebody-new"])
        assert round_.number == 2
        assert round_.selected == CLIENTS
        assert round_.accepted() == ("ann", "eve")
        assert round_.missing() == ("bob",)
        again = deliver(round_, "eve", train(party, round_, "eve"))  # its acknowledgement got lost
        assert not again.new
        deliver(round_, "bob", train(party, round_, "bob"))
        round_.commit()
        assert resumed.done
        assert resumed.state_digest == expected
        assert len(store.deltas(RUN, 2)) == 3
        store.verify_ledger(RUN)


def test_a_run_resumed_between_rounds_or_after_the_last_stands_where_it_stood(tiny_llama, store):
    party = participant(tiny_llama())
    run = start(store, party)
    for committed in (1, 2):
        whole_round(party, run)
        resumed = FederatedRun.resume(store, RUN, party.spec, party.initial_state())
        assert resumed.committed_rounds == committed
        assert resumed.state_digest == run.state_digest
        assert same(resumed.state(), run.state())
    assert resumed.done


def test_a_run_starts_from_the_state_it_was_given(tiny_llama, store):
    party = participant(tiny_llama())
    run = start(store, party)
    assert same(run.state(), party.initial_state())
    assert run.state_digest == store.blobs.put_bytes(pack_state(party.spec, party.initial_state()))


# --- what is refused -------------------------------------------------------------------------------------------------


def test_a_bad_delta_is_refused_with_a_reason_and_the_round_goes_on(tiny_llama, store):
    party = participant(tiny_llama(), clients={"min_to_commit": 2})
    run = start(store, party)
    round_ = run.open_round(CLIENTS)
    with pytest.raises(DeltaRefused) as caught:
        deliver(round_, "ann", forged(party, round_, "ann", weight=3, round=9))
    assert caught.value.code == "round"
    with pytest.raises(DeltaRefused) as caught:
        deliver(round_, "ann", forged(party, round_, "ann", weight=3, scale=float("nan")))
    assert caught.value.code == "not-finite"
    with pytest.raises(DeltaRefused) as caught:
        deliver(round_, "mallory", forged(party, round_, "ann", weight=3))
    assert caught.value.code == "not-selected"
    assert [(r.client, r.code) for r in store.refusals(RUN)] == [
        ("ann", "round"),
        ("ann", "not-finite"),
        ("mallory", "not-selected"),
    ]
    assert round_.missing() == CLIENTS
    before = run.state()
    payloads = {c: forged(party, round_, c, weight=EXAMPLES[c]) for c in ("bob", "eve")}
    for client, payload in payloads.items():
        deliver(round_, client, payload)
    assert round_.commit()["accepted"] == 2
    expected = mean_by_hand(before, payloads, {"bob": 5, "eve": 9})
    assert all(torch.allclose(run.state()[n].double(), expected[n], atol=1e-6, rtol=0) for n in expected)
    store.verify_ledger(RUN)


def test_the_first_delta_of_a_client_stays(tiny_llama, store):
    party = participant(tiny_llama())
    run = start(store, party)
    round_ = run.open_round(CLIENTS)
    first = deliver(round_, "ann", forged(party, round_, "ann", weight=3))
    with pytest.raises(FedPeftError, match="has delivered delta") as caught:
        deliver(round_, "ann", forged(party, round_, "ann", weight=3, scale=0.2))
    assert caught.value.field == "delta"
    for client in ("bob", "eve"):
        deliver(round_, client, forged(party, round_, client, weight=EXAMPLES[client]))
    round_.commit()
    assert store.deltas(RUN, 1)[0].digest == first.digest
    with open_store(store.blobs.root.parent.parent / "control") as control:
        other = start(control, party)
        fresh = other.open_round(CLIENTS)
        for client in CLIENTS:
            deliver(fresh, client, forged(party, fresh, client, weight=EXAMPLES[client]))
        fresh.commit()
        assert other.state_digest == run.state_digest  # the second delta left no trace in the sum


def test_a_delta_that_comes_after_the_commit_is_refused(tiny_llama, store):
    party = participant(tiny_llama(), clients={"min_to_commit": 2})
    run = start(store, party)
    round_ = run.open_round(CLIENTS)
    payloads = {c: forged(party, round_, c, weight=EXAMPLES[c]) for c in CLIENTS}
    deliver(round_, "ann", payloads["ann"])
    deliver(round_, "bob", payloads["bob"])
    round_.commit()
    after = run.state_digest
    with pytest.raises(FedPeftError) as caught:
        deliver(round_, "eve", payloads["eve"])
    assert caught.value.field == "round"
    assert "next round" in str(caught.value)
    assert not deliver(round_, "bob", payloads["bob"]).new  # accepted before: told so again, not counted again
    second = run.open_round(CLIENTS)
    with pytest.raises(DeltaRefused) as refused:
        deliver(second, "eve", payloads["eve"])
    assert refused.value.code == "round"
    assert run.state_digest == after
    store.verify_ledger(RUN)


def test_too_few_deltas_do_not_make_a_round(tiny_llama, store):
    party = participant(tiny_llama(), clients={"min_to_commit": 2})
    run = start(store, party)
    round_ = run.open_round(CLIENTS)
    deliver(round_, "ann", forged(party, round_, "ann", weight=3))
    with pytest.raises(RunFailed) as caught:
        round_.commit()
    assert caught.value.field == "clients.min_to_commit"
    assert "round 1 has 1 of the 2 deltas" in str(caught.value)
    assert run.committed_rounds == 0
    deliver(round_, "bob", forged(party, round_, "bob", weight=5))
    round_.commit()
    assert run.committed_rounds == 1


def test_without_a_minimum_everybody_that_was_selected_is_needed(tiny_llama, store):
    party = participant(tiny_llama(), clients={"per_round": 2})
    round_ = start(store, party).open_round(CLIENTS)
    assert round_.needed == len(round_.selected) == 2


def test_weights_beyond_the_public_bound_are_refused(tiny_llama, store):
    party = participant(tiny_llama(), aggregation={"max_total_weight": 10})
    run = start(store, party)
    round_ = run.open_round(CLIENTS)
    # Everybody has an equal share of the bound, so that one client's weight cannot shut the others out.
    with pytest.raises(DeltaRefused, match=r"outside 0\.\.3") as caught:
        deliver(round_, "ann", forged(party, round_, "ann", weight=4, example_count=4))
    assert caught.value.code == "weight"
    with pytest.raises(DeltaRefused, match="must be the number of examples, 2") as caught:
        deliver(round_, "ann", forged(party, round_, "ann", weight=3, example_count=2))
    for name in ("ann", "bob", "eve"):
        deliver(round_, name, forged(party, round_, name, weight=3, example_count=3))
    assert [(r.client, r.code) for r in store.refusals(RUN)] == [("ann", "weight"), ("ann", "weight")]
    assert round_.missing() == ()


def test_equal_weights_means_that_nobody_may_claim_more(tiny_llama, store):
    party = participant(tiny_llama(), aggregation={"weights": "equal"})
    round_ = start(store, party).open_round(CLIENTS)
    with pytest.raises(DeltaRefused) as caught:
        deliver(round_, "ann", forged(party, round_, "ann", weight=2))
    assert caught.value.code == "weight"
    deliver(round_, "ann", forged(party, round_, "ann", weight=1))


def test_a_rule_that_cannot_combine_the_kind_is_refused_with_the_job():
    with pytest.raises((JobError, ValueError), match="combines adapter kinds"):
        job(adapter={"kind": "lora"}, aggregation={"rule": "ffa"})


# --- special rounds --------------------------------------------------------------------------------------------------


def test_an_empty_poisson_round_keeps_the_state(tiny_llama, store):
    rate = 0.05
    party = participant(tiny_llama(), clients={"sample_rate": rate})
    assert not any(select_clients(CLIENTS, seed=7, round_number=t, sample_rate=rate) for t in (1, 2))
    run = start(store, party)
    before = run.state()
    round_ = run.open_round(CLIENTS)
    assert round_.selected == ()
    report = round_.commit()
    assert (report["selected"], report["accepted"], report["train_loss"]) == (0, 0, None)
    assert run.committed_rounds == 1
    assert same(run.state(), before)
    json.dumps(run_status(store, RUN), allow_nan=False)


def test_a_round_of_clients_without_weight_keeps_the_state(tiny_llama, store):
    party = participant(tiny_llama())
    run = start(store, party)
    before = run.state_digest
    round_ = run.open_round(CLIENTS)
    for client in CLIENTS:
        deliver(round_, client, forged(party, round_, client, weight=0))
    round_.commit()
    assert run.state_digest == before


def test_the_selection_of_a_round_is_that_of_the_prf(tiny_llama, store):
    party = participant(tiny_llama(), clients={"per_round": 2})
    run = start(store, party)
    for number in (1, 2):
        round_ = run.open_round(reversed(CLIENTS))
        assert round_.selected == select_clients(CLIENTS, seed=7, round_number=number, per_round=2)
        for client in round_.selected:
            deliver(round_, client, train(party, round_, client))
        round_.commit()


# --- records ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("retain", ["nothing", "deltas"])
def test_payloads_are_kept_or_deleted_as_the_job_says_and_the_ledger_verifies(tiny_llama, store, retain):
    party = participant(tiny_llama(), unlearning={"retain": retain})
    run = start(store, party)
    while not run.done:
        whole_round(party, run)
    rows = [row for number in (1, 2) for row in store.deltas(RUN, number)]
    assert len(rows) == 6
    assert [store.blobs.exists(row.digest) for row in rows] == [retain == "deltas"] * 6
    assert store.blobs.exists(run.state_digest)
    assert store.verify_ledger(RUN) > 8
    resumed = FederatedRun.resume(store, RUN, party.spec, party.initial_state())
    assert resumed.state_digest == run.state_digest


def test_the_status_is_plain_json(tiny_llama, store):
    party = participant(tiny_llama())
    run = start(store, party)
    whole_round(party, run)
    round_ = run.open_round(CLIENTS)
    with pytest.raises(DeltaRefused):
        deliver(round_, "ann", forged(party, round_, "bob", weight=3))
    store.record_evaluation(RUN, 1, "ann", "heldout", {"loss": 1.5, "count": 10.0})
    status = run_status(store, RUN)
    assert json.loads(json.dumps(status, allow_nan=False)) == status
    assert (status["round"], status["rounds_total"], status["state"]) == (1, 2, "running")
    ann = status["clients"][0]
    assert (ann["name"], ann["selected"], ann["delivered"], ann["refused"]) == ("ann", 2, 1, 1)
    assert ann["last_refusal"]["code"] == "client"
    assert ann["evaluations"] == [{"round": 1, "split": "heldout", "loss": 1.5, "count": 10.0}]
    assert status["privacy"].startswith("none")
    run.fail("the coffee machine broke")
    assert run_status(store, RUN)["error"] == "the coffee machine broke"


def test_an_exported_run_verifies_to_the_same_head(tiny_llama, store, tmp_path):
    party = participant(tiny_llama())
    run = start(store, party)
    while not run.done:
        whole_round(party, run)
    run.finish({"rounds": 2})
    store.create_run("another", "another", "", 1, None)
    folder = tmp_path / "fetched"
    folder.mkdir()
    for _ in range(2):  # also over what is there
        export_run(store, RUN, folder / LEDGER)
    assert sorted(path.name for path in folder.iterdir()) == [LEDGER]
    with open_run_folder(folder) as copy:
        assert [row.id for row in copy.runs()] == [RUN]
        assert copy.verify_ledger(RUN, store.ledger_head(RUN)) == store.verify_ledger(RUN)
        assert copy.ledger_entries(RUN) == store.ledger_entries(RUN)
        assert run_status(copy, RUN) == run_status(store, RUN)


def test_a_folder_that_is_no_run_folder_is_one_error(tmp_path):
    with pytest.raises(FedPeftError, match="is not a run folder"):
        open_run_folder(tmp_path)


def test_a_resumed_run_goes_on_from_the_state_that_it_began_with(tiny_llama, tmp_path):
    """The initial state may be another after a restart (an edited start_from folder); the open round's start stands."""
    party = participant(tiny_llama())
    with open_store(tmp_path / "run") as store:
        run = start(store, party)
        began = run.open_round(CLIENTS).start_digest
    with open_store(tmp_path / "run") as store:
        other = {name: value + 1 for name, value in party.initial_state().items()}
        run = FederatedRun.resume(store, RUN, party.spec, other)
        assert run.state_digest == began
        assert run.open_round(CLIENTS).start_digest == began
