"""What a traced program says in several steps and the network says in one: biases, activations, chains of constants."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from compress.importers.trace import Step

ENDS = ("softmax", "log_softmax", "sigmoid")
"""Functions of class scores that keep their order: an output is the logits in front of one."""
_CLOSE = 1e-5


def simplify(steps: Sequence[Step], outputs: list[Step]) -> tuple[list[Step], list[Step], list[str]]:
    """Return the steps that the outputs need, each an operation of a network, the outputs, and what each one ended in.

    Args:
        steps: In the order of computation.
        outputs: Among them.
    """
    graph = _Graph(list(steps), list(outputs))
    graph.each(_activation)
    graph.each(_affine)
    graph.each(_bias)
    graph.each(_joined_linear)
    graph.each(_chosen_early)
    graph.each(_selects)
    graph.each(_placed)
    ends = []
    for i, output in enumerate(graph.outputs):
        ends.append(output.op if output.op in ENDS and _is_logits(output.inputs[0]) else "")
        if ends[-1]:
            graph.outputs[i] = output.inputs[0]
    return graph.needed(), graph.outputs, ends


def _is_logits(step: Step) -> bool:
    return not step.is_map and has_scores(step)


def has_scores(step: Step) -> bool:
    """Whether a vector holds scores of classes rather than features: a linear layer or a convolution makes them."""
    while step.op in ("flatten", "global_avg", "global_max", "dropout", "affine", "avg_pool"):
        step = step.inputs[0]
    return step.op in ("linear", "conv")


def needed(steps: Sequence[Step], outputs: Sequence[Step]) -> list[Step]:
    """Return the input and the steps that the outputs need, in order."""
    found: set[int] = set()
    todo = list(outputs)
    while todo:
        step = todo.pop()
        if id(step) not in found:
            found.add(id(step))
            todo += step.inputs
    return [s for s in steps if id(s) in found or s.op == "input"]


class _Graph:
    """Steps, and who reads them."""

    def __init__(self, steps: list[Step], outputs: list[Step]) -> None:
        self.steps, self.outputs = steps, outputs

    def needed(self) -> list[Step]:
        """Return the steps that the outputs need, in order."""
        return needed(self.steps, self.outputs)

    def each(self, rewrite: Callable[[_Graph, Step], Step | None]) -> None:
        """Replace steps by what `rewrite` returns for them, first to last, until nothing changes."""
        changed = True
        while changed:
            changed = False
            self.steps = self.needed()
            self.readers: dict[int, list[Step]] = {id(s): [] for s in self.steps}
            for step in self.steps:
                for source in step.inputs:
                    self.readers[id(source)].append(step)
            for step in self.steps:
                new = rewrite(self, step)
                if new is not None:
                    self._replace(step, new)
                    changed = True
                    break

    def alone(self, step: Step) -> bool:
        """Whether one step reads it, and the world does not."""
        return len(self.readers[id(step)]) == 1 and step not in self.outputs

    def _replace(self, old: Step, new: Step) -> None:
        at = self.steps.index(old)
        if new not in self.steps:
            self.steps[at] = new
        for step in self.steps:
            step.inputs = [new if s is old else s for s in step.inputs]
        self.outputs = [new if s is old else s for s in self.outputs]
        if new.source is None or new.op in ("conv", "linear", "batch_norm", "affine"):
            new.source = old.source


def _uniform(step: Step) -> tuple[float, float] | None:
    """Return factor and summand of an affine step that has the same for all channels, or None."""
    if step.op != "affine":
        return None
    scale, shift = step.tensors["scale"], step.tensors["shift"]
    if not (torch.equal(scale, scale[:1].expand_as(scale)) and torch.equal(shift, shift[:1].expand_as(shift))):
        return None
    return float(scale[0]), float(shift[0])


def _near(found: tuple[float, float] | None, factor: float, summand: float) -> bool:
    return (
        found is not None
        and math.isclose(found[0], factor, rel_tol=_CLOSE)
        and math.isclose(found[1], summand, rel_tol=_CLOSE, abs_tol=_CLOSE)
    )


def _made(op: str, like: Step, source: Step, **attributes: object) -> Step:
    return Step(op, like.name, [source], like.shape, dict(attributes), {}, like.source)


def _activation(graph: _Graph, step: Step) -> Step | None:
    """Return the activation that a product of functions of one tensor is."""
    if step.op == "affine" and step.inputs[0].op == "clip" and _near(_uniform(step), 1 / 6, 0.0):
        inner = step.inputs[0]
        bounds = (inner.attributes["low"], inner.attributes["high"])
        if bounds == (0.0, 6.0) and _near(_uniform(inner.inputs[0]), 1.0, 3.0):
            return _made("hard_sigmoid", step, inner.inputs[0].inputs[0], alpha=1 / 6, beta=0.5)
    if step.op == "clip" and (step.attributes["low"], step.attributes["high"]) == (0.0, 1.0):
        found = _uniform(step.inputs[0])
        if found is not None and found[0] > 0 and found[1] == 0.5:
            return _made("hard_sigmoid", step, step.inputs[0].inputs[0], alpha=found[0], beta=0.5)
    if step.op not in ("mul", "affine"):
        return None
    factor, parts = _factors(step)
    if len(parts) != 2:
        return None
    for x, function in (parts, parts[::-1]):
        if factor == 1.0 and function.op == "sigmoid" and function.inputs[0] is x:
            return _made("silu", step, x)
        hard = factor == 1.0 and function.op == "hard_sigmoid" and function.inputs[0] is x
        if hard and math.isclose(function.attributes["alpha"], 1 / 6, rel_tol=_CLOSE) and function.attributes["beta"] == 0.5:
            return _made("hard_swish", step, x)
        if (
            math.isclose(factor, 1 / 6, rel_tol=_CLOSE)
            and function.op == "clip"
            and (function.attributes["low"], function.attributes["high"]) == (0.0, 6.0)
            and _near(_uniform(function.inputs[0]), 1.0, 3.0)
            and function.inputs[0].inputs[0] is x
        ):
            return _made("hard_swish", step, x)
        if math.isclose(factor, 0.5, rel_tol=_CLOSE) and _near(_uniform(function), 1.0, 1.0):
            erf = function.inputs[0]
            angle = erf.inputs[0] if erf.op == "erf" else None
            if angle is not None and _near(_uniform(angle), math.sqrt(0.5), 0.0) and angle.inputs[0] is x:
                return _made("gelu", step, x, tanh=False)
    return None


def _factors(step: Step) -> tuple[float, list[Step]]:
    """Return a product as a number and the tensors that it multiplies."""
    if step.op == "mul" and step.inputs[0].shape == step.inputs[1].shape:
        (a, left), (b, right) = map(_factors, step.inputs)
        return a * b, left + right
    found = _uniform(step)
    if found is not None and found[1] == 0.0:
        factor, parts = _factors(step.inputs[0])
        return found[0] * factor, parts
    return 1.0, [step]


def _affine(graph: _Graph, step: Step) -> Step | None:
    """Leave an affine map out that does nothing, join two that follow each other, and one behind a BatchNorm with it."""
    if step.op != "affine":
        return None
    if _uniform(step) == (1.0, 0.0):
        return step.inputs[0]
    before = step.inputs[0]
    if not graph.alone(before):
        return None
    scale, shift = step.tensors["scale"], step.tensors["shift"]
    if before.op == "affine":
        tensors = {"scale": scale * before.tensors["scale"], "shift": scale * before.tensors["shift"] + shift}
        frozen = bool(before.attributes.get("frozen")) and bool(step.attributes.get("frozen"))
        return Step("affine", before.name, before.inputs, step.shape, {"frozen": frozen}, tensors)
    if before.op in ("batch_norm", "group_norm"):
        weight = before.tensors.get("weight", torch.ones_like(scale))
        bias = before.tensors.get("bias", torch.zeros_like(scale))
        tensors = {**before.tensors, "weight": scale * weight, "bias": scale * bias + shift}
        return Step(before.op, before.name, before.inputs, step.shape, before.attributes, tensors)
    return None


def _bias(graph: _Graph, step: Step) -> Step | None:
    """Make a constant that is added to what a convolution or linear layer makes its bias."""
    before = step.inputs[0] if step.op == "affine" else None
    if before is None or before.op not in ("conv", "linear") or not graph.alone(before):
        return None
    scale, shift = step.tensors["scale"], step.tensors["shift"]
    if before.op == "conv" and not torch.equal(scale, torch.ones_like(scale)):
        return None
    weight = before.tensors["weight"]
    if before.op == "linear":
        weight = weight * scale[:, None]
    tensors = {"weight": weight, "bias": scale * before.tensors.get("bias", torch.zeros_like(shift)) + shift}
    return Step(before.op, before.name, before.inputs, step.shape, before.attributes, tensors)


def _joined_linear(graph: _Graph, step: Step) -> Step | None:
    """Join a linear layer of our own making (the difference of two branches) with the one before it."""
    before = step.inputs[0] if step.op == "linear" and step.attributes.get("own") else None
    if before is None or before.op != "linear" or not graph.alone(before):
        return None
    matrix = step.tensors["weight"]
    tensors = {"weight": matrix @ before.tensors["weight"]}
    if "bias" in before.tensors:
        tensors["bias"] = matrix @ before.tensors["bias"]
    return Step("linear", before.name, before.inputs, step.shape, before.attributes, tensors)


def _chosen_early(graph: _Graph, step: Step) -> Step | None:
    """Choose elements of a vector before a function of each, and rows of a linear layer's matrix instead of its outputs."""
    if step.op != "select" or step.is_map or min(step.attributes["channels"]) < 0:
        return None
    before, chosen = step.inputs[0], list(step.attributes["channels"])
    if before.op in ("sigmoid", "relu", "hard_sigmoid", "tanh"):
        inner = Step("select", step.name, before.inputs, step.shape, step.attributes)
        graph.steps.insert(graph.steps.index(step), inner)
        return Step(before.op, before.name, [inner], step.shape, before.attributes)
    if before.op == "linear" and all(r.op == "select" for r in graph.readers[id(before)]) and before not in graph.outputs:
        tensors = {k: v[chosen] for k, v in before.tensors.items()}
        return Step("linear", before.name, before.inputs, step.shape, before.attributes, tensors)
    return None


def _placed(graph: _Graph, step: Step) -> Step | None:
    """Give the channels of a convolution over channels their places, where a choice spreads them and another gathers them."""
    conv = step.inputs[0] if step.op == "select" else None
    spread = conv.inputs[0] if conv is not None and conv.op == "channel_conv" and graph.alone(conv) else None
    if conv is None or spread is None or spread.op != "select" or not graph.alone(spread):
        return None
    (source,) = spread.inputs
    found = [(c, i) for i, c in enumerate(spread.attributes["channels"]) if c >= 0]
    if sorted(c for c, _ in found) != list(range(source.shape[0])):
        return None
    places = tuple(i for _, i in sorted(found))
    if step.attributes["channels"] != places:
        return None
    return Step("channel_conv", conv.name, [source], step.shape, {**conv.attributes, "places": places}, conv.tensors)


def _selects(graph: _Graph, step: Step) -> Step | None:
    """Join two choices of channels that follow each other."""
    before = step.inputs[0] if step.op == "select" else None
    if before is None or before.op != "select" or not graph.alone(before):
        return None
    inner = before.attributes["channels"]
    channels = tuple(-1 if c < 0 else inner[c] for c in step.attributes["channels"])
    stride = tuple(a * b for a, b in zip(before.attributes["stride"], step.attributes["stride"], strict=True))
    return Step("select", step.name, before.inputs, step.shape, {"channels": channels, "stride": stride})
