"""Memory that training frees is taken again without the kernel, and goes back at the end; kept images take their own size."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from compress.data import Inputs, MemoryStore, Split
from compress.memory import _glibc
from compress.resnet import build_model
from compress.train import train
from rescompress.core.settings import TrainSettings
from rescompress.core.spec import Block, Head, ModelSpec, Stem, StemConv

_BLOCK = 48 << 20
_FAULTS = f"""
import resource
import torch

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = torch.empty({_BLOCK}, dtype=torch.uint8)
    block[::4096] = 1
    del block
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

outside = min(faults() for _ in range(3))
"""
_PROGRAM = f"""{_FAULTS}
from compress.memory import kept_memory

def held():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * resource.getpagesize()

at_first = held()
with kept_memory():
    found = [faults() for _ in range(20)]
    inside = held()
after = held()
print(max(found), min(found), inside - at_first, after - at_first, outside)
"""


_TRAINING = f"""{_FAULTS}
import numpy as np
from compress.data import Inputs, MemoryStore, Split
from compress.resnet import build_model
from compress.train import train
from rescompress.core.settings import TrainSettings
from rescompress.core.spec import Block, Head, ModelSpec, Stem, StemConv

found = []
rng = np.random.default_rng(0)
spec = ModelSpec(
    input_shape=(3, 8, 8),
    stem=Stem(convs=(StemConv(width=4, kernel=3, stride=1),), max_pool=False),
    stages=((Block(name="layer1.0", kind="basic", widths=(4, 4)),),),
    head=Head(num_classes=2),
)
pixels = rng.integers(0, 256, (32, 8, 8, 3), dtype=np.uint8)
split = Split(MemoryStore(pixels), rng.integers(0, 2, 32), ("a", "b"), Inputs.of(spec).preprocessing, "test")
settings = TrainSettings(epochs=10, batch_size=16, device="cpu")
train(build_model(spec), split, settings, progress=lambda _: found.append(faults()))
print(len(found), min(found), outside)
"""


_FEW_OF_MANY = """
import resource
import types
import numpy as np
from compress.data import CachedStore

def held():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * resource.getpagesize()

def read(index):
    return np.broadcast_to(index.astype(np.uint8)[:, None, None, None], (len(index), 64, 64, 3))

class Files(types.SimpleNamespace):
    def __len__(self):
        return 50_000

store = CachedStore(Files(size=(3, 64, 64), read=read))
few = np.arange(0, 50_000, 200)
store.read(few[:1])
before = held()
right = all((store.read(few)[i] == few[i] % 256).all() for i in range(0, 250, 50))
print(int(right), held() - before)
"""


def _cannot_count() -> str:
    """Return why pages cannot be counted here, or nothing."""
    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if _glibc() is None:
        return "without glibc nothing is kept"
    return "the kernel hands out huge pages" if huge.is_file() and "[always]" in huge.read_text() else ""


def _numbers(program: str) -> list[int]:
    """Return what a program prints, in a process whose heap no other test has touched."""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return [int(word) for word in ran.stdout.split()]


@pytest.mark.skipif(bool(_cannot_count()), reason=_cannot_count())
def test_freed_blocks_are_kept_inside_and_given_back_after() -> None:
    most, least, inside, after, outside = _numbers(_PROGRAM)
    pages = _BLOCK // 4096
    assert most > pages // 2, "the first time the kernel hands out each page"
    assert least < 16, "glibc splits what is aligned, so that the first blocks that come back do not hold the next one"
    assert inside > _BLOCK
    assert after < _BLOCK // 4
    assert outside >= pages


@pytest.mark.skipif(sys.platform != "linux", reason="how much is held is read from /proc")
def test_few_images_of_many_take_the_memory_of_few() -> None:
    right, taken = _numbers(_FEW_OF_MANY)
    assert right
    assert taken < 4 * 250 * 64 * 64 * 3, "pages of 2 MB would take 500 MB"


def test_every_step_of_a_training_is_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    inside: list[bool] = [False]

    @contextlib.contextmanager
    def kept() -> Iterator[None]:
        inside[0] = True
        yield
        inside[0] = False

    found: list[bool] = []
    monkeypatch.setattr("compress.train.kept_memory", kept)
    spec = ModelSpec(
        input_shape=(3, 8, 8),
        stem=Stem(convs=(StemConv(width=4, kernel=3, stride=1),), max_pool=False),
        stages=((Block(name="layer1.0", kind="basic", widths=(4, 4)),),),
        head=Head(num_classes=2),
    )
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), dtype=np.uint8)
    split = Split(MemoryStore(pixels), np.arange(8) % 2, ("a", "b"), Inputs.of(spec).preprocessing, "test")
    settings = TrainSettings(epochs=1, batch_size=4, device="cpu")
    train(build_model(spec), split, settings, progress=lambda _: found.append(inside[0]))
    assert found == [True, True]
    assert inside == [False]


@pytest.mark.slow
@pytest.mark.skipif(bool(_cannot_count()), reason=_cannot_count())
def test_training_steps_keep_memory() -> None:
    steps, least, outside = _numbers(_TRAINING)
    assert steps == 20
    assert outside >= _BLOCK // 4096
    assert least < 64
