"""Seeded tensors: the same bits everywhere, nested in rank, distributed like PEFT's A."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.adapters.seeded import seeded_tensor
from fedpeft.errors import JobError


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.numpy().astype("<f4").tobytes()).hexdigest()


def test_values_are_pinned_for_all_time():
    """Changing these values would orphan every adapter made before: they are a wire format."""
    plain = seeded_tensor(7, "model.layers.0.self_attn.q_proj", (4, 24))
    orthonormal = seeded_tensor(7, "model.layers.0.self_attn.q_proj", (4, 24), orthonormal=True)
    assert digest(plain) == "6388fc0f422fd195a13ec6148dd5a6391f124faa29cd517f2087ab489aec124a"
    assert digest(orthonormal) == "589697f3d82e79d1b668a94e11782185f415449d1cb13b3571e5c75d318f4ff8"


@pytest.mark.parametrize("threads", ["1", "2"])
def test_another_process_with_other_vector_units_gives_the_same_bits(threads):
    """numpy and torch are told to use their most basic code paths; the bits do not change."""
    code = (
        "from fedpeft.adapters.seeded import seeded_tensor as s; import hashlib;"
        "print(hashlib.sha256(s(11, 'x.y', (8, 100), orthonormal=True).numpy().tobytes()).hexdigest())"
    )
    env = {
        "PATH": "/usr/bin",
        "NPY_DISABLE_CPU_FEATURES": "AVX2 FMA3 AVX512F AVX512CD AVX512_SKX",
        "ATEN_CPU_CAPABILITY": "default",
        "OMP_NUM_THREADS": threads,
    }
    printed = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=env, capture_output=True, text=True)
    assert printed.stdout.strip() == digest(seeded_tensor(11, "x.y", (8, 100), orthonormal=True)), printed.stderr


@given(st.integers(1, 12), st.integers(12, 70), st.booleans())
def test_a_smaller_rank_is_the_first_rows_of_a_larger(rank, width, orthonormal):
    large = seeded_tensor(5, "layer", (12, width), orthonormal=orthonormal)
    assert torch.equal(large[:rank], seeded_tensor(5, "layer", (rank, width), orthonormal=orthonormal))


@given(st.integers(1, 16), st.integers(16, 128))
def test_orthonormal_rows_make_the_norm_of_b_the_norm_of_the_update(rank, width):
    a = seeded_tensor(1, "l", (rank, width), orthonormal=True).double()
    b = torch.randn(9, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.linalg.norm(b @ a).item() == pytest.approx(torch.linalg.norm(b).item(), rel=1e-6)


def test_plain_values_follow_the_law_that_peft_draws_from():
    """Uniform on +-1/sqrt(n): bound, mean and variance, to five standard errors."""
    a = seeded_tensor(2, "l", (64, 400)).double().flatten()
    bound, count = 1 / 20, a.numel()
    assert a.abs().max() < bound
    assert abs(a.mean()) < 5 * bound / 3**0.5 / count**0.5
    assert a.var().item() == pytest.approx(bound**2 / 3, rel=5 * (0.8 / count) ** 0.5)


def test_other_seed_or_layer_gives_other_values():
    a = seeded_tensor(1, "l", (2, 8))
    assert not torch.equal(a, seeded_tensor(2, "l", (2, 8)))
    assert not torch.equal(a, seeded_tensor(1, "m", (2, 8)))


def test_more_orthonormal_rows_than_columns_are_refused():
    with pytest.raises(JobError, match=r"adapter.rank: layer l has 4 inputs"):
        seeded_tensor(1, "l", (5, 4), orthonormal=True)
