"""A running mean of a network's weights and statistics while it trains."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_RAMP = 10


class RunningMean:
    """An exponential moving mean of everything that is a floating-point number in a network's state.

    Its decay rises from 0.1 to what was asked for, as (1 + n) / (10 + n) after n steps, so that it forgets the start.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Begin with the weights as they are.

        Args:
            model: The network.
            decay: Per step.
        """
        self._decay = decay
        self.steps = 0
        self._model = model
        self._mean = [v.detach().clone() for v in self._values()]

    def _values(self) -> list[Tensor]:
        return [v for v in self._model.state_dict().values() if v.is_floating_point()]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are now."""
        decay = min(self._decay, (1 + self.steps) / (_RAMP + self.steps))
        torch._foreach_lerp_(self._mean, [v.detach() for v in self._values()], 1.0 - decay)
        self.steps += 1

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the mean and the weights; a second time, and everything is as before."""
        for value, mean in zip(self._values(), self._mean, strict=True):
            kept = value.clone()
            value.copy_(mean)
            mean.copy_(kept)

    def state(self) -> dict[str, object]:
        """Return what `load` takes."""
        return {"steps": self.steps, "mean": [m.cpu() for m in self._mean]}

    @torch.no_grad()
    def load(self, state: dict[str, object]) -> None:
        """Take up a saved state."""
        self.steps = int(state["steps"])  # type: ignore[call-overload]
        for mean, known in zip(self._mean, state["mean"], strict=True):  # type: ignore[call-overload]
            mean.copy_(known)
