"""Base models: whatever the origin, the result is float32, frozen, in evaluation mode, and got without running code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from fedpeft.errors import FedPeftError
from fedpeft.models import load_base


@pytest.fixture
def folder(tmp_path: Path, tiny_llama: Callable[[], LlamaForCausalLM]) -> Path:
    """A model folder in bfloat16, with the tokenizer of the built-in model cut down to it."""
    tiny_llama().to(torch.bfloat16).save_pretrained(tmp_path)
    tokenizer: PreTrainedTokenizerFast = load_base("builtin:tiny-code-lm", "causal-lm").tokenizer  # type: ignore[assignment]
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("spec", "task"), [("builtin:tiny-code-lm", "causal-lm"), ("builtin:digits-vit", "image-classification")]
)
def test_a_builtin_base_is_frozen_float32(spec: str, task: str) -> None:
    model = load_base(spec, task).model
    assert not model.training
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in model.parameters())


def test_a_folder_is_loaded_widened_and_frozen(folder: Path, tiny_llama: Callable[[], LlamaForCausalLM]) -> None:
    base = load_base(str(folder), "causal-lm")
    original = tiny_llama().to(torch.bfloat16).float().state_dict()
    for name, tensor in base.model.state_dict().items():
        assert torch.equal(tensor, original[name]), name
    assert not any(p.requires_grad for p in base.model.parameters())


def test_a_head_that_the_folder_lacks_is_the_same_for_everyone(folder: Path) -> None:
    torch.manual_seed(1)
    one = load_base(str(folder), "sequence-classification", num_labels=3)
    torch.manual_seed(2)
    two = load_base(str(folder), "sequence-classification", num_labels=3)
    assert one.model.config.num_labels == 3
    assert torch.equal(one.model.score.weight, two.model.score.weight)


@pytest.mark.parametrize(
    ("spec", "task", "num_labels", "says"),
    [
        ("builtin:tiny-code", "causal-lm", None, "did you mean 'builtin:tiny-code-lm'?"),
        ("builtin:digits-vit", "causal-lm", None, "made for image-classification, not for causal-lm"),
        ("builtin:digits-vit", "image-classification", 5, "this model has 10 classes, the data needs 5"),
        ("./no-such-model", "causal-lm", None, "model.base: no such folder (got './no-such-model')"),
        ("nobody/has-this-model", "causal-lm", None, "the hub model cannot be fetched"),
        ("builtin:tiny-code-lm", "causal", None, "unknown task"),
    ],
)
def test_a_mistake_is_named(spec: str, task: str, num_labels: int | None, says: str) -> None:
    with pytest.raises(FedPeftError) as error:
        load_base(spec, task, num_labels)
    assert says in str(error.value)


def test_a_folder_with_pickled_weights_only_is_refused(folder: Path) -> None:
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FedPeftError, match="the folder cannot be loaded"):
        load_base(str(folder), "causal-lm")


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FedPeftError, match=r"has no config\.json"):
        load_base(str(tmp_path), "causal-lm")
