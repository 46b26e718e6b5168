"""Packing and the gate: what is taken, and the reason for everything that is not."""

from __future__ import annotations

import contextlib
import dataclasses
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.adapters.delta import PackedFile, content_address, difference, pack
from fedpeft.adapters.manifest import Manifest, manifest_for
from fedpeft.adapters.spec import AdapterSpec, LowRankPair, SeededSpec, TensorSpec
from fedpeft.adapters.validation import Expectation, check_delta
from fedpeft.errors import DeltaRefused

SPEC = AdapterSpec(
    kind="ffa-lora",
    tensors=(TensorSpec("x.lora_B.weight", (5, 2)), TensorSpec("y.lora_B.weight", (3, 2))),
    seeded=(SeededSpec("x.lora_A.weight", (2, 7), "x", False), SeededSpec("y.lora_A.weight", (2, 4), "y", False)),
    pairs=(LowRankPair("x", "x.lora_A.weight", "x.lora_B.weight", 2, 2.0),),
    peft_config={"r": 2, "target_modules": ["x", "y"]},
    base_fingerprint="f" * 64,
)
FACTS = {
    "run_id": "run-1", "round": 3, "client": "a", "start_state": "0" * 64, "codec": "fp32", "example_count": 40,
    "weight": 40, "metrics": {"train_loss_mean": 1.25},
}  # fmt: skip
EXPECTED = Expectation("run-1", 3, "a", "0" * 64, SPEC, "fp32", max_abs=8.0, max_weight=1000)


def tensors():
    generator = torch.Generator().manual_seed(0)
    return {t.name: torch.randn(t.shape, generator=generator) for t in SPEC.tensors}


def written(tmp_path, values=None, **facts):
    path = tmp_path / "delta"
    path.write_bytes(pack(values or tensors(), manifest_for(SPEC, **{**FACTS, **facts})))
    return path


def refusal(path, expected=EXPECTED) -> DeltaRefused:
    with pytest.raises(DeltaRefused) as caught:
        check_delta(path, expected)
    assert "\n" not in str(caught.value)
    return caught.value


def test_a_right_delta_is_taken_and_reads_back_to_the_same_numbers(tmp_path):
    delta = check_delta(written(tmp_path), EXPECTED)
    for name, value in tensors().items():
        assert torch.equal(delta.tensor(name), value)
        pieces = torch.cat([piece.clone() for piece in delta.chunks(name, 4)])
        assert torch.equal(pieces, value.flatten())
    assert delta.manifest == manifest_for(SPEC, **FACTS)


def test_the_same_delta_has_the_same_address_and_any_change_another():
    one = pack(tensors(), manifest_for(SPEC, **FACTS))
    assert content_address(one) == content_address(pack(dict(reversed(tensors().items())), manifest_for(SPEC, **FACTS)))
    assert content_address(one) != content_address(pack(tensors(), manifest_for(SPEC, **{**FACTS, "round": 4})))


def test_bf16_halves_the_payload_and_rounds_to_nearest(tmp_path):
    path = written(tmp_path, codec="bf16")
    delta = check_delta(path, dataclasses.replace(EXPECTED, codec="bf16"))
    for name, value in tensors().items():
        assert torch.equal(delta.tensor(name), value.bfloat16().float())
    assert refusal(path).code == "codec"


def test_stock_safetensors_reads_the_object(tmp_path):
    from safetensors.torch import load_file

    loaded = load_file(written(tmp_path))
    assert all(torch.equal(loaded[n], v) for n, v in tensors().items())


@pytest.mark.parametrize(
    ("code", "facts"),
    [
        ("round", {"round": 2}),
        ("client", {"client": "b"}),
        ("run", {"run_id": "run-2"}),
        ("start-state", {"start_state": "1" * 64}),
        ("weight", {"weight": 1001}),
        ("codec", {"codec": "bf16"}),
    ],
)
def test_a_delta_for_something_else_is_refused(tmp_path, code, facts):
    assert refusal(written(tmp_path, **facts)).code == code


def test_a_delta_on_another_base_is_refused(tmp_path):
    other = dataclasses.replace(EXPECTED, spec=dataclasses.replace(SPEC, base_fingerprint="e" * 64))
    assert refusal(written(tmp_path), other).code == "fingerprint"


@pytest.mark.parametrize(
    ("code", "change"),
    [
        ("extra-tensor", lambda t: t | {"z.lora_B.weight": torch.zeros(1)}),
        ("missing-tensor", lambda t: {"x.lora_B.weight": t["x.lora_B.weight"]}),
        ("shape", lambda t: t | {"x.lora_B.weight": torch.zeros(2, 5)}),
        ("not-finite", lambda t: t | {"y.lora_B.weight": torch.tensor([[0.0, float("nan")]] * 3)}),
        ("not-finite", lambda t: t | {"y.lora_B.weight": torch.tensor([[0.0, float("-inf")]] * 3)}),
        ("out-of-bounds", lambda t: t | {"y.lora_B.weight": torch.tensor([[0.0, -8.1]] * 3)}),
    ],
)
def test_wrong_tensors_are_refused_with_the_name_of_the_tensor(tmp_path, code, change):
    refused = refusal(written(tmp_path, change(tensors())))
    assert refused.code == code
    assert refused.field in ("x.lora_B.weight", "y.lora_B.weight", "z.lora_B.weight")


def test_a_pickle_named_safetensors_is_refused_unopened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    for writer in (lambda p: p.write_bytes(pickle.dumps(Bomb())), lambda p: torch.save(tensors(), p)):
        path = tmp_path / "delta.safetensors"
        writer(path)
        refused = refusal(path)
        assert refused.code == "format"
        assert "pickle" in str(refused)
    assert not (tmp_path / "exploded").exists()


@given(st.data())
def test_a_truncated_or_damaged_file_is_refused_and_never_crashes(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("d") / "delta"
    whole = pack(tensors(), manifest_for(SPEC, **FACTS))
    cut = data.draw(st.integers(0, len(whole) - 1))
    path.write_bytes(whole[:cut])
    assert refusal(path).code == "format"
    at = data.draw(st.integers(0, len(whole) - 1))
    damaged = bytearray(whole)
    damaged[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(bytes(damaged))
    # A flipped bit in the tensors may well be a valid delta; the content address is what catches it.
    with contextlib.suppress(DeltaRefused):
        check_delta(path, EXPECTED)


def test_trailing_bytes_are_refused(tmp_path):
    path = written(tmp_path)
    path.write_bytes(path.read_bytes() + b"\0" * 8)
    assert refusal(path).code == "format"


def test_an_object_far_larger_than_expected_is_refused_unread(tmp_path):
    path = tmp_path / "delta"
    with open(path, "wb") as file:
        file.truncate(EXPECTED.max_bytes + 1)
    assert refusal(path).code == "size"


def test_a_safetensors_file_without_manifest_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file(tensors(), tmp_path / "delta")
    assert refusal(tmp_path / "delta").code == "manifest"


@given(st.binary(max_size=200))
def test_any_bytes_as_manifest_give_a_manifest_or_a_refusal(data):
    try:
        assert isinstance(Manifest.from_bytes(data), Manifest)
    except DeltaRefused as refused:
        assert refused.code == "manifest"  # noqa: PT017


def test_difference_is_what_the_client_added(tmp_path):
    start = tensors()
    trained = {n: t + 1 for n, t in start.items()}
    assert all(torch.allclose(d, torch.ones_like(d), atol=1e-6) for d in difference(trained, start).values())
    assert PackedFile(written(tmp_path, difference(trained, start))).names() == sorted(start)


def test_a_refusal_crosses_process_boundaries_whole():
    refused = pickle.loads(pickle.dumps(DeltaRefused("shape", "is odd", field="x", value=(1, 2), hint="mend it")))
    assert (refused.code, str(refused)) == ("shape", "x: is odd (got (1, 2)); mend it")
