"""Shards: what is packed comes out again bit by bit, and every fault is found and named."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_dist.engines.shards import Shard, WeightSyncError, pack

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.int32, torch.int64, torch.bool]


def tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 50).to(dtype)


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


@pytest.fixture
def shard() -> Shard:
    return pack(3, [("a.weight", tensor((5, 3), torch.float32)), ("b.weight", tensor((3, 5), torch.float32, 1))])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (7,), (5, 3), (2, 3, 5, 7)], ids=str)
def test_what_is_packed_comes_out_again(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    given_ = [("before", tensor((3,), torch.int8)), ("it", tensor(shape, dtype)), ("after", tensor((2, 2), dtype, 1))]
    shard = pack(1, given_)
    shard.verify(1)
    found = list(shard.tensors())
    assert [name for name, _ in found] == ["before", "it", "after"]
    assert all(same(a, b) for (_, a), (_, b) in zip(given_, found, strict=True))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 9), max_size=4).map(tuple), st.sampled_from(DTYPES), st.integers(0, 2**31)),
        max_size=8,
    ),
    st.integers(-1, 2**40),
)
def test_round_trip(spec: list[tuple[tuple[int, ...], torch.dtype, int]], version: int) -> None:
    tensors = [(f"layer.{i}.weight", tensor(*s)) for i, s in enumerate(spec)]
    shard = pack(version, tensors)
    shard.verify(version)
    found = list(shard.tensors())
    assert [n for n, _ in found] == [n for n, _ in tensors]
    assert all(same(a, b) for (_, a), (_, b) in zip(tensors, found, strict=True))


def test_views_and_transposed_tensors_are_packed_by_value() -> None:
    base = torch.arange(24.0).view(4, 6)
    found = dict(pack(0, [("t", base.T), ("slice", base[1:3, ::2]), ("grad", base.clone().requires_grad_())]).tensors())
    assert same(found["t"], base.T.contiguous())
    assert same(found["slice"], base[1:3, ::2].contiguous())
    assert same(found["grad"], base)
    base += 1
    assert not torch.equal(found["t"], base.T)


def test_reading_copies_nothing(shard: Shard) -> None:
    first = next(shard.tensors())[1]
    assert first.data_ptr() == shard.data.ctypes.data + shard.offsets[0]


def test_another_version_is_refused(shard: Shard) -> None:
    with pytest.raises(WeightSyncError, match=r"from a\.weight to b\.weight is of version 3, expected version 4"):
        shard.verify(4)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_flipped_bit_anywhere_is_found(data: st.DataObject) -> None:
    shard = pack(3, [("a.weight", tensor((5, 3), torch.float32)), ("b.weight", tensor((4,), torch.bfloat16, 1))])
    where, bit = data.draw(st.integers(0, shard.nbytes - 1)), data.draw(st.integers(0, 7))
    broken = shard.data.copy()
    broken[where] ^= 1 << bit
    with pytest.raises(WeightSyncError, match=r"version 3 .* from a\.weight to b\.weight: .* do not match"):
        replace(shard, data=broken).verify(3)


@pytest.mark.parametrize(
    "fault",
    [
        {"names": ("b.weight", "a.weight")},
        {"names": ("a.weight", "c.weight")},
        {"shapes": ((3, 5), (3, 5))},
        {"offsets": (64, 0)},
        {"dtypes": ("int32", "float32")},
        {"names": ("a.weight",), "dtypes": ("float32",), "shapes": ((5, 3),), "offsets": (0,)},
        {"version": 4},
        {"data": np.zeros(0, np.uint8)},
        {"digest": b""},
    ],
    ids=lambda f: "+".join(f),
)
def test_a_changed_header_is_found(shard: Shard, fault: dict[str, Any]) -> None:
    changed = replace(shard, **fault)
    with pytest.raises(WeightSyncError, match=r"version [34] .* do not match their digest"):
        changed.verify(changed.version)


def test_equal_weights_of_two_versions_have_two_digests() -> None:
    tensors = [("a.weight", torch.ones(3))]
    assert pack(1, tensors).digest != pack(2, tensors).digest
    assert pack(1, tensors).digest == pack(1, tensors).digest


def test_half_the_bytes_on_the_wire() -> None:
    exact = torch.tensor([1.0, 1.5, -2.0])
    shard = pack(3, [("a", exact), ("b", torch.tensor([7, 8])), ("c", torch.tensor([1.001]))], torch.bfloat16)
    shard.verify(3)
    found = dict(shard.tensors())
    assert found["a"].dtype == torch.bfloat16
    assert torch.equal(found["a"].float(), exact)
    assert torch.equal(found["b"], torch.tensor([7, 8])), "numbers of another kind stay as they are"
    assert found["c"].item() == pytest.approx(1.001, rel=2**-8)
