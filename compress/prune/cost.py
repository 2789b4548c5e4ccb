"""What a network costs: the functions that budgets are about."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from rescompress.core.layers import Layer, total_macs, total_params

CostFunction = Callable[[Sequence[Layer]], float]
"""Cost of a list of layers, in any unit.

It is called with a whole walk, and with single *segments* of it: a convolution, pool or linear layer followed by the
elementwise layers (BatchNorm, ReLU, add) that a runtime fuses into it. The cost of a walk should be the sum over its
segments up to a constant; the allocator plans with segments and then checks the whole walk, so a small deviation costs
some optimality and never the budget.
"""

MACS: CostFunction = total_macs
PARAMS: CostFunction = total_params


def cost_of(name: str) -> CostFunction | None:
    """Return the built-in cost called `name` (``macs`` or ``params``), or None."""
    return {"macs": MACS, "params": PARAMS}.get(name)


def signature(layers: Iterable[Layer]) -> tuple[object, ...]:
    """Return what a cost may depend on; layers with equal signatures cost the same."""
    return tuple((x.op, x.in_shapes, x.out_shape, *(getattr(x.operation, name, None) for name in _MATTERS)) for x in layers)


_MATTERS = ("kernel", "stride", "pads", "dilation", "groups", "bias")


class CachedCost:
    """A cost function that remembers segments of equal shape: most blocks of a stage are alike."""

    def __init__(self, function: CostFunction) -> None:
        """Wrap `function`."""
        self._function = function
        self._known: dict[tuple[object, ...], float] = {}

    def __call__(self, layers: Sequence[Layer]) -> float:
        """Return the cost of one segment."""
        key = signature(layers)
        if key not in self._known:
            self._known[key] = float(self._function(layers))
        return self._known[key]
