from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tkit.checkpoints.tensors import cast, count_nonfinite


@given(bits=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=64))
def test_float32_to_bfloat16_rounds_as_torch_does(bits):
    raw = np.array(bits, np.uint32)
    values = torch.from_numpy(raw.view(np.float32))
    raw, values = raw[~values.isnan().numpy()], values[~values.isnan()]
    expected = values.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(cast(raw, "F32", "BF16"), expected)


@pytest.mark.parametrize(("source", "target"), [("BF16", "F16"), ("F16", "BF16"), ("BF16", "F32"), ("F16", "F32")])
def test_every_16_bit_value_is_cast_as_torch_does(source, target):
    types = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
    raw = np.arange(2**16, dtype=np.uint16)
    values = torch.from_numpy(raw.view(np.int16)).view(types[source])
    keep = ~values.isnan()
    expected = values[keep].to(types[target])
    found = cast(raw[keep.numpy()], source, target)
    assert torch.equal(torch.from_numpy(found.view(f"i{found.itemsize}")).view(types[target]), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_nan_and_infinity_are_counted(dtype):
    values = torch.tensor([0.0, 1.0, float("nan"), float("inf"), -float("inf"), torch.finfo(dtype).max], dtype=dtype)
    width = {2: torch.int16, 4: torch.int32}[values.itemsize]
    raw = values.view(width).numpy().view(f"u{values.itemsize}")
    name = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}[dtype]
    assert count_nonfinite(raw, name) == 3
