"""``builtin:digits-vit``: a vision transformer of some 60 thousand parameters; for ``builtin:digits``.

A real ``ViTForImageClassification`` for 8 x 8 grey images (patches of 2 x 2), trained by
``simulations/pretrain/digits_vit.py`` on the public half of the digits until it is fair and not until it is good:
clients must have something to learn. ``assets/digits-vit/training.json`` holds the figures.
"""

from __future__ import annotations

from pathlib import Path

from fedpeft.models import LoadedBase, load_folder

ASSETS = Path(__file__).parent / "assets" / "digits-vit"


def load() -> LoadedBase:
    """The committed model; no network is used."""
    return load_folder(ASSETS, "image-classification")
