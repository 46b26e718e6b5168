"""LoRA (Hu et al. 2021, arXiv:2106.09685): W + scale * B A, both factors trained and exchanged.

A starts at the run's seeded value, the same at every client: with a common start, averaging the factors separately is
biased only by how far they have moved apart (see :mod:`fedpeft.aggregation.exactness`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peft import PeftConfig

    from fedpeft.job.schema import AdapterSection


class Lora:
    name = "lora"

    def peft_config(self, section: AdapterSection, targets: str | list[str], task: str, heads: list[str]) -> PeftConfig:
        from peft import LoraConfig

        return LoraConfig(
            r=section.rank,
            lora_alpha=section.alpha,
            use_rslora=section.rank_stabilised,
            lora_dropout=section.dropout,
            target_modules=targets,
            modules_to_save=heads or None,
            bias="none",
            # PEFT's classification task types would silently train the head too; ours is a decision of the job.
            task_type="CAUSAL_LM" if task == "causal-lm" else None,
        )

    def starts_seeded(self, key: str) -> bool:
        return ".lora_A." in key

    def is_frozen(self, key: str) -> bool:
        return False
