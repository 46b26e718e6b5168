"""``builtin:digits``: the federated half of scikit-learn's handwritten digits.

1797 grey images of 8 x 8 pixels, ten classes, shipped inside scikit-learn (from the UCI repository, E. Alpaydin and
C. Kaynak, 1998; CC BY 4.0). A PRF over the index of an image puts it into one of three parts, for good:

- the **public half**, on which ``builtin:digits-vit`` was trained (:func:`public_half`);
- of the other half, three quarters to train on and one quarter held out.

The images know no owners, so the source returns one client; ``data.partition`` makes a federation of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedpeft.data.records import ClientData, Record
from fedpeft.prf import prf_uniform

_SPLIT_SEED = 20241  # fixes the parts; changing it changes the benchmark


def _parts() -> dict[str, tuple[Record, ...]]:
    from sklearn.datasets import load_digits  # half a second to import: only paid by those who use it

    bunch = load_digits()
    parts: dict[str, list[Record]] = {"public": [], "train": [], "heldout": []}
    for index, (pixels, label) in enumerate(zip(bunch.images, bunch.target, strict=True)):
        draw = prf_uniform(_SPLIT_SEED, "digits-part", index)
        part = "public" if draw < 0.5 else "train" if draw < 0.875 else "heldout"
        # Stored as 0 to 16: the division is exact in float32.
        parts[part].append({"image": (pixels / 16.0).astype(np.float32), "label": int(label)})
    return {name: tuple(records) for name, records in parts.items()}


@dataclass(frozen=True)
class DigitsSource:
    """The source behind ``builtin:digits``."""

    task: str = "image-classification"

    def load(self) -> tuple[ClientData, ...]:
        """One client, ``"all"``, with the federated half."""
        parts = _parts()
        return (ClientData("all", parts["train"], parts["heldout"]),)


def public_half() -> tuple[Record, ...]:
    """The images that no client has."""
    return _parts()["public"]


SOURCE = DigitsSource()
