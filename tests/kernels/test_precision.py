"""bf16 is a wish: granted where the hardware multiplies it, answered with fp32 elsewhere."""

from __future__ import annotations

import pytest
import torch

from fedpeft_kernels import precision
from fedpeft_kernels.precision import compute_dtype, has_bf16_products

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("wish", "hardware", "granted"),
    [
        ("fp32", False, torch.float32),
        ("fp32", True, torch.float32),
        ("bf16", False, torch.float32),
        ("bf16", True, torch.bfloat16),
    ],
)
def test_bf16_is_granted_only_where_it_is_asked_for_and_there(monkeypatch, wish, hardware, granted):
    monkeypatch.setattr(precision, "has_bf16_products", lambda device: hardware)
    assert compute_dtype(wish, CPU) == granted


@pytest.mark.parametrize(("avx512", "amx"), [(False, False), (True, False), (False, True), (True, True)])
def test_a_cpu_has_bf16_products_with_either_instruction_set(monkeypatch, avx512, amx):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert has_bf16_products(CPU) is (avx512 or amx)


@pytest.mark.parametrize(("capability", "has"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_a_gpu_has_bf16_products_from_ampere_on(monkeypatch, capability, has):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert has_bf16_products(torch.device("cuda", 0)) is has


def test_the_probes_of_this_torch_answer_on_this_machine():
    assert isinstance(has_bf16_products(CPU), bool)
    assert compute_dtype("bf16", CPU) == (torch.bfloat16 if has_bf16_products(CPU) else torch.float32)
