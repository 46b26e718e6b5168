"""Records, and the clients that own them.

A record is one example as its owner holds it, before any model sees it: a plain mapping, so that JSONL, Parquet, a
folder of images and a generator in memory all lead to the same thing.

=================  ==========================================================  =======================
task               required keys                                               types
=================  ==========================================================  =======================
causal-lm          ``text``                                                    str
sequence-          ``text``, ``label``                                         str, int
classification
image-             ``image``, ``label``                                        float32 numpy array
classification                                                                 (H, W) or (H, W, C) in
                                                                               [0, 1], int
=================  ==========================================================  =======================

An optional ``client`` (str) names the natural owner of a record where a source knows one. Further keys are kept.

>>> alice = ClientData("alice", train=({"text": "a = 1"}, {"text": "b = 2"}), heldout=({"text": "c = 3"},))
>>> len(alice.train), len(alice.heldout)
(2, 1)
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

Record = Mapping[str, Any]

TASKS = ("causal-lm", "sequence-classification", "image-classification")


@dataclass(frozen=True)
class ClientData:
    """Everything that one client owns.

    Attributes:
        name: the client's name, unique in a run.
        train: what it trains on.
        heldout: what it only ever evaluates on.
    """

    name: str
    train: tuple[Record, ...]
    heldout: tuple[Record, ...]


class DataSource(Protocol):
    """Where records come from."""

    task: str

    def load(self) -> tuple[ClientData, ...]:
        """The natural clients in a fixed order; a source without natural clients returns one, named ``"all"``."""
        ...


def record_digest(record: Record) -> bytes:
    """SHA-256 over a record's content, independent of the order of its keys.

    It names a record wherever a choice must depend on *what* the record is and not on where it stands.

    >>> record_digest({"text": "x", "label": 1}) == record_digest({"label": 1, "text": "x"})
    True
    >>> record_digest({"text": "x", "label": 1}) == record_digest({"text": "x", "label": "1"})
    False
    """
    sha = hashlib.sha256()

    def put(tag: bytes, body: bytes) -> None:
        sha.update(tag + len(body).to_bytes(8, "big") + body)

    for key in sorted(record):
        value = record[key]
        put(b"k", key.encode())
        if isinstance(value, np.ndarray):
            array = np.ascontiguousarray(value, dtype="<f4")
            put(b"s", repr(array.shape).encode())
            put(b"a", array.tobytes())
        elif isinstance(value, str):
            put(b"t", value.encode("utf-8", "surrogatepass"))
        elif isinstance(value, bool | int | np.integer):
            put(b"i", str(int(value)).encode())
        else:
            put(b"r", repr(value).encode())
    return sha.digest()
