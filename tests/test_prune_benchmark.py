"""What `benchmarks/prune_quality.py` tells about other tools' networks; the other tool itself is not needed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from engines import prune
from test_prune_core import random_checkpoint

from compress.checkpoints.base import Checkpoint
from compress.prune import Budget, Scope
from compress.resnet import build_model
from compress.zoo import spec as spec_of
from rescompress.core.recipe import network_of


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "prune_quality.py"
    spec = importlib.util.spec_from_file_location("prune_quality", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["prune_quality"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def dense() -> Checkpoint:
    return random_checkpoint(spec_of("resnet20"), dtype=torch.float32)


def test_pad_shortcuts_as_projections_are_the_same_function(bench: ModuleType, dense: Checkpoint) -> None:
    written = bench.with_projections(dense)
    assert {b.shortcut for b in dense.spec.blocks} == {"identity", "pad"}
    assert {b.shortcut for b in written.spec.blocks} == {"identity", "projection"}
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    before, after = (build_model(c.spec, c.state_dict).double()(x) for c in (dense, written))
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)  # the ones are the root of 1 + eps in float32


@pytest.mark.parametrize("scope", ["inner", "all"])
def test_widths_are_read_off_a_network_that_something_else_has_pruned(
    bench: ModuleType, dense: Checkpoint, scope: Scope
) -> None:
    written = bench.with_projections(dense)
    pruned = prune(written, method="magnitude", budget=Budget(kind="ratio", value=0.5), scope=scope, align=1).checkpoint
    assert pruned.spec != written.spec
    found = bench.measured_spec(written.spec, build_model(pruned.spec, pruned.state_dict))
    assert network_of(found) == pruned.spec
