"""Loading and inspecting a ResNet-152: under three times its weights in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision

PROBE = """
import json, resource, sys
import torch
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
from compress.checkpoints import load_checkpoint
from rescompress.runs.inspection import describe
found = describe(load_checkpoint(sys.argv[1]))
print(json.dumps({"ratio": (peak() - before) / found["totals"]["size_bytes"], "arch": found["arch"]}))
"""


def with_optimizer(state: dict[str, torch.Tensor]) -> object:
    moments = {i: {"exp_avg": v, "exp_avg_sq": v + 1} for i, v in enumerate(state.values())}
    return {"state_dict": state, "optimizer": {"state": moments}}


@pytest.mark.slow
@pytest.mark.parametrize("wrap", [lambda s: s, with_optimizer], ids=["weights", "with optimizer state"])
def test_resnet152(wrap: Callable[[dict[str, torch.Tensor]], object], tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    torch.save(wrap(torchvision.models.resnet152().state_dict()), path)
    done = subprocess.run([sys.executable, "-c", PROBE, str(path)], capture_output=True, text=True, check=True)
    measured = json.loads(done.stdout)
    assert measured["arch"] == "resnet152"
    assert measured["ratio"] < 3.0
