"""Small real models that several tests share; nothing is downloaded."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, settings
from transformers import LlamaConfig, LlamaForCausalLM

settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=50)
settings.load_profile("default")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def tiny_llama() -> Callable[[], LlamaForCausalLM]:
    """Maker of a two-layer Llama with non-square projections; the same weights every time."""

    def make() -> LlamaForCausalLM:
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
        with torch.random.fork_rng():
            torch.manual_seed(3)
            return LlamaForCausalLM(config).eval().requires_grad_(False)

    return make
