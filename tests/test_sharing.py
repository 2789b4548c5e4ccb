"""Work that several processes share comes to what one of them would find, to the bit."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from compress.data import MemoryStore, Split
from compress.evaluate import Evaluation, TorchRunner, evaluate
from compress.processes import Together
from compress.quantize import calibrate
from compress.resnet import build_model
from rescompress.core.errors import DataError
from rescompress.core.quantizers import place
from rescompress.core.spec import Block, Head, ModelSpec, Preprocessing, Stem, StemConv

SPEC = ModelSpec(
    input_shape=(3, 8, 8),
    stem=Stem(convs=(StemConv(width=4, kernel=3, stride=1),), max_pool=False),
    stages=((Block(name="layer1.0", kind="basic", widths=(4, 4)),),),
    head=Head(num_classes=7),
    preprocessing=Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3, resize=None),
)


@dataclass
class Board:
    """What threads that stand for processes hand each other."""

    world: int
    barrier: threading.Barrier = field(init=False)
    values: dict[int, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.world, timeout=20)


class Threads(Together):
    """Processes of a test: threads that meet at a board."""

    board: Board

    def gather(self, mine: Any) -> list[Any]:
        self.board.values[self.rank] = mine
        self.board.barrier.wait()
        found = [self.board.values[rank] for rank in range(self.world)]
        self.board.barrier.wait()
        return found


def by_all(world: int, work: Callable[[Together], Any]) -> list[Any]:
    """Return what each process finds."""
    board = Board(world)
    found: list[Any] = [None] * world

    def one(rank: int) -> None:
        together = Threads(rank, world)
        object.__setattr__(together, "board", board)
        found[rank] = work(together)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return found


def split_of(images: int) -> Split:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (images, 8, 8, 3), dtype=np.uint8)
    x[images // 2] = x[0]  # a copy
    return Split(MemoryStore(x), rng.integers(0, 7, images), tuple("abcdefg"), SPEC.preprocessing, f"{images}")


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("images", [5, 41])
def test_an_evaluation_in_shares_is_the_same(world: int, images: int) -> None:
    torch.manual_seed(0)
    model, split = build_model(SPEC), split_of(images)
    alone = evaluate(TorchRunner(model), split, batch_size=8)
    found: list[Evaluation] = by_all(
        world, lambda together: evaluate(TorchRunner(model), split, batch_size=8, sharing=together)
    )
    for one in found:
        assert one.metrics == alone.metrics
        assert one.outcomes == alone.outcomes
        assert one.notes == alone.notes
        assert np.array_equal(one.predictions, alone.predictions)


@pytest.mark.parametrize("world", [2, 3])
def test_statistics_in_shares_are_the_same(world: int) -> None:
    torch.manual_seed(0)
    model = build_model(SPEC).eval()
    batches = [x for x, _ in split_of(37).batches(8)]
    names = [q.tensor for q in place(SPEC, "tensorrt") if q.kind == "activation" and q.shares is None]
    alone = calibrate.observe(model, batches, names)
    for found in by_all(world, lambda together: calibrate.observe(model, batches, names, together)):
        assert found.keys() == alone.keys()
        for name, reach in alone.items():
            assert (found[name].largest, found[name].mean_largest) == (reach.largest, reach.mean_largest), name
            assert torch.equal(found[name].histogram, reach.histogram), name


def test_one_process_shares_with_nobody() -> None:
    assert Together().gather("mine") == ["mine"]
    assert Together().lead(3) == 3
    with pytest.raises(DataError, match="no image"):
        evaluate(TorchRunner(build_model(SPEC)), split_of(4).subset(np.arange(0)))
