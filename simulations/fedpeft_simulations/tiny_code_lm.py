"""``builtin:tiny-code-lm``: a Llama of 0.9 million parameters that knows some Python; for ``builtin:stdlib``.

A real ``transformers`` architecture, so that everything that works on it (adapters, export, kernels, attacks) works
on a large one, yet small enough to be committed with the code and to train on one CPU thread. The weights were made
by ``simulations/pretrain/tiny_code_lm.py`` from the public part of the standard library; ``assets/tiny-code-lm/
training.json`` holds the figures and ``docs/workloads.md`` the reasons.
"""

from __future__ import annotations

from pathlib import Path

from fedpeft.models import LoadedBase, load_folder

ASSETS = Path(__file__).parent / "assets" / "tiny-code-lm"


def load() -> LoadedBase:
    """The committed model with its tokenizer; no network is used."""
    return load_folder(ASSETS, "causal-lm")
