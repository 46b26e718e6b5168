"""Which number format a device should multiply in.

A CPU without bf16 instructions runs a native bf16 matrix product in a scalar loop: on an AVX2 machine that was
measured at 43 times the time of upcasting and multiplying in fp32. So a job's ``precision = "bf16"`` is a wish: it is
granted where the hardware has the instructions (CUDA from Ampere on; CPUs with AVX512-BF16 or AMX tiles) and answered
with fp32 elsewhere. The run is then slower than hoped but correct, and the caller can say so.
"""

from __future__ import annotations

import torch


def has_bf16_products(device: torch.device) -> bool:
    """Whether ``device`` multiplies bf16 matrices in hardware."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return device.type == "mps"


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The format for matrix products under a job's ``precision`` ("fp32" or "bf16") on ``device``."""
    return torch.bfloat16 if precision == "bf16" and has_bf16_products(device) else torch.float32
