"""What a kind must say about itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from peft import PeftConfig

    from fedpeft.job.schema import AdapterSection


class AdapterKind(Protocol):
    """A PEFT family plus the rule for which of its tensors train, travel, or are regenerated from a seed."""

    @property
    def name(self) -> str: ...

    def peft_config(self, section: AdapterSection, targets: str | list[str], task: str, heads: list[str]) -> PeftConfig:
        """The stock PEFT configuration.

        Args:
            section: ``[adapter]`` of the job.
            targets: resolved target modules.
            task: the job's task.
            heads: names of head modules that are trained in full (empty unless ``train_head``).
        """
        ...

    def starts_seeded(self, key: str) -> bool:
        """Whether the tensor called ``key`` gets its first value from the run's seed."""
        ...

    def is_frozen(self, key: str) -> bool:
        """Whether the tensor called ``key`` stays at its seeded value: it neither trains nor travels."""
        ...
