"""The identity of a frozen base model.

Two participants may only exchange deltas if they stand on the same base, so the base has a name that depends on nothing
but its content: SHA-256 over, for every entry of the state dict in order of name, (name, dtype, shape, SHA-256 of its
little-endian bytes). File layout, device and sharding do not matter; one changed weight does.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping

import torch

_DOMAIN = b"fedpeft base fingerprint v1\n"


def base_fingerprint(state: Mapping[str, torch.Tensor]) -> str:
    """Lowercase hex SHA-256 of a model's ``state_dict()``. Works one tensor at a time."""
    digest = hashlib.sha256(_DOMAIN)
    for name in sorted(state):
        tensor = state[name]
        line = (
            f"{name}\x00{str(tensor.dtype).removeprefix('torch.')}\x00{list(tensor.shape)}\x00{tensor_digest(tensor)}\n"
        )
        digest.update(line.encode())
    return digest.hexdigest()


def tensor_digest(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's bytes in row-major, little-endian order."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    if sys.byteorder == "big" and tensor.element_size() > 1:
        flat = flat.view(-1, tensor.element_size()).flip(1).reshape(-1)
    return hashlib.sha256(flat.numpy().data).hexdigest()
