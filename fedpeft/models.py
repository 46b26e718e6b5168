"""Base models: the frozen weights that an adapter is trained on.

A base is named by a spec, the same in a job file and on a client:

- ``builtin:NAME``: a workload that came with the installation. It is found through the entry-point group
  ``fedpeft.models``, whose values are callables without arguments that return a :class:`LoadedBase`; a third party
  can add its own in its package metadata;
- a path (it contains a separator, starts with ``.`` or ``~``, or exists): a folder that ``transformers`` can read; no
  network is used;
- anything else: a model id of the Hugging Face hub. Only safetensors weights are read and no code of the repository
  is ever run.

Whatever the origin, the result is in float32, in evaluation mode and frozen: adapters train, the base never does.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from fedpeft.data.records import TASKS
from fedpeft.data.sources import is_local_path
from fedpeft.errors import FedPeftError, nearest

_FIELD = "model.base"
_loading = threading.Lock()  # transformers loads through process-global state; two loads at once corrupt each other
_AUTO_CLASS = {
    "causal-lm": AutoModelForCausalLM,
    "sequence-classification": AutoModelForSequenceClassification,
    "image-classification": AutoModelForImageClassification,
}


@dataclass(frozen=True)
class LoadedBase:
    """A base model with what is needed to feed it.

    Attributes:
        model: float32, evaluation mode, no parameter requires a gradient.
        tokenizer: a ``transformers`` tokenizer with an EOS and a padding token; ``None`` for images.
        task: one of :data:`fedpeft.data.records.TASKS`.
        image_size: height and width in pixels; ``None`` for text.
        channels: colour channels; ``None`` for text.
        image_mean: what is subtracted from each channel of an image in [0, 1].
        image_std: what each channel is divided by after that.
    """

    model: PreTrainedModel
    tokenizer: Any | None
    task: str
    image_size: int | None = None
    channels: int | None = None
    image_mean: tuple[float, ...] = (0.5,)
    image_std: tuple[float, ...] = (0.5,)


def load_base(spec: str, task: str, num_labels: int | None = None) -> LoadedBase:
    """The base model named by ``spec``, ready for ``task``.

    Args:
        spec: ``builtin:NAME``, a local folder or a hub id.
        task: one of :data:`fedpeft.data.records.TASKS`.
        num_labels: number of classes for the classification tasks; ``None`` keeps what the model was made with.

    Raises:
        FedPeftError: the spec names nothing that can be loaded, or the model is not for this task.
    """
    with _loading:
        return _load(spec, task, num_labels)


def _load(spec: str, task: str, num_labels: int | None) -> LoadedBase:
    if task not in TASKS:
        meant = nearest(task, TASKS)
        raise FedPeftError(
            "unknown task", field="data.task", value=task, hint=f"did you mean {meant!r}?" if meant else _one_of(TASKS)
        )
    if spec.startswith("builtin:"):
        return _load_builtin(spec, task, num_labels)
    if is_local_path(spec):
        return load_folder(spec, task, num_labels)
    return _load_pretrained(spec, spec, task, num_labels, local=False)


def freeze(model: PreTrainedModel) -> PreTrainedModel:
    """``model`` in float32 and evaluation mode with every parameter frozen (in place)."""
    model.float().eval()
    model.requires_grad_(False)
    return model


def load_folder(folder: Path | str, task: str, num_labels: int | None = None) -> LoadedBase:
    """The model in a folder that ``save_pretrained`` made, without any network.

    Raises:
        FedPeftError: there is no such folder, or it holds no model for this task.
    """
    given, place = str(folder), Path(folder).expanduser()
    hint = "give a folder made by save_pretrained, or a hub id"
    if not place.is_dir():
        raise FedPeftError("no such folder", field=_FIELD, value=given, hint=hint)
    if not (place / "config.json").is_file():
        raise FedPeftError("the folder has no config.json", field=_FIELD, value=given, hint=hint)
    return _load_pretrained(str(place), given, task, num_labels, local=True)


def _one_of(words: tuple[str, ...]) -> str:
    return "choose one of " + ", ".join(words)


def _load_builtin(spec: str, task: str, num_labels: int | None) -> LoadedBase:
    name = spec.removeprefix("builtin:")
    points = {p.name: p for p in importlib.metadata.entry_points(group="fedpeft.models")}
    if name not in points:
        meant = nearest(name, points)
        hint = f"did you mean 'builtin:{meant}'?" if meant else _one_of(tuple(f"builtin:{n}" for n in sorted(points)))
        raise FedPeftError("no such built-in model", field=_FIELD, value=spec, hint=hint)
    base: LoadedBase = points[name].load()()
    if base.task != task:
        raise FedPeftError(
            f"this model is made for {base.task}, not for {task}", field=_FIELD, value=spec, hint="change data.task"
        )
    have = base.model.config.num_labels
    if num_labels is not None and task != "causal-lm" and num_labels != have:
        raise FedPeftError(
            f"this model has {have} classes, the data needs {num_labels}", field=_FIELD, value=spec, hint="change one"
        )
    freeze(base.model)
    return base


def _load_pretrained(where: str, spec: str, task: str, num_labels: int | None, *, local: bool) -> LoadedBase:
    common: dict[str, Any] = {"local_files_only": local, "trust_remote_code": False}
    extra: dict[str, Any] = {}
    if num_labels is not None and task != "causal-lm":
        # A head of another size is made anew; it is trained with the adapter.
        extra = {"num_labels": num_labels, "ignore_mismatched_sizes": True}
    try:
        AutoConfig.from_pretrained(where, **common)
        # A head that the folder lacks is made from this seed: every participant then has the same one.
        with torch.random.fork_rng(devices=[]), _no_progress_bar():
            torch.manual_seed(0)
            model = _AUTO_CLASS[task].from_pretrained(
                where, dtype=torch.float32, use_safetensors=True, **common, **extra
            )
        tokenizer = None
        image: dict[str, Any] = {}
        if task == "image-classification":
            image = _image_facts(model, where, common)
        else:
            tokenizer = AutoTokenizer.from_pretrained(where, **common)
    except FedPeftError:
        raise
    # transformers and the hub client raise OSError, ValueError, KeyError, ImportError and HTTP errors of their own
    # for what the user can mend (not found, gated, offline, other task); none of them is a defect of ours.
    except Exception as error:
        what = "the folder cannot be loaded" if local else "the hub model cannot be fetched"
        hint = (
            f"it must hold config.json, safetensors weights and, for text, a tokenizer for {task}"
            if local
            else "check the id and the network, or give the path of a local folder"
        )
        raise FedPeftError(f"{what}: {_first_line(error)}", field=_FIELD, value=spec, hint=hint) from error
    if tokenizer is not None and tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise FedPeftError(
                "the tokenizer has neither a padding nor an EOS token", field=_FIELD, value=spec, hint="add eos_token"
            )
        tokenizer.pad_token = tokenizer.eos_token
    if task == "sequence-classification" and model.config.pad_token_id is None and tokenizer is not None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return LoadedBase(model=freeze(model), tokenizer=tokenizer, task=task, **image)


def _image_facts(model: PreTrainedModel, where: str, common: dict[str, Any]) -> dict[str, Any]:
    size = getattr(model.config, "image_size", None)
    channels = getattr(model.config, "num_channels", None)
    if isinstance(size, list | tuple):
        size = size[0]
    if size is None or channels is None:
        raise FedPeftError(
            "the model does not say its image size and channels", field=_FIELD, value=where, hint="use a ViT-like model"
        )
    mean, std = (0.5,) * int(channels), (0.5,) * int(channels)
    preprocessor = Path(where) / "preprocessor_config.json"
    if preprocessor.is_file():
        facts = json.loads(preprocessor.read_text())
        mean, std = facts.get("image_mean", mean), facts.get("image_std", std)
    elif not common["local_files_only"]:
        try:
            processor = AutoImageProcessor.from_pretrained(where, **common)
            mean, std = processor.image_mean or mean, processor.image_std or std
        except (OSError, ValueError, ImportError):  # many repositories have none: the usual (x - 0.5) / 0.5 then
            pass
    return {
        "image_size": int(size),
        "channels": int(channels),
        "image_mean": tuple(float(x) for x in mean),
        "image_std": tuple(float(x) for x in std),
    }


@contextlib.contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Loading is announced by whoever loads; a second bar per worker process would only garble the first."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__).rstrip(".")[:300]
