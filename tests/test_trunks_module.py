"""Trunks of Python modules: taken out, pruned, and put back into the module."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from trunk_nets import Policy, photos, policy

import rescompress as rc
from compress.checkpoints import load_checkpoint
from compress.importers.reference import reference
from compress.quantize import fake_quant_model
from rescompress.core.errors import BadInput, CheckpointError
from rescompress.core.operations import Affine, BatchNorm

Run = Callable[..., subprocess.CompletedProcess[str]]
EXAMPLE = torch.zeros(1, 3, 16, 16)


def images(count: int = 8) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def off(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / a.norm())


def test_the_known_part_of_a_module_is_its_trunk_and_goes_back() -> None:
    module = policy()
    found = rc.from_module(module, EXAMPLE, trunk="auto", images=images())
    assert [o.name for o in found.network.outputs] == ["block1", "project"]
    assert found.spec.num_classes is None
    norms = [layer.operation for layer in found.network.layers if isinstance(layer.operation, Affine | BatchNorm)]
    assert len(norms) == 5
    assert all(norm.frozen for norm in norms)
    x = images(1)
    with torch.no_grad():
        before, after = module(x), rc.into_module(module, found)(x)
    assert all(off(before[key], after[key]) < 1e-5 for key in before)
    pruned = rc.prune(
        found, budget=rc.Budget(kind="macs", value=0.6), align=1, scope="all", calibration_x=images(32)
    ).checkpoint
    back = rc.into_module(module, pruned)
    with torch.no_grad():
        changed = back(x)
        mine = rc.build_model(pruned.spec, pruned.state_dict).outputs(x)
        early = torch.linalg.vector_norm(mine[0], dim=(2, 3))
    assert off(changed["early"], early) < 1e-5
    assert off(before["action"], changed["action"]) > 1e-4
    assert sum(p.numel() for p in back.parameters()) < sum(p.numel() for p in module.parameters()) + 200
    int8 = rc.quantize(pruned, [images(32)], calibration="mse", bias_correction=False)
    with torch.no_grad():
        rounded = rc.into_module(module, int8)(x)
        early = torch.linalg.vector_norm(fake_quant_model(int8).outputs(x)[0], dim=(2, 3))
    assert 0 < off(changed["action"], rounded["action"]) < 0.5
    assert off(rounded["early"], early) < 1e-6 < off(changed["early"], early)


@pytest.mark.parametrize(
    ("ends", "outputs"), [("block1", ["block1"]), ("block2", ["block1", "block2"]), ("project,block1", ["block1", "project"])]
)
def test_ends_are_named_by_their_modules(ends: str, outputs: list[str]) -> None:
    found = rc.from_module(policy(), EXAMPLE, trunk=ends)
    assert [o.name for o in found.network.outputs] == outputs


def test_what_is_no_trunk_of_a_module_is_refused() -> None:
    module = policy()
    with pytest.raises(CheckpointError, match="makes no tensor 'blok1'"):
        rc.from_module(module, EXAMPLE, trunk="blok1")
    with pytest.raises(CheckpointError, match="not behind known operations"):
        rc.from_module(module, EXAMPLE, trunk="action")
    with pytest.raises(BadInput, match="names no tensor"):
        rc.from_module(module, EXAMPLE, trunk=",")
    with pytest.raises(CheckpointError, match="no trunk of a module"):
        rc.into_module(module, rc.from_module(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), EXAMPLE))
    found = rc.from_module(module, EXAMPLE, trunk="auto")
    with pytest.raises(CheckpointError, match="the module makes no"):
        rc.into_module(nn.Sequential(nn.Conv2d(3, 4, 3)), found)
    assert found.host is not None
    with pytest.raises(CheckpointError, match="lived in Python"):
        found.host.checked()


@pytest.mark.slow
def test_code_on_the_command_line(tmp_path: Path, rescompress: Run) -> None:
    folder = Path(__file__).parent
    (tmp_path / "model.py").write_text(
        f"import sys\nsys.path.insert(0, {str(folder)!r})\nfrom trunk_nets import Policy\ndef make():\n    return Policy()\n"
    )
    torch.save(policy().state_dict(), tmp_path / "policy.pt")
    photos(tmp_path / "photos")
    words = ("--trunk", "auto", "--code", "model.py:make", "--input", "3x16x16", "--preprocess", "rescale")
    page = rescompress("inspect", "policy.pt", *words, "--graph", "net.dot", cwd=tmp_path)
    assert "trunk of       policy.pt" in page.stdout
    assert "the rest of policy.pt" in (tmp_path / "net.dot").read_text()
    cut = ("--macs", "0.7", "--align", "1", "--scope", "all", "-o", "half.st")
    rescompress("prune", "policy.pt", *words, "--data", "photos", *cut, cwd=tmp_path)
    done = rescompress("evaluate", "half.st", "--data", "photos", "--json", cwd=tmp_path)
    assert json.loads(done.stdout)["infidelity"] > 1e-4
    half = load_checkpoint(tmp_path / "half.st")
    assert half.host is not None
    assert half.host.kind == "code"
    assert reference(half.host).network.outputs == half.network.outputs
    with torch.no_grad():
        assert off(policy()(images(1))["action"], rc.into_module(Policy().eval(), half)(images(1))["action"]) > 0
    written = rescompress("export", "half.st", "--target", "jetson", "-o", "out", "--json", "--precision", "fp32", cwd=tmp_path)
    assert set(json.loads(written.stdout)["host"]["outputs"]) == {"action", "early"}
    host = onnx.load(str(tmp_path / "out" / "host.onnx"))
    session = onnxruntime.InferenceSession(host.SerializeToString(), providers=["CPUExecutionProvider"])
    answers = session.run(["action", "early"], {"image": images(1).numpy()})
    with torch.no_grad():
        wanted = rc.into_module(policy(), half)(images(1))
    assert [off(wanted[name], torch.from_numpy(a)) < 1e-5 for name, a in zip(("action", "early"), answers, strict=True)]
    (tmp_path / "model.py").write_text("def make(): return None\n")
    assert "was changed" in rescompress("evaluate", "half.st", "--data", "photos", cwd=tmp_path, code=5).stderr
