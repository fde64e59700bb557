from __future__ import annotations

import math

import pytest
import torch

from tkit.quantize import int8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_what_trtllm_build_will_do(dtype):
    weight = torch.randn(4, 50, generator=torch.Generator().manual_seed(5)).to(dtype)
    weight[1] = torch.arange(50) * 0.5  # ties
    found = int8.rounded(weight)
    for row in range(4):
        values = weight[row].float()
        scale = (values.abs().max() / 128).to(dtype).float()
        for column in range(50):
            exact = (values[column] / scale).item()
            code = math.copysign(math.floor(abs(exact) + 0.5), exact)
            assert found[row, column].item() == pytest.approx(min(max(code, -128), 127) * scale.item(), abs=0)


def test_a_zero_row_stays_zero():
    assert int8.rounded(torch.zeros(2, 4, dtype=torch.bfloat16)).tolist() == torch.zeros(2, 4).tolist()
