"""Our rounding against torch's fused kernels: the same bits, the same gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.quantize.rounding import round_activation

torch.set_num_threads(1)
LEVELS = [(-128, 127), (0, 255), (-127, 127)]


def kernel(x, scale, low, high):
    return torch.fake_quantize_per_tensor_affine(x, scale, torch.zeros(1, dtype=torch.int32), low, high)


@pytest.mark.parametrize(("low", "high"), LEVELS)
@settings(deadline=None, max_examples=200)
@given(
    values=st.lists(st.floats(-3e4, 3e4, width=32), min_size=1, max_size=24),
    largest=st.floats(2.0**-20, 2.0**20, width=32),
)
def test_the_bits_are_those_of_torchs_kernel(low, high, values, largest):
    x, scale = torch.tensor(values), torch.tensor([np.float32(largest) / np.float32(high)])
    assert torch.equal(round_activation(x, scale, low, high), kernel(x, scale, low, high))


@pytest.mark.parametrize(("low", "high"), LEVELS)
def test_the_bits_are_those_of_torchs_kernel_at_the_edges(low, high):
    torch.manual_seed(0)
    scale = torch.rand(1) * 0.1
    x = (torch.randint(low - 20, high + 20, (200_000,)) + torch.tensor([0.5, 0.4999999, 0.0, 0.5000001]).repeat(50_000)) * scale
    assert torch.equal(round_activation(x, scale, low, high), kernel(x, scale, low, high))


@pytest.mark.parametrize(("low", "high"), LEVELS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_gradient_is_that_of_torchs_kernel(low, high, layout):
    torch.manual_seed(1)
    scale = torch.tensor([0.01])
    x = torch.randn(8, 6, 16, 16).to(memory_format=layout)
    g = torch.randn_like(x)
    ours, theirs = (x.clone().requires_grad_(True) for _ in range(2))
    round_activation(ours, scale, low, high).backward(g)
    kernel(theirs, scale, low, high).backward(g)
    assert torch.equal(ours.grad, theirs.grad)
    assert 0.0 < float((ours.grad == 0).float().mean()) < 1.0


@pytest.mark.parametrize(("low", "high"), LEVELS)
def test_the_gradient_of_a_learnable_scale_is_lsqs(low, high):
    torch.manual_seed(2)
    x = torch.randn(4, 8, 16, 16, requires_grad=True)
    scale = torch.tensor([0.012], requires_grad=True)
    y = round_activation(x, scale, low, high, learnable=True)
    g = torch.randn_like(x)
    y.backward(g)
    with torch.no_grad():
        steps = (x / scale).double()
        inside = (steps.round() >= low) & (steps.round() <= high)
        slope = torch.where(inside, steps.round() - steps, steps.clamp(low, high).round())
        expected = float((slope * g).sum()) / np.sqrt(x.numel() * high)
    assert float(scale.grad) == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert torch.equal(x.grad, torch.where(inside, g, 0.0))
    assert not torch.equal(x.grad, g)


def test_nan_stays_nan():
    assert round_activation(torch.tensor([torch.nan]), torch.tensor([0.1]), -128, 127).isnan().all()
