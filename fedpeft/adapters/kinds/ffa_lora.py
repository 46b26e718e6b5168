"""FFA-LoRA (Sun et al., ICLR 2024, arXiv:2403.12313): A is frozen at a seeded value, only B trains and travels.

With A common to all, the mean of the B's *is* the mean of the updates: sum_k p_k (B_k A) = (sum_k p_k B_k) A. The
payload halves for square layers, and any noise added to B enters the update linearly. The price: updates live in the
random row space of A, and the learning rate wants to be larger than LoRA's.
"""

from __future__ import annotations

from fedpeft.adapters.kinds.lora import Lora


class FfaLora(Lora):
    name = "ffa-lora"

    def is_frozen(self, key: str) -> bool:
        return ".lora_A." in key
