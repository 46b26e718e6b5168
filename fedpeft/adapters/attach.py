"""Putting an adapter on a base model, and reading and writing the tensors that travel.

PEFT does the injection; this module decides names, first values and what trains. A tensor is known by the key that PEFT
itself writes to ``adapter_model.safetensors`` (no adapter name in it), so a state can be saved as a stock PEFT folder
without renaming. First values never come from a global random state: what PEFT drew is overwritten by the seeded tensor
of the layer, and everything else of a LoRA starts at zero, so the adapted model starts equal to the base.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fedpeft.adapters.kinds.registry import get_kind
from fedpeft.adapters.seeded import seeded_tensor
from fedpeft.adapters.spec import AdapterSpec, LowRankPair, SeededSpec, TensorSpec
from fedpeft.errors import JobError, nearest

if TYPE_CHECKING:
    from fedpeft.adapters.kinds.protocol import AdapterKind
    from fedpeft.job.schema import AdapterSection

ADAPTER = "default"
State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class AttachedAdapter:
    """A base model with an adapter in place.

    Attributes:
        model: the ``PeftModel``; only the adapter's travelling tensors require gradients.
        spec: names and shapes of the adapter.
        parameters: travelling tensors by key; the very parameters of ``model``.
    """

    model: Any
    spec: AdapterSpec
    parameters: Mapping[str, torch.nn.Parameter]

    def read(self) -> State:
        """A float32 CPU copy of what travels."""
        return {name: p.detach().to("cpu", torch.float32, copy=True) for name, p in self.parameters.items()}

    def write(self, state: Mapping[str, torch.Tensor]) -> None:
        """Set what travels. ``state`` must have exactly the spec's names and shapes."""
        if state.keys() != self.parameters.keys():
            raise ValueError("state does not have the adapter's tensors")
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state[name])


def attach(
    base: torch.nn.Module, section: AdapterSection, *, seed: int, task: str, fingerprint: str, base_name: str
) -> AttachedAdapter:
    """Inject the job's adapter into ``base`` (in place) and give it its first values.

    Args:
        base: the frozen model.
        section: ``[adapter]`` of the job.
        seed: the run's seed.
        task: the job's task.
        fingerprint: fingerprint of ``base``, taken before anything was injected.
        base_name: recorded in ``adapter_config.json``.

    Raises:
        JobError: target modules match nothing, or the kind cannot be used on what they match.
    """
    from peft import get_peft_model

    kind = get_kind(section.kind)
    targets = _resolve_targets(base, section)
    heads = _heads(base) if section.train_head else []
    config = kind.peft_config(section, targets, task, heads)
    if targets == "all-linear":
        config.exclude_modules = _heads(base, required=False) or None  # heads are trained in full or not at all
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*base_model_name_or_path.*")
        warnings.filterwarnings("ignore", category=FutureWarning)  # between PEFT and transformers
        model = get_peft_model(base, config, adapter_name=ADAPTER, autocast_adapter_dtype=False)
    config.base_model_name_or_path = base_name
    tensors: dict[str, torch.nn.Parameter] = {}
    seeded: list[SeededSpec] = []
    for full_name, parameter in model.named_parameters():
        key = _key(full_name)
        if key is None:
            parameter.requires_grad_(False)
            continue
        if kind.starts_seeded(key):
            _check_linear(key, parameter)
            spec = SeededSpec(key, tuple(parameter.shape), _module(key), section.orthonormal)
            with torch.no_grad():
                parameter.copy_(regenerate(seed, spec))
            if kind.is_frozen(key):
                seeded.append(spec)
        parameter.requires_grad_(not kind.is_frozen(key))
        if not kind.is_frozen(key):
            tensors[key] = parameter
    ordered = dict(sorted(tensors.items()))
    spec_ = AdapterSpec(
        kind=section.kind,
        tensors=tuple(TensorSpec(name, tuple(p.shape)) for name, p in ordered.items()),
        seeded=tuple(sorted(seeded, key=lambda s: s.name)),
        pairs=_pairs(model, kind, section.scale),
        peft_config=_plain(config.to_dict()),
        peft_changes=_changes(config),
        base_fingerprint=fingerprint,
    )
    return AttachedAdapter(model, spec_, ordered)


def regenerate(seed: int, spec: SeededSpec) -> torch.Tensor:
    """The value of a seeded tensor, float32."""
    return seeded_tensor(seed, spec.module, spec.shape, orthonormal=spec.orthonormal)


def complete_state(spec: AdapterSpec, state: Mapping[str, torch.Tensor], seed: int) -> State:
    """``state`` plus the regenerated seeded tensors: everything that a stock PEFT folder holds."""
    return {**state, **{s.name: regenerate(seed, s) for s in spec.seeded}}


def _key(parameter_name: str) -> str | None:
    """PEFT's state-dict key of an adapter parameter, or ``None`` for a parameter of the base."""
    marker = f".modules_to_save.{ADAPTER}."
    if marker in parameter_name:
        return parameter_name.replace(marker, ".")
    if f".{ADAPTER}." in parameter_name and ".original_module." not in parameter_name:
        return parameter_name.replace(f".{ADAPTER}.", ".")
    return None


def _module(key: str) -> str:
    """Name of the base layer that a LoRA key belongs to."""
    return key.removeprefix("base_model.model.").split(".lora_")[0]


def _check_linear(key: str, parameter: torch.Tensor) -> None:
    if parameter.ndim != 2:
        raise JobError(
            f"matches {_module(key)}, which is not a linear layer",
            field="adapter.target_modules",
            hint="name linear layers only, or use 'all-linear'",
        )


def _pairs(model: Any, kind: AdapterKind, scale: float) -> tuple[LowRankPair, ...]:
    keys = {k: p for n, p in model.named_parameters() if (k := _key(n)) is not None}
    pairs = []
    for a in sorted(k for k in keys if ".lora_A." in k):
        b = a.replace(".lora_A.", ".lora_B.")
        pairs.append(LowRankPair(_module(a), a, b, int(keys[a].shape[0]), scale))
    return tuple(pairs)


def _resolve_targets(base: torch.nn.Module, section: AdapterSection) -> str | list[str]:
    """Check that the targets match something, so that the error can list what exists."""
    import re

    targets = section.target_modules
    if targets == "all-linear":
        return targets
    linear = {n: m for n, m in base.named_modules() if isinstance(m, torch.nn.Linear) or type(m).__name__ == "Conv1D"}
    suffixes = sorted({name.rsplit(".", 1)[-1] for name in linear})
    if isinstance(targets, str):
        try:
            matched = any(re.fullmatch(targets, name) for name in linear)
        except re.error as error:
            raise JobError(
                f"is not a regular expression: {error}", field="adapter.target_modules", value=targets
            ) from None
        missing = [] if matched else [targets]
    else:
        missing = [t for t in targets if not any(n == t or n.endswith("." + t) for n in linear)]
    if missing:
        guess = nearest(missing[0], suffixes)
        raise JobError(
            "matches no linear layer of the base model",
            field="adapter.target_modules",
            value=missing[0],
            hint=(f"did you mean {guess!r}? " if guess else "") + f"linear layers are named: {', '.join(suffixes)}",
        )
    return targets


def _heads(base: torch.nn.Module, *, required: bool = True) -> list[str]:
    heads = [name for name in ("classifier", "score") if hasattr(base, name)]
    if required and not heads:
        raise JobError(
            "the base model has no classification head called 'classifier' or 'score'", field="adapter.train_head"
        )
    return heads


def _changes(config: Any) -> dict[str, Any]:
    """What differs from PEFT's defaults for this type of adapter."""
    defaults = _plain(type(config)().to_dict())
    plain = _plain(config.to_dict())
    return {key: value for key, value in plain.items() if key == "peft_type" or defaults.get(key) != value}


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration as plain JSON values, in an order that does not depend on the run."""
    return json.loads(json.dumps(config, sort_keys=True, default=lambda v: sorted(v) if isinstance(v, set) else str(v)))
