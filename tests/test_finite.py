"""One look at a sum says whether a tensor is finite, except where it cannot."""

import pytest
import torch

from compress.finite import all_finite


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("values", "finite"),
    [
        ([], True),
        ([1.0, -2.0], True),
        (["max", "max"], True),  # their sum overflows
        ([1.0, float("nan")], False),
        ([float("inf"), 1.0], False),
        ([float("inf"), float("-inf")], False),
    ],
)
def test_finite_is_what_every_number_is(dtype, values, finite):
    numbers = torch.tensor([torch.finfo(dtype).max if v == "max" else v for v in values], dtype=dtype)
    assert all_finite(numbers) is finite
