"""The manifest: what a delta is, written beside its tensors.

It travels as a protobuf message (``proto/fedpeft/v1/manifest.proto``) inside the header of the safetensors object, so
one content address covers both. This module is its typed, immutable face; serialisation is deterministic. What the
same header says already (names, shapes and number format of the tensors) is not written twice: small adapters would
otherwise be half header.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.message import DecodeError

from fedpeft.adapters.spec import AdapterSpec, SeededSpec, TensorSpec, short_seeded
from fedpeft.errors import DeltaRefused

SCHEMA_VERSION = 1
DTYPE_OF_CODEC = {"fp32": "F32", "bf16": "BF16"}


@dataclass(frozen=True)
class Manifest:
    """Facts about one delta, or about a global state (then ``client`` is empty and ``weight`` 0).

    Attributes:
        weight: the client's weight in the mean: its number of training examples, or 1.
        example_count: training examples that the client holds.
        start_state: content address of the global state that training started from.
        metrics: figures of the local training; deterministic ones only, since they are part of the content address.
        ranks: rank per module; one entry ``*`` when all are equal.
        seeded: regenerated tensors; one entry ``*`` for the A of every pair.
        peft_config: what differs from PEFT's defaults.
    """

    kind: str
    base_fingerprint: str
    run_id: str
    round: int
    client: str
    start_state: str
    codec: str
    example_count: int
    weight: int
    tensors: tuple[TensorSpec, ...]
    seeded: tuple[SeededSpec, ...] = ()
    ranks: Mapping[str, int] = field(default_factory=dict)
    peft_config: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    version: str = ""

    def to_bytes(self) -> bytes:
        """Deterministic protobuf encoding, without the tensors (see the module)."""
        from fedpeft_proto.v1 import manifest_pb2 as pb

        message = pb.Manifest(
            schema_version=SCHEMA_VERSION,
            adapter_kind=self.kind,
            base_fingerprint=self.base_fingerprint,
            run_id=self.run_id,
            round=self.round,
            client=self.client,
            start_state=self.start_state,
            codec=self.codec,
            example_count=self.example_count,
            weight=float(self.weight),
            seeded=[
                pb.SeededTensor(name=s.name, seed_purpose="seeded-tensor", shape=s.shape, orthonormal=s.orthonormal)
                for s in self.seeded
            ],
            rank=_short(self.ranks),
            peft_config_json=json.dumps(self.peft_config, sort_keys=True, separators=(",", ":")),
            metrics=dict(self.metrics),
            privacy=pb.PrivacyFacts(mode="none"),
            fedpeft_version=self.version,
        )
        return message.SerializeToString(deterministic=True)

    @classmethod
    def from_bytes(cls, data: bytes, tensors: tuple[TensorSpec, ...] = ()) -> Manifest:
        """The manifest in ``data``, of an object that holds ``tensors``.

        Raises:
            DeltaRefused: code ``manifest``; ``data`` is not a manifest of this version.
        """
        from fedpeft_proto.v1 import manifest_pb2 as pb

        try:
            message = pb.Manifest.FromString(data)
            if message.schema_version != SCHEMA_VERSION:
                raise DeltaRefused(
                    "manifest",
                    "has an unknown schema version",
                    field="manifest.schema_version",
                    value=message.schema_version,
                    hint="client and server must run the same release of fedpeft",
                )
            return cls(
                kind=message.adapter_kind,
                base_fingerprint=message.base_fingerprint,
                run_id=message.run_id,
                round=message.round,
                client=message.client,
                start_state=message.start_state,
                codec=message.codec,
                example_count=message.example_count,
                weight=int(message.weight),
                tensors=tensors,
                seeded=tuple(
                    SeededSpec(s.name, (s.shape[0], s.shape[1]), _module_of(s.name), s.orthonormal)
                    for s in message.seeded
                ),
                ranks=dict(message.rank),
                peft_config=json.loads(message.peft_config_json or "{}"),
                metrics=dict(message.metrics),
                version=message.fedpeft_version,
            )
        except (DecodeError, ValueError, IndexError, OverflowError, RecursionError) as error:
            raise DeltaRefused("manifest", f"the manifest cannot be read: {error}") from None


def manifest_for(spec: AdapterSpec, **facts: Any) -> Manifest:
    """A manifest whose adapter facts come from ``spec``; the rest is given by keyword."""
    from fedpeft import __version__

    return Manifest(
        kind=spec.kind,
        base_fingerprint=spec.base_fingerprint,
        tensors=spec.tensors,
        seeded=short_seeded(spec.seeded),
        ranks=_short({p.module: p.rank for p in spec.pairs}),
        peft_config=spec.peft_changes,
        version=__version__,
        **facts,
    )


def _short(ranks: Mapping[str, int]) -> dict[str, int]:
    """One entry ``*`` when every module has the same rank."""
    return {"*": next(iter(ranks.values()))} if len(set(ranks.values())) == 1 else dict(ranks)


def _module_of(name: str) -> str:
    return name.removeprefix("base_model.model.").split(".lora_")[0]
