"""The processes that ``torchrun`` or ``accelerate launch`` starts together, as the pipeline sees them."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

_T = TypeVar("_T")

PATIENCE = datetime.timedelta(hours=24)
"""How long a process waits for the main one, which may be measuring or calibrating alone."""


class TorchPeers:
    """Processes of one ``torch.distributed`` group; the first leads."""

    def __init__(self) -> None:
        from accelerate import InitProcessGroupKwargs, PartialState

        # Without a GPU, Accelerate forms a group only if it is told that the CPU is meant.
        cpu = not torch.cuda.is_available()
        self._state = PartialState(cpu=cpu, **InitProcessGroupKwargs(timeout=PATIENCE).to_kwargs())

    @property
    def is_main(self) -> bool:
        """Whether this process decides and writes."""
        main: bool = self._state.is_main_process
        return main

    def share(self, text: str | None) -> str:
        """Return the main process's text in every process."""
        box: list[str | None] = [text]
        dist.broadcast_object_list(box, src=0)
        return box[0] or ""


@dataclass(frozen=True)
class Together:
    """Processes that compute one thing: each does its share, and all know the whole.

    Attributes:
        rank: Number of this one.
        world: How many there are.
    """

    rank: int = 0
    world: int = 1

    def gather(self, mine: _T) -> list[_T]:
        """Return what each process has, in their order."""
        if self.world == 1:
            return [mine]
        found: list[_T | None] = [None] * self.world
        dist.all_gather_object(found, mine)
        return found  # type: ignore[return-value]

    def lead(self, value: _T) -> _T:
        """Return the first process's value in every process."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]


ALONE = Together()


def together() -> Together:
    """Return the processes that were launched with this one; only for work that every one of them does."""
    return Together(dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else ALONE
