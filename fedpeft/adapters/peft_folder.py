"""Exchange with stock Hugging Face PEFT: ``adapter_config.json`` + ``adapter_model.safetensors``.

What we write, ``peft.PeftModel.from_pretrained`` loads and gives the same logits: the folder is complete, seeded
tensors included. What stock PEFT writes, we read as the starting state of a run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from fedpeft.adapters.attach import State, complete_state, regenerate
from fedpeft.adapters.spec import AdapterSpec
from fedpeft.errors import FedPeftError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def write_peft_folder(directory: Path, spec: AdapterSpec, state: Mapping[str, torch.Tensor], seed: int) -> None:
    """Write ``state`` as a standard PEFT folder. The same state gives the same bytes; files are replaced atomically."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.contiguous() for name, t in complete_state(spec, state, seed).items()}
    config = json.dumps({**spec.peft_config, "inference_mode": True}, indent=2, sort_keys=True) + "\n"
    _replace(directory / WEIGHTS, save(tensors, metadata={"format": "pt"}))
    _replace(directory / CONFIG, config.encode())


def read_peft_folder(directory: Path, spec: AdapterSpec, seed: int) -> State:
    """The travelling tensors of a standard PEFT folder.

    Raises:
        FedPeftError: a file is missing or unreadable, the tensors are not those of ``spec``, or the folder holds
            trained values where the kind regenerates seeded ones.
    """
    path = directory / WEIGHTS
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise FedPeftError(f"has no {WEIGHTS}", field=str(directory), hint="give a PEFT adapter folder") from None
    except SafetensorError as error:
        raise FedPeftError(f"is not a safetensors file: {error}", field=str(path)) from None
    for seeded in spec.seeded:
        value = tensors.pop(seeded.name, None)
        if value is not None and not torch.equal(value.float(), regenerate(seed, seeded)):
            raise FedPeftError(
                f"holds its own values for {seeded.name}, which kind {spec.kind!r} regenerates from the seed",
                field=str(path),
                hint="use kind 'lora', or the seed of the run that made the adapter",
            )
    if tensors.keys() != spec.shapes.keys():
        odd = sorted(tensors.keys() ^ spec.shapes.keys())[0]
        raise FedPeftError(f"does not hold the tensors of this adapter: {odd} differs", field=str(path))
    for name, shape in spec.shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise FedPeftError(f"{name} should have shape {shape}", field=str(path), value=tuple(tensors[name].shape))
    return {name: t.float() for name, t in sorted(tensors.items())}


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
