"""From records to tensors that a model can be fed with.

Encoding is a pure function of the records, the base model's tokenizer and ``max_length``: every participant that has
the same records gets the same tensors, and nothing is shuffled here.

Language modelling works on *blocks*: a document is tokenised, ended with EOS and cut into blocks of ``max_length``
tokens; the last block is padded. A block never holds tokens of two documents. Packing several into one block would be
a little faster, but then one example could belong to two owners or two canaries, and "remove this record" or "clip
this example" would have no meaning.

Shapes: N examples, T = ``max_length`` tokens, C channels, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fedpeft.data.records import TASKS, Record
from fedpeft.errors import FedPeftError
from fedpeft.models import LoadedBase

IGNORED_LABEL = -100  # what the cross-entropy of torch and transformers leaves out


@dataclass(frozen=True)
class Encoded:
    """Tensors whose first dimension counts examples.

    Attributes:
        tensors: argument name of the model's ``forward`` to tensor.
    """

    tensors: dict[str, torch.Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))


def encode(records: Sequence[Record], task: str, base: LoadedBase, max_length: int) -> Encoded:
    """``records`` as model input.

    Args:
        records: what to encode, in the order in which the examples will stand.
        task: ``causal-lm`` gives ``input_ids``, ``attention_mask`` and ``labels``, each int64 (N, T), with N the number
            of blocks; ``sequence-classification`` the same with ``labels`` (N,); ``image-classification`` gives
            ``pixel_values`` float32 (N, C, H, W) and ``labels`` (N,).
        base: the model that will be fed.
        max_length: T; ignored for images.

    Raises:
        FedPeftError: there is nothing to encode, ``max_length`` does not fit the model, or a record does not fit the
            task (a key is missing, a label is out of range, an image has another size).
    """
    if task not in TASKS or task != base.task:
        raise FedPeftError(
            f"the base model is made for {base.task}", field="data.task", value=task, hint="make task and model agree"
        )
    if not records:
        raise FedPeftError("there are no examples", field="data.source", hint="every client needs at least one record")
    if task == "image-classification":
        return _encode_images(records, base)
    _check_length(base, max_length)
    if task == "causal-lm":
        return _encode_blocks(records, base, max_length)
    return _encode_sequences(records, base, max_length)


def _check_length(base: LoadedBase, max_length: int) -> None:
    if base.tokenizer is None:
        raise FedPeftError("the base model has no tokenizer", field="model.base", hint="text tasks need one")
    if max_length < 2:
        raise FedPeftError("must be at least 2 tokens", field="data.max_length", value=max_length)
    positions = getattr(base.model.config, "max_position_embeddings", None)
    if positions is not None and max_length > positions:
        raise FedPeftError(
            f"the model has {positions} positions only",
            field="data.max_length",
            value=max_length,
            hint=f"use at most {positions}",
        )


def _value(record: Record, key: str, index: int) -> Any:
    if key not in record:
        have = ", ".join(sorted(record)) or "none"
        raise FedPeftError(f"record {index} has no key {key!r} (keys: {have})", field="data.source", hint="rename it")
    return record[key]


def _text(record: Record, index: int) -> str:
    text = _value(record, "text", index)
    if not isinstance(text, str):
        raise FedPeftError(f"'text' of record {index} is no string", field="data.source", value=type(text).__name__)
    return text


def _labels(records: Sequence[Record], base: LoadedBase) -> torch.Tensor:
    classes = int(base.model.config.num_labels)
    labels = []
    for index, record in enumerate(records):
        label = _value(record, "label", index)
        if isinstance(label, bool) or not isinstance(label, int | np.integer):
            raise FedPeftError(f"'label' of record {index} is no integer", field="data.source", value=label)
        if not 0 <= int(label) < classes:
            raise FedPeftError(
                f"'label' of record {index} is out of range",
                field="data.source",
                value=int(label),
                hint=f"the model has {classes} classes, 0 to {classes - 1}",
            )
        labels.append(int(label))
    return torch.tensor(labels, dtype=torch.int64)


def _token_ids(tokenizer: Any, texts: list[str], *, special: bool) -> list[list[int]]:
    # verbose=False: the tokenizer would warn that documents are longer than the model, which is why they are cut.
    ids: list[list[int]] = tokenizer(
        texts, add_special_tokens=special, return_attention_mask=False, truncation=False, verbose=False
    )["input_ids"]
    return ids


def _encode_blocks(records: Sequence[Record], base: LoadedBase, max_length: int) -> Encoded:
    tokenizer: Any = base.tokenizer
    texts = [_text(record, index) for index, record in enumerate(records)]
    blocks: list[list[int]] = []
    for ids in _token_ids(tokenizer, texts, special=True):
        eos = tokenizer.eos_token_id
        document = ids if eos is None or (ids and ids[-1] == eos) else [*ids, eos]
        pieces = [document[at : at + max_length] for at in range(0, len(document), max_length)]
        # A single token has nothing before it to be predicted from: such a block would have no loss at all.
        blocks += [piece for piece in pieces if len(piece) > 1]
    if not blocks:
        raise FedPeftError("all texts are empty", field="data.source", hint="every client needs some text")
    input_ids = torch.full((len(blocks), max_length), int(tokenizer.pad_token_id), dtype=torch.int64)
    mask = torch.zeros_like(input_ids)
    for row, block in enumerate(blocks):
        input_ids[row, : len(block)] = torch.tensor(block)
        mask[row, : len(block)] = 1
    return Encoded(
        {
            "input_ids": input_ids,
            "attention_mask": mask,
            "labels": input_ids.masked_fill(mask == 0, IGNORED_LABEL),
        }
    )


def _encode_sequences(records: Sequence[Record], base: LoadedBase, max_length: int) -> Encoded:
    tokenizer: Any = base.tokenizer
    texts = [_text(record, index) for index, record in enumerate(records)]
    batch = tokenizer(texts, padding="max_length", truncation=True, max_length=max_length, return_tensors="pt")
    return Encoded(
        {
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"],
            "labels": _labels(records, base),
        }
    )


def _encode_images(records: Sequence[Record], base: LoadedBase) -> Encoded:
    if base.image_size is None or base.channels is None:
        raise FedPeftError("the base model takes no images", field="model.base")
    size, channels = base.image_size, base.channels
    arrays = []
    for index, record in enumerate(records):
        image = np.asarray(_value(record, "image", index), dtype=np.float32)
        if image.ndim == 2:
            image = image[:, :, None]
        if image.ndim == 3 and image.shape[2] == 1 and channels == 3:
            image = np.repeat(image, 3, axis=2)
        if image.shape != (size, size, channels):
            raise FedPeftError(
                f"image {index} does not fit the model",
                field="data.source",
                value=tuple(image.shape),
                hint=f"the model takes ({size}, {size}, {channels}) (height, width, channels)",
            )
        arrays.append(image)
    pixels = torch.from_numpy(np.ascontiguousarray(np.stack(arrays).transpose(0, 3, 1, 2)))
    mean = torch.tensor(base.image_mean, dtype=torch.float32).view(1, -1, 1, 1)
    std = torch.tensor(base.image_std, dtype=torch.float32).view(1, -1, 1, 1)
    return Encoded({"pixel_values": (pixels - mean) / std, "labels": _labels(records, base)})
