"""The local loop: a pure function of seed, client, round, data and start; equal to the loop one would write by hand."""

from __future__ import annotations

import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from transformers import BertConfig, BertForSequenceClassification

from fedpeft.adapters.attach import AttachedAdapter, attach
from fedpeft.adapters.fingerprint import base_fingerprint
from fedpeft.data.encode import Encoded
from fedpeft.errors import FedPeftError
from fedpeft.job.schema import AdapterSection, TrainSection
from fedpeft.prf import prf_int
from fedpeft.training.loop import evaluate, learning_rate, train_round
from fedpeft_kernels import precision


def token_blocks(examples=7, length=12):
    """Blocks of unequal length; the first token of block i is i, so that a block can be recognised."""
    generator = torch.Generator().manual_seed(11)
    ids = torch.randint(0, 64, (examples, length), generator=generator)
    ids[:, 0] = torch.arange(examples)
    mask = (torch.arange(length)[None] < torch.tensor([length - 2 * (i % 4) for i in range(examples)])[:, None]).long()
    return Encoded({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})


def attached(model, **section) -> AttachedAdapter:
    settings = {"kind": "lora", "rank": 3, "alpha": 6.0, **section}
    fingerprint = base_fingerprint(model.state_dict())
    return attach(model, AdapterSection(**settings), seed=7, task="causal-lm", fingerprint=fingerprint, base_name="t")


def section(**settings) -> TrainSection:
    return TrainSection(**{"local_steps": 3, "batch_size": 2, "learning_rate": 0.02, **settings})


def trained(adapter, data, train_section, *, seed=7, client="a", round_number=1, rounds_total=4, **more):
    """The state after one round, from the adapter's seeded start."""
    result = train_round(
        adapter,
        data,
        train_section,
        seed=seed,
        client=client,
        round_number=round_number,
        rounds_total=rounds_total,
        **more,
    )
    return adapter.read(), result


def same(left, right) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# --- what the result depends on --------------------------------------------------------------------------------------


def test_the_same_seed_client_and_round_give_the_same_bits_and_any_change_others(tiny_llama):
    data, steps = token_blocks(), section()

    def run(**who):
        return trained(attached(tiny_llama()), data, steps, **who)[0]

    first = run()
    assert same(first, run())
    for change in ({"seed": 8}, {"client": "b"}, {"round_number": 2}):
        assert not same(first, run(**change)), change


def test_dropout_is_a_function_of_seed_client_and_round_and_leaves_the_global_generator_alone(tiny_llama):
    data, steps = token_blocks(examples=1), section(batch_size=1)  # no order of examples: only the masks can differ

    def run(dropout=0.4, global_seed=99, **who):
        adapter = attached(tiny_llama(), dropout=dropout)
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        state, _ = trained(adapter, data, steps, **who)
        assert torch.equal(torch.get_rng_state(), before)
        return state

    first = run()
    assert same(first, run(global_seed=100))
    assert not same(first, run(dropout=0.0))
    for change in ({"seed": 8}, {"client": "b"}, {"round_number": 2}):
        assert same(run(dropout=0.0), run(dropout=0.0, **change)), change
        assert not same(first, run(**change)), change


def test_only_the_adapter_moves(tiny_llama):
    model = tiny_llama()
    before = base_fingerprint(model.state_dict())
    adapter = attached(model)
    frozen = {n: p.clone() for n, p in adapter.model.named_parameters() if not p.requires_grad}
    start = adapter.read()
    state, _ = trained(adapter, token_blocks(), section(weight_decay=0.1))
    assert all(not torch.equal(state[name], start[name]) for name in start)
    after = dict(adapter.model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in frozen.items())
    bare = adapter.model.unload()
    assert base_fingerprint(bare.state_dict()) == before


def test_the_model_is_left_in_evaluation_mode_and_the_threads_as_they_were(tiny_llama):
    adapter, data = attached(tiny_llama()), token_blocks()
    seen = []

    def stop(done, total, loss):
        seen.append((done, total, torch.get_num_threads(), adapter.model.training))
        raise KeyboardInterrupt

    before = torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt):
        trained(adapter, data, section(threads=before + 1), progress=stop)
    assert seen == [(1, 3, before + 1, True)]
    assert torch.get_num_threads() == before
    assert not adapter.model.training
    evaluate(adapter.model, data, threads=before + 1)
    assert torch.get_num_threads() == before


def test_progress_and_result_tell_the_losses_of_the_steps(tiny_llama):
    told = []
    _, result = trained(attached(tiny_llama()), token_blocks(), section(), progress=lambda *facts: told.append(facts))
    assert [(done, total) for done, total, _ in told] == [(1, 3), (2, 3), (3, 3)]
    losses = [loss for _, _, loss in told]
    assert result.loss_first == losses[0]
    assert result.loss_mean == pytest.approx(sum(losses) / 3)
    assert result.metrics() == {"train_loss_first": losses[0], "train_loss_mean": result.loss_mean, "steps": 3.0}


# --- against a loop written by hand ----------------------------------------------------------------------------------


def by_hand(model, start, data, *, seed, client, round_number, settings):
    """Plain torch: the definition of LoRA's loss, an optimiser, a walk through permutations. Nothing of our loop."""
    parameters = {n.replace(".default", ""): p for n, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(start[name])
    values = [parameters[name] for name in sorted(parameters)]
    rate = settings["learning_rate"]
    if settings["optimizer"] == "sgd":
        optimizer = torch.optim.SGD(values, lr=rate, momentum=0.5, weight_decay=0.01)
    else:
        optimizer = torch.optim.AdamW(values, lr=rate, weight_decay=0.01)
    ids, labels = data.tensors["input_ids"], data.tensors["labels"]
    n, size, steps, accumulate = len(ids), settings["batch_size"], settings["local_steps"], settings["accumulate"]
    walk = []
    for epoch in range(1 + round_number * steps * accumulate * size // n):
        generator = torch.Generator().manual_seed(prf_int(seed, "batch-order", client, epoch))
        walk += torch.randperm(n, generator=generator).tolist()
    at = (round_number - 1) * steps * accumulate * size
    model.train()
    for _ in range(steps):
        grads = [torch.zeros_like(p) for p in values]
        for _ in range(accumulate):
            pick = walk[at : at + size]
            at += size
            logits = model(input_ids=ids[pick], attention_mask=data.tensors["attention_mask"][pick]).logits
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[pick][:, 1:].flatten(), ignore_index=-100)
            for total, grad in zip(grads, torch.autograd.grad(loss, values), strict=True):
                total += grad / accumulate
        if settings["max_grad_norm"] is not None:
            norm = math.sqrt(sum(float(g.double().square().sum()) for g in grads))
            grads = [g * min(1.0, settings["max_grad_norm"] / norm) for g in grads]
        for p, grad in zip(values, grads, strict=True):
            p.grad = grad
        optimizer.step()
    return {name: p.detach().clone() for name, p in parameters.items()}


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize(("accumulate", "max_grad_norm"), [(1, None), (2, None), (1, 0.05), (3, 0.05)])
def test_equal_to_a_loop_written_by_hand(tiny_llama, optimizer, accumulate, max_grad_norm):
    from peft import LoraConfig, get_peft_model

    data = token_blocks()
    settings = {
        "optimizer": optimizer,
        "learning_rate": 0.01 if optimizer == "adamw" else 0.5,
        "batch_size": 3,
        "local_steps": 3,
        "accumulate": accumulate,
        "max_grad_norm": max_grad_norm,
    }
    ours = attached(tiny_llama())
    start = ours.read()
    got, _ = trained(
        ours, data, section(**settings, weight_decay=0.01, momentum=0.5), seed=7, client="hospital", round_number=2
    )
    theirs = get_peft_model(tiny_llama(), LoraConfig(r=3, lora_alpha=6, target_modules="all-linear"))
    expected = by_hand(theirs, start, data, seed=7, client="hospital", round_number=2, settings=settings)
    assert got.keys() == expected.keys()
    step = max(float((expected[name] - start[name]).abs().max()) for name in start)
    assert step > 1e-3  # it learned something, and the comparison below means something
    for name, value in expected.items():
        assert torch.allclose(got[name], value, atol=2e-4 * step, rtol=1e-4), name


# --- the walk through the data ---------------------------------------------------------------------------------------


class Recorder(torch.nn.Module):
    """A real, very small model that notes which examples it was shown."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.batches = []

    def forward(self, index, labels):
        self.batches.append(index.tolist())
        return SimpleNamespace(loss=(self.weight - labels).square().mean())


def walk(examples, rounds, *, client="a", **settings):
    model = Recorder()
    adapter = AttachedAdapter(model, None, {"weight": model.weight})  # type: ignore[arg-type]
    data = Encoded({"index": torch.arange(examples), "labels": torch.ones(examples)})
    for number in range(1, rounds + 1):
        trained(adapter, data, section(**settings), round_number=number, rounds_total=rounds, client=client)
    return model.batches


@given(st.integers(1, 12), st.integers(1, 15), st.integers(1, 4), st.integers(1, 3), st.integers(1, 4))
def test_every_example_is_seen_before_any_is_seen_again_also_across_rounds(examples, batch, steps, accumulate, rounds):
    batches = walk(examples, rounds, batch_size=batch, local_steps=steps, accumulate=accumulate)
    assert len(batches) == rounds * steps * accumulate
    assert all(len(b) == min(batch, examples) for b in batches)
    shown = [index for b in batches for index in b]
    for at in range(0, len(shown), examples):
        times = Counter(shown[at : at + examples])
        assert max(times.values()) == 1
    counts = Counter(shown)
    assert max(counts.values()) - min(counts.get(i, 0) for i in range(examples)) <= 1


def test_the_order_changes_from_pass_to_pass_and_from_client_to_client():
    batches = walk(16, 2, batch_size=16, local_steps=1)
    assert sorted(batches[0]) == sorted(batches[1])
    assert batches[0] != batches[1]
    assert walk(16, 1, batch_size=16, local_steps=1, client="b")[0] != batches[0]


def test_a_batch_larger_than_the_data_is_all_the_data_once(tiny_llama):
    data = token_blocks(examples=3)
    large, _ = trained(attached(tiny_llama()), data, section(batch_size=64))
    whole, _ = trained(attached(tiny_llama()), data, section(batch_size=3))
    assert same(large, whole)


# --- learning rate ---------------------------------------------------------------------------------------------------


@given(
    st.integers(1, 30),
    st.integers(0, 10),
    st.floats(1e-6, 1.0),
    st.sampled_from(["constant", "linear", "cosine"]),
)
def test_the_schedule_has_its_closed_form(rounds, warmup, peak, schedule):
    train_section = section(learning_rate=peak, schedule=schedule, warmup_rounds=warmup)
    rates = [learning_rate(train_section, t, rounds) for t in range(1, rounds + 1)]
    for t, rate in enumerate(rates, start=1):
        if t <= warmup:
            expected = peak * t / (warmup + 1)
        else:
            x = (t - 1 - warmup) / (rounds - warmup)
            expected = {"constant": peak, "linear": peak * (1 - x), "cosine": peak * (1 + math.cos(math.pi * x)) / 2}[
                schedule
            ]
        assert rate == pytest.approx(expected, rel=1e-12, abs=0)
        assert 0 < rate <= peak
    if warmup < rounds:
        assert rates[warmup] == peak  # the first full round
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)


def test_the_round_trains_with_the_rate_of_the_schedule():
    def step(**settings):
        model = Recorder()
        adapter = AttachedAdapter(model, None, {"weight": model.weight})  # type: ignore[arg-type]
        data = Encoded({"index": torch.arange(2), "labels": torch.ones(2)})
        rate = {"optimizer": "sgd", "learning_rate": 0.1, "local_steps": 1}
        trained(adapter, data, section(**rate, **settings), round_number=3, rounds_total=4)
        return model.weight.item()  # the gradient of (w - 1)^2 at 0 is -2

    assert step() == pytest.approx(0.2)
    assert step(schedule="linear") == pytest.approx(0.2 * 0.5)
    assert step(warmup_rounds=3) == pytest.approx(0.2 * 0.75)


# --- what can go wrong -----------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_is_one_error_that_names_the_learning_rate(tiny_llama):
    adapter = attached(tiny_llama())
    before = torch.get_num_threads()
    with pytest.raises(FedPeftError) as caught:
        trained(adapter, token_blocks(), section(optimizer="sgd", learning_rate=1e30, local_steps=5), round_number=4)
    assert caught.value.field == "train.learning_rate"
    assert caught.value.value == 1e30
    assert "round 4" in str(caught.value)
    assert "train.max_grad_norm" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert torch.get_num_threads() == before
    assert not adapter.model.training


def test_a_model_without_gradient_checkpointing_is_one_error(tiny_llama):
    model = tiny_llama()
    model.supports_gradient_checkpointing = False
    with pytest.raises(FedPeftError) as caught:
        trained(attached(model), token_blocks(), section(gradient_checkpointing=True))
    assert caught.value.field == "train.gradient_checkpointing"
    assert "\n" not in str(caught.value)


# --- evaluation ------------------------------------------------------------------------------------------------------


def test_the_loss_of_a_language_model_is_that_of_the_whole_set_at_once(tiny_llama):
    model, data = tiny_llama(), token_blocks()
    with torch.no_grad():
        whole = float(model(**data.tensors).loss)
        naive = sum(float(model(**{k: v[i : i + 1] for k, v in data.tensors.items()}).loss) for i in range(7)) / 7
    assert abs(whole - naive) > 1e-3  # blocks of unequal length: a mean of means would be another figure
    for batch_size in (1, 3, 7, 100):
        metrics = evaluate(model, data, batch_size=batch_size)
        assert metrics["loss"] == pytest.approx(whole, rel=1e-5)
        assert metrics["count"] == int((data.tensors["labels"][:, 1:] != -100).sum())
        assert "accuracy" not in metrics


def tiny_bert():
    config = BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, num_labels=3
    )
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return BertForSequenceClassification(config).requires_grad_(False)


def test_loss_and_accuracy_of_a_classifier_are_those_counted_by_hand():
    model, blocks = tiny_bert().train(), token_blocks(examples=8)
    labels = torch.tensor([0, 1, 2, 2, 1, 0, 2, 2])
    data = Encoded({**blocks.tensors, "labels": labels})
    metrics = evaluate(model, data, batch_size=3)
    assert model.training  # restored; and dropout was off, else the figures below would differ
    model.eval()
    logits = torch.cat(
        [model(**{k: v[i : i + 1] for k, v in blocks.tensors.items() if k != "labels"}).logits for i in range(8)]
    )
    right = sum(
        max(range(3), key=lambda c: float(row[c])) == int(label) for row, label in zip(logits, labels, strict=True)
    )
    assert metrics["accuracy"] == right / 8
    assert metrics["count"] == 8
    picked = [
        -math.log(math.exp(row[y]) / sum(map(math.exp, row))) for row, y in zip(logits.tolist(), labels, strict=True)
    ]
    assert metrics["loss"] == pytest.approx(sum(picked) / 8, rel=1e-5)


def test_evaluation_changes_nothing(tiny_llama):
    adapter, data = attached(tiny_llama(), dropout=0.5), token_blocks()
    start, rng = adapter.read(), torch.get_rng_state()
    first = evaluate(adapter.model, data)
    assert evaluate(adapter.model, data) == first
    assert same(adapter.read(), start)
    assert torch.equal(torch.get_rng_state(), rng)


# --- ways to compute the same thing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing_computes_twice_and_gives_the_same_result(tiny_llama, dropout):
    def run(checkpointing):
        adapter = attached(tiny_llama(), dropout=dropout)
        calls = []
        layer = next(m for n, m in adapter.model.named_modules() if n.endswith("layers.0.mlp"))
        layer.register_forward_pre_hook(lambda *_: calls.append(1))
        state, result = trained(adapter, token_blocks(), section(gradient_checkpointing=checkpointing))
        assert not any(getattr(m, "gradient_checkpointing", False) for m in adapter.model.modules())
        return state, result, len(calls)

    plain, plain_result, once = run(False)
    saved, saved_result, twice = run(True)
    assert twice == 2 * once
    assert saved_result == plain_result
    assert all(torch.allclose(saved[name], plain[name], atol=1e-7) for name in plain)


def test_bf16_is_used_where_the_hardware_has_it_and_is_fp32_elsewhere(tiny_llama, monkeypatch):
    data = token_blocks()

    def run(wish, hardware):
        monkeypatch.setattr(precision, "has_bf16_products", lambda device: hardware)
        adapter = attached(tiny_llama())
        formats = set()
        layer = next(m for n, m in adapter.model.named_modules() if n.endswith("up_proj.base_layer"))
        layer.register_forward_hook(lambda module, args, output: formats.add(output.dtype))
        state, _ = trained(adapter, data, section(), precision=wish)
        evaluate(adapter.model, data, precision=wish)
        assert all(p.dtype == torch.float32 for p in adapter.model.parameters())
        return state, formats

    fp32, formats = run("fp32", True)
    assert formats == {torch.float32}
    fallback, formats = run("bf16", False)
    assert formats == {torch.float32}
    assert same(fallback, fp32)
    bf16, formats = run("bf16", True)
    assert formats == {torch.bfloat16}
    assert not same(bf16, fp32)
    assert all(torch.allclose(bf16[name], fp32[name], atol=0.1) for name in fp32)
