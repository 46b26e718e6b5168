"""Randomness as a function: every random choice of a run is PRF(run seed, purpose, client, round, ...).

No choice depends on the order in which things happen or on how many clients there are. That is what makes a simulation
and a deployment produce the same bytes, a killed run resume to the same result, and a replay without one client equal
a run that never had it. The function is HMAC-SHA256 over an unambiguous encoding of its arguments (length-prefixed,
with a type tag, so that ``("ab", "c")`` and ``("a", "bc")``, or ``1`` and ``"1"``, differ).

>>> prf_bytes(7, "select", "hospital-a", 3) == prf_bytes(7, "select", "hospital-a", 3)
True
>>> prf_bytes(7, "select", "hospital-a", 3) == prf_bytes(7, "select", "hospital-a", 4)
False

This is for *reproducible* choices. Privacy noise is not drawn from here by default: a seed that the server knows makes
the noise removable.
"""

from __future__ import annotations

import hashlib
import hmac

import numpy as np
import torch

Part = str | int | bytes


def _encode(part: Part) -> bytes:
    if isinstance(part, bytes):
        tag, body = b"b", part
    elif isinstance(part, str):
        tag, body = b"s", part.encode()
    else:
        tag, body = b"i", str(int(part)).encode()
    return tag + len(body).to_bytes(8, "big") + body


def prf_bytes(seed: int, purpose: str, *parts: Part) -> bytes:
    """32 pseudo-random bytes for ``(seed, purpose, *parts)``."""
    key = _encode(seed)
    return hmac.new(key, b"".join(_encode(p) for p in (purpose, *parts)), hashlib.sha256).digest()


def prf_int(seed: int, purpose: str, *parts: Part) -> int:
    """A uniform integer in [0, 2^63): a seed for another generator."""
    return int.from_bytes(prf_bytes(seed, purpose, *parts)[:8], "big") >> 1


def prf_uniform(seed: int, purpose: str, *parts: Part) -> float:
    """A uniform number in [0, 1) with 53 random bits."""
    return (int.from_bytes(prf_bytes(seed, purpose, *parts)[:8], "big") >> 11) * 2.0**-53


def numpy_generator(seed: int, purpose: str, *parts: Part) -> np.random.Generator:
    """A Philox generator: its raw stream is the same on every platform and for every numpy version."""
    return np.random.Generator(philox(seed, purpose, *parts))


def philox(seed: int, purpose: str, *parts: Part) -> np.random.Philox:
    """The raw bit stream behind :func:`numpy_generator`."""
    key = np.frombuffer(prf_bytes(seed, purpose, *parts)[:16], dtype="<u8").astype(np.uint64)
    return np.random.Philox(key=key)


def torch_generator(seed: int, purpose: str, *parts: Part) -> torch.Generator:
    """A CPU torch generator."""
    return torch.Generator().manual_seed(prf_int(seed, purpose, *parts))
