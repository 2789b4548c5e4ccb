"""What is freed while training is taken again without the kernel's help, and goes back at the end."""

from __future__ import annotations

import resource
import subprocess
import sys

import numpy as np
import pytest
import torch

from compress.data import Inputs, MemoryStore, Split
from compress.memory import _glibc
from compress.resnet import build_model
from compress.train import TrainState, train
from rescompress.core.settings import TrainSettings
from rescompress.core.spec import Block, Head, ModelSpec, Stem, StemConv

_BLOCK = 48 << 20
_PROGRAM = f"""
import resource
import torch
from compress.memory import kept_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = torch.empty({_BLOCK}, dtype=torch.uint8)
    block[::4096] = 1
    del block
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def held():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * resource.getpagesize()

outside = min(faults() for _ in range(3))
at_first = held()
with kept_memory():
    found = [faults() for _ in range(20)]
    inside = held()
after = held()
print(max(found), min(found), inside - at_first, after - at_first, outside)
"""


@pytest.mark.skipif(_glibc() is None, reason="without glibc nothing is kept")
def test_freed_blocks_are_kept_inside_and_given_back_after() -> None:
    ran = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, check=True)
    most, least, inside, after, outside = map(int, ran.stdout.split())
    pages = _BLOCK // 4096
    assert most > pages // 2, "the first time the kernel hands out each page"
    assert least < 16, "glibc splits what is aligned, so that the first blocks that come back do not hold the next one"
    assert inside > _BLOCK
    assert after < _BLOCK // 4
    assert outside >= pages


@pytest.mark.skipif(_glibc() is None, reason="without glibc nothing is kept")
def test_training_steps_keep_memory() -> None:
    found: list[int] = []

    def look(_: TrainState) -> None:
        found.append(_faults())

    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (32, 8, 8, 3), dtype=np.uint8)
    spec = ModelSpec(
        input_shape=(3, 8, 8),
        stem=Stem(convs=(StemConv(width=4, kernel=3, stride=1),), max_pool=False),
        stages=((Block(name="layer1.0", kind="basic", widths=(4, 4)),),),
        head=Head(num_classes=2),
    )
    split = Split(MemoryStore(pixels), rng.integers(0, 2, 32), ("a", "b"), Inputs.of(spec).preprocessing, "test")
    outside = min(_faults() for _ in range(3))
    train(build_model(spec), split, TrainSettings(epochs=10, batch_size=16, device="cpu"), progress=look)
    assert len(found) == 20
    assert outside >= _BLOCK // 4096
    assert min(found) < 64


def _faults() -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = torch.empty(_BLOCK, dtype=torch.uint8)
    block[::4096] = 1
    del block
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
