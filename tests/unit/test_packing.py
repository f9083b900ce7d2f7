"""Weights with 8 bits a number: as close to the given ones as the formula says, or refused."""
from __future__ import annotations

import pytest
import torch
from learn_to_steer.toyworld.packing import SMALLEST, pack, unpack

SCALES = "m.row_scale"


def matrix(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """Rows of very different sizes, one of them zero."""
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    sizes = torch.logspace(-4, 2, shape[0])
    sizes[1] = 0
    return (tensor * sizes.view(-1, *(1,) * (len(shape) - 1))).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 256), (24, 64, 3, 3), (128, 64, 1, 1)])
def test_every_number_comes_back_within_half_a_step(shape: tuple, dtype: torch.dtype) -> None:
    given = matrix(*shape, dtype=dtype)
    packed = pack({"m": given})
    back = unpack(packed)
    assert set(back) == {"m"}
    assert back["m"].dtype == torch.float16 and back["m"].shape == given.shape and back["m"].is_contiguous()
    exact, read = given.double().flatten(1), back["m"].double().flatten(1)
    largest = exact.abs().amax(dim=1, keepdim=True)
    half_a_step = largest / 254 * (1 + 1e-5)
    rounding = largest * 2.0 ** -11 + 2.0 ** -25  # of half precision: relative, and of its smallest numbers
    assert ((read - exact).abs() <= half_a_step + rounding).all()
    assert torch.equal(read[1], torch.zeros_like(read[1]))


def test_a_byte_a_number() -> None:
    packed = pack({"m": matrix(64, 256)})
    assert sum(tensor.numel() * tensor.element_size() for tensor in packed.values()) == 64 * 256 + 64 * 4


def test_packing_what_was_unpacked_gives_the_same_numbers() -> None:
    once = unpack(pack({"m": matrix(64, 256)}))
    twice = unpack(pack(once))
    step = once["m"].float().abs().amax(dim=1, keepdim=True) / 127
    assert ((once["m"].float() - twice["m"].float()).abs() <= 0.01 * step + 2.0 ** -10 * once["m"].float().abs()).all()


def test_vectors_small_matrices_integers_and_kept_names_are_not_packed() -> None:
    tensors = {"bias": torch.randn(2 * SMALLEST), "small": torch.randn(2, SMALLEST // 2 - 1),
               "ids": torch.arange(SMALLEST, dtype=torch.int32), "keep.weight": torch.randn(64, 64),
               "half": torch.randn(4).half()}
    packed = pack(tensors, keep=("keep.",))
    assert {name: tensor.dtype for name, tensor in packed.items()} == {
        "bias": torch.float16, "small": torch.float16, "ids": torch.int32, "keep.weight": torch.float32,
        "half": torch.float16}
    for name, tensor in unpack(packed).items():
        assert torch.equal(tensor, tensors[name].to(tensor.dtype)), name


def test_packing_twice_and_unpacking_twice_change_nothing() -> None:
    packed = pack({"m": matrix(64, 256), "bias": torch.randn(8)})
    again = pack(packed)
    assert set(again) == set(packed) and all(torch.equal(again[name], packed[name]) for name in packed)
    plain = unpack(packed)
    assert all(torch.equal(unpack(plain)[name], plain[name]) for name in plain)


@pytest.mark.parametrize("value", [65510.0, float("nan"), float("inf"), 1e5])
def test_what_half_precision_cannot_hold_is_not_packed(value: float) -> None:
    given = torch.randn(64, 64)
    given[3, 5] = value
    with pytest.raises(ValueError, match="m has values that are not finite or too large"):
        pack({"m": given})


def damaged(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in {**pack({"m": matrix(64, 256)}), **changes}.items() if tensor is not None}


@pytest.mark.parametrize(("tensors", "words"), [
    (damaged(**{SCALES: None}), r"m has 8-bit numbers, but no scales \(m.row_scale\)"),
    (damaged(m=None), "m.row_scale is there, but no 8-bit tensor"),
    (damaged(m=torch.randn(64, 256)), "m.row_scale is there, but no 8-bit tensor"),
    (damaged(**{SCALES: torch.ones(63)}), r"one scale a row.*shape \[63\]"),
    (damaged(**{SCALES: torch.ones(64, 1)}), "one scale a row"),
    (damaged(**{SCALES: torch.ones(64, dtype=torch.int32)}), "one scale a row.*int32"),
    (damaged(m=torch.zeros(64, dtype=torch.int8)), r"m of shape \[64\] needs"),
    (damaged(**{SCALES: torch.full((64,), float("nan"))}), "negative, not finite or too large"),
    (damaged(**{SCALES: torch.full((64,), -1.0)}), "negative, not finite or too large"),
    (damaged(**{SCALES: torch.full((64,), 1e4)}), "negative, not finite or too large"),
])
def test_damaged_tensors_are_refused_in_words(tensors: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        unpack(tensors)
