"""Encoding: what goes in comes out again, block by block, and nothing of two records meets in one example."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaForSequenceClassification

from fedpeft.data.encode import IGNORED_LABEL, encode
from fedpeft.errors import FedPeftError
from fedpeft.models import LoadedBase, load_base


@pytest.fixture(scope="module")
def lm() -> LoadedBase:
    return load_base("builtin:tiny-code-lm", "causal-lm")


@pytest.fixture(scope="module")
def vit() -> LoadedBase:
    return load_base("builtin:digits-vit", "image-classification")


@pytest.fixture(scope="module")
def classifier(lm: LoadedBase) -> LoadedBase:
    config = lm.model.config.__class__(**{**lm.model.config.to_dict(), "num_labels": 3})
    return LoadedBase(LlamaForSequenceClassification(config).eval(), lm.tokenizer, "sequence-classification")


@settings(max_examples=25)
@given(texts=st.lists(st.text(min_size=1, max_size=80), min_size=1, max_size=5), length=st.integers(4, 32))
def test_blocks_hold_each_document_once_with_its_end(lm: LoadedBase, texts: list[str], length: int) -> None:
    encoded = encode([{"text": t} for t in texts], "causal-lm", lm, length)
    ids, mask, labels = (encoded.tensors[k] for k in ("input_ids", "attention_mask", "labels"))
    assert ids.shape == mask.shape == labels.shape == (len(encoded), length)
    assert torch.equal(labels, torch.where(mask == 1, ids, IGNORED_LABEL))
    assert bool((mask[:, 1:] <= mask[:, :-1]).all()), "padding stands at the end only"
    # Block by block: a document starts where the one before has ended, never inside a block.
    row = 0
    for text in texts:
        expected = [*lm.tokenizer(text)["input_ids"], lm.tokenizer.eos_token_id]
        while expected and len(expected) > 1:
            block, expected = expected[:length], expected[length:]
            assert ids[row][mask[row] == 1].tolist() == block
            row += 1
    assert row == len(encoded)


def test_text_survives_the_tokenizer(lm: LoadedBase) -> None:
    text = "def f(x):\n\treturn 'ünï → 中' + x  # \x00\n"
    ids = encode([{"text": text}], "causal-lm", lm, 128).tensors["input_ids"][0]
    assert lm.tokenizer.decode(ids, skip_special_tokens=True) == text


def test_padding_changes_neither_loss_nor_logits(lm: LoadedBase) -> None:
    record = [{"text": "import os\n\nfor name in os.listdir():\n    print(name)\n"}]
    long = encode(record, "causal-lm", lm, 128).tensors
    used = int(long["attention_mask"].sum())
    short = {k: v[:, :used] for k, v in long.items()}
    with torch.no_grad():
        a, b = lm.model(**long), lm.model(**short)
    torch.testing.assert_close(a.loss, b.loss)
    torch.testing.assert_close(a.logits[:, :used], b.logits)


def test_a_classified_text_is_cut_to_the_length_and_keeps_its_label(classifier: LoadedBase) -> None:
    records = [{"text": "x = 1\n" * 50, "label": 2}, {"text": "y", "label": 0}]
    encoded = encode(records, "sequence-classification", classifier, 16)
    assert encoded.tensors["input_ids"].shape == (2, 16)
    assert encoded.tensors["attention_mask"].sum(1).tolist()[0] == 16
    assert encoded.tensors["labels"].tolist() == [2, 0]
    assert bool(torch.isfinite(classifier.model(**encoded.tensors).loss))


def test_images_become_normalised_channels_first(vit: LoadedBase) -> None:
    image = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    flat, deep = (encode([{"image": i, "label": 3}], vit.task, vit, 0) for i in (image, image[:, :, None]))
    assert flat.tensors["pixel_values"].shape == (1, 1, 8, 8)
    torch.testing.assert_close(flat.tensors["pixel_values"][0, 0], torch.from_numpy(image) * 2 - 1)
    assert torch.equal(flat.tensors["pixel_values"], deep.tensors["pixel_values"])


@pytest.mark.parametrize(
    ("records", "length", "says"),
    [
        ([], 64, "there are no examples"),
        ([{"text": ""}], 64, "all texts are empty"),
        ([{"text": "a"}], 257, "data.max_length: the model has 256 positions only (got 257)"),
        ([{"text": "a"}], 1, "must be at least 2 tokens"),
        ([{"code": "a"}], 64, "record 0 has no key 'text' (keys: code)"),
        ([{"text": 3}], 64, "'text' of record 0 is no string"),
    ],
)
def test_a_mistake_in_text_is_named(lm: LoadedBase, records: list[dict[str, object]], length: int, says: str) -> None:
    with pytest.raises(FedPeftError) as error:
        encode(records, "causal-lm", lm, length)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"image": np.zeros((8, 8)), "label": 10}, "out of range (got 10); the model has 10 classes, 0 to 9"),
        ({"image": np.zeros((8, 8)), "label": -1}, "out of range"),
        ({"image": np.zeros((8, 8)), "label": "three"}, "'label' of record 0 is no integer"),
        ({"image": np.zeros((9, 8)), "label": 1}, "the model takes (8, 8, 1)"),
        ({"label": 1}, "no key 'image'"),
    ],
)
def test_a_mistake_in_images_is_named(vit: LoadedBase, record: dict[str, object], says: str) -> None:
    with pytest.raises(FedPeftError) as error:
        encode([record], "image-classification", vit, 0)
    assert says in str(error.value)


def test_a_base_for_another_task_is_refused(vit: LoadedBase) -> None:
    with pytest.raises(FedPeftError, match="the base model is made for image-classification"):
        encode([{"text": "a"}], "causal-lm", vit, 8)
