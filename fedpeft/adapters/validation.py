"""The gate: a delta is combined only if it is exactly what the round asked this client for.

Everything is checked before anything is folded in: that the bytes are a safetensors object and nothing more, kind, base
fingerprint, run, round, client, starting state, codec, the exact set of tensor names, their shapes and number format,
size, weight, and then, reading the tensors piece by piece, that every number is finite and within the public bound on
which the fixed-point scale rests. A refusal has a code (for metrics and the ledger) and a sentence (for the client).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from fedpeft.adapters.delta import MAX_HEADER_BYTES, PackedFile
from fedpeft.adapters.manifest import DTYPE_OF_CODEC
from fedpeft.adapters.spec import CODEC_BYTES, AdapterSpec, short_seeded
from fedpeft.errors import DeltaRefused

_PIECE = 1 << 16
MAX_METRICS = 64
MAX_METRIC_NAME = 64


@dataclass(frozen=True)
class Expectation:
    """What the coordinator expects of one client's delta in one round."""

    run_id: str
    round: int
    client: str
    start_state: str
    spec: AdapterSpec
    codec: str
    max_abs: float
    max_weight: int
    equal_weights: bool = False

    @property
    def max_bytes(self) -> int:
        """Largest acceptable object; an upload is cut off beyond it."""
        return self.spec.elements * CODEC_BYTES[self.codec] + MAX_HEADER_BYTES


def check_delta(path: Path, expected: Expectation) -> PackedFile:
    """Open and check a delta. Returns it ready to be folded in.

    Raises:
        DeltaRefused: with the code and sentence of the first thing that is wrong.
    """
    if (size := path.stat().st_size) > expected.max_bytes:
        raise DeltaRefused("size", f"is larger than the {expected.max_bytes} bytes expected", field="delta", value=size)
    delta = PackedFile(path)
    _check_manifest(delta, expected)
    _check_tensors(delta, expected.spec.shapes, DTYPE_OF_CODEC[expected.codec])
    _check_values(delta, expected.max_abs)
    return delta


def _check_manifest(delta: PackedFile, expected: Expectation) -> None:
    manifest = delta.manifest
    for code, name, got, want in (
        ("fingerprint", "base_fingerprint", manifest.base_fingerprint, expected.spec.base_fingerprint),
        ("kind", "kind", manifest.kind, expected.spec.kind),
        ("run", "run_id", manifest.run_id, expected.run_id),
        ("round", "round", manifest.round, expected.round),
        ("client", "client", manifest.client, expected.client),
        ("start-state", "start_state", manifest.start_state, expected.start_state),
        ("codec", "codec", manifest.codec, expected.codec),
    ):
        if got != want:
            raise DeltaRefused(
                code, f"does not match the round, which expects {want!r}", field=f"manifest.{name}", value=got
            )
    wanted = {s.name: (s.shape, s.orthonormal) for s in short_seeded(expected.spec.seeded)}
    if {s.name: (s.shape, s.orthonormal) for s in manifest.seeded} != wanted:
        raise DeltaRefused("seeded", "lists other regenerated tensors than the round", field="manifest.seeded")
    if any(len(name) > MAX_METRIC_NAME or not name.isprintable() for name in manifest.metrics):
        raise DeltaRefused("metrics", f"names must be printable and at most {MAX_METRIC_NAME} characters long")
    if len(manifest.metrics) > MAX_METRICS:
        raise DeltaRefused(
            "metrics", f"holds more than {MAX_METRICS} figures", field="manifest.metrics", value=len(manifest.metrics)
        )
    if expected.equal_weights and manifest.weight != 1:
        raise DeltaRefused("weight", "must be 1 in this job", field="manifest.weight", value=manifest.weight)
    if not expected.equal_weights and manifest.weight != manifest.example_count:
        raise DeltaRefused(
            "weight",
            f"must be the number of examples, {manifest.example_count}",
            field="manifest.weight",
            value=manifest.weight,
        )
    if not 0 <= manifest.weight <= expected.max_weight:
        raise DeltaRefused(
            "weight", f"is outside 0..{expected.max_weight}", field="manifest.weight", value=manifest.weight
        )


def _check_tensors(delta: PackedFile, shapes: Mapping[str, tuple[int, ...]], dtype: str) -> None:
    names = set(delta.names())
    if extra := sorted(names - shapes.keys()):
        raise DeltaRefused("extra-tensor", "is not part of the adapter", field=extra[0])
    if missing := sorted(shapes.keys() - names):
        raise DeltaRefused("missing-tensor", "is missing from the delta", field=missing[0])
    for name, shape in shapes.items():
        if delta.shape(name) != shape:
            raise DeltaRefused("shape", f"should have shape {shape}", field=name, value=delta.shape(name))
        if delta.dtype(name) != dtype:
            raise DeltaRefused("dtype", f"should be {dtype}", field=name, value=delta.dtype(name))


def _check_values(delta: PackedFile, max_abs: float) -> None:
    for name in delta.names():
        for piece in delta.chunks(name, _PIECE):
            low, high = (float(v) for v in torch.aminmax(piece))
            if not (low > float("-inf") and high < float("inf")):  # also false for NaN
                raise DeltaRefused("not-finite", "holds NaN or infinity", field=name, hint="lower the learning rate")
            if max(-low, high) > max_abs:
                raise DeltaRefused(
                    "out-of-bounds",
                    f"has an entry beyond aggregation.max_abs = {max_abs}",
                    field=name,
                    value=max(-low, high),
                    hint="lower the learning rate, or raise the bound in the job file",
                )
