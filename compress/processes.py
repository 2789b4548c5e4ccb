"""The processes that ``torchrun`` or ``accelerate launch`` starts together, as the pipeline sees them."""

from __future__ import annotations

import datetime

import torch
import torch.distributed as dist

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
