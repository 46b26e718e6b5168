"""Attaching: names, what trains, first values, and the exchange with stock PEFT."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict

from fedpeft.adapters.attach import attach, complete_state
from fedpeft.adapters.fingerprint import base_fingerprint
from fedpeft.adapters.peft_folder import read_peft_folder, write_peft_folder
from fedpeft.errors import FedPeftError, JobError
from fedpeft.job.schema import AdapterSection

IDS = torch.randint(0, 64, (2, 10), generator=torch.Generator().manual_seed(1))


def attached(model, seed=7, **section):
    settings = {"kind": "ffa-lora", "rank": 3, "alpha": 7.0, **section}
    fingerprint = base_fingerprint(model.state_dict())
    return attach(
        model, AdapterSection(**settings), seed=seed, task="causal-lm", fingerprint=fingerprint, base_name="tiny"
    )


def noise_like(state):
    generator = torch.Generator().manual_seed(5)
    return {n: 0.1 * torch.randn(t.shape, generator=generator) for n, t in state.items()}


@pytest.mark.parametrize("kind", ["lora", "ffa-lora"])
def test_the_adapted_model_starts_equal_to_the_base(tiny_llama, kind):
    before = tiny_llama()(IDS).logits
    assert torch.equal(attached(tiny_llama(), kind=kind).model(IDS).logits, before)


def test_ffa_trains_and_sends_b_only_and_half_the_bytes_of_lora(tiny_llama):
    ffa, lora = attached(tiny_llama()), attached(tiny_llama(), kind="lora")
    assert all(".lora_B." in t.name for t in ffa.spec.tensors)
    assert [p.requires_grad for n, p in ffa.model.named_parameters() if ".lora_A." in n] == [False] * 14
    assert {n for n, p in ffa.model.named_parameters() if p.requires_grad}.__len__() == 14
    assert {s.name for s in ffa.spec.seeded} | set(ffa.spec.shapes) == set(lora.spec.shapes)
    square = {"target_modules": ["q_proj", "o_proj"]}
    half, whole = attached(tiny_llama(), **square), attached(tiny_llama(), kind="lora", **square)
    assert half.spec.payload_bytes("fp32") * 2 == whole.spec.payload_bytes("fp32")


@pytest.mark.parametrize("kind", ["lora", "ffa-lora"])
@pytest.mark.parametrize("extra", [{}, {"rank_stabilised": True}, {"orthonormal": True}])
def test_stock_peft_loads_what_we_write_and_gives_the_same_logits(tiny_llama, tmp_path, kind, extra):
    ours = attached(tiny_llama(), kind=kind, **extra)
    ours.write(noise_like(ours.read()))
    write_peft_folder(tmp_path, ours.spec, ours.read(), seed=7)
    theirs = PeftModel.from_pretrained(tiny_llama(), str(tmp_path)).eval()
    assert torch.equal(theirs(IDS).logits, ours.model(IDS).logits)
    assert not torch.equal(theirs(IDS).logits, tiny_llama()(IDS).logits)


def test_we_load_what_stock_peft_writes(tiny_llama, tmp_path):
    config = LoraConfig(r=3, lora_alpha=7, target_modules="all-linear", task_type="CAUSAL_LM")
    theirs = get_peft_model(tiny_llama(), config).eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.1)
    theirs.save_pretrained(tmp_path)
    ours = attached(tiny_llama(), kind="lora")
    ours.write(read_peft_folder(tmp_path, ours.spec, seed=7))
    assert torch.equal(ours.model(IDS).logits, theirs(IDS).logits)


def test_our_keys_are_the_keys_of_pefts_own_state_dict(tiny_llama):
    ours = attached(tiny_llama())
    theirs = get_peft_model_state_dict(ours.model)
    whole = complete_state(ours.spec, ours.read(), seed=7)
    assert whole.keys() == theirs.keys()
    assert all(torch.equal(whole[k], theirs[k]) for k in whole)


def test_the_folder_is_the_same_bytes_every_time(tiny_llama, tmp_path):
    for sub in ("a", "b"):
        ours = attached(tiny_llama())
        write_peft_folder(tmp_path / sub, ours.spec, ours.read(), seed=7)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_an_ffa_run_does_not_start_from_somebody_elses_a(tiny_llama, tmp_path):
    ours = attached(tiny_llama(), seed=8)
    write_peft_folder(tmp_path, ours.spec, ours.read(), seed=8)
    with pytest.raises(FedPeftError, match="holds its own values"):
        read_peft_folder(tmp_path, attached(tiny_llama(), seed=7).spec, seed=7)


def test_a_target_that_matches_nothing_lists_what_exists(tiny_llama):
    with pytest.raises(JobError) as caught:
        attached(tiny_llama(), target_modules=["q_projj"])
    assert "did you mean 'q_proj'?" in str(caught.value)
    assert "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj" in str(caught.value)


def test_the_head_of_a_classifier_travels_only_when_asked():
    from transformers import ViTConfig, ViTForImageClassification

    def vit():
        torch.manual_seed(0)
        return ViTForImageClassification(
            ViTConfig(image_size=8, patch_size=4, num_channels=1, hidden_size=8, num_hidden_layers=1, num_labels=3,
                      num_attention_heads=2, intermediate_size=16)
        ).requires_grad_(False)  # fmt: skip

    def spec(train_head):
        section = AdapterSection(kind="ffa-lora", rank=2, train_head=train_head)
        return attach(vit(), section, seed=1, task="image-classification", fingerprint="0" * 64, base_name="v").spec

    assert not [t for t in spec(False).shapes if "classifier" in t]
    assert [t for t in spec(True).shapes if "classifier" in t] == [
        "base_model.model.classifier.bias",
        "base_model.model.classifier.weight",
    ]


def test_the_fingerprint_sees_one_changed_weight_and_nothing_else(tiny_llama):
    state = tiny_llama().state_dict()
    before = base_fingerprint(state)
    assert base_fingerprint(dict(reversed(state.items()))) == before
    name = "model.layers.1.mlp.up_proj.weight"
    state[name] = state[name].clone()
    state[name][3, 4] += 1e-7
    assert base_fingerprint(state) != before
