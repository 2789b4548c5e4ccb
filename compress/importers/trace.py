"""`Trace`: what a program does to its images, followed value by value until only operations of a network are left.

The ways in (`compress.importers.aten` for torch's operators, `compress.importers.onnx_file`, `compress.importers.keras_config`)
call the methods of one `Trace` in the order of the program. Whatever only moves numbers about (reshape, transpose, slice, pad,
concatenate with zeros, flip, expand) makes no operation: it is done to the *places* of the numbers, by torch itself. What such
a chain amounts to is then read off the places: nothing, a flattening, a padding of the next convolution, a choice of channels
with zeros. So a shortcut that pads channels is recognised however its author wrote it, and so is a layout of channels last.

Shape suffixes: N batch, C channels, H height, W width. Shapes of steps are without the batch: (C, H, W), or (C,) for a vector.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

Pads = tuple[int, int, int, int]
"""Rows and columns of padding: top, left, bottom, right."""
NONE: Pads = (0, 0, 0, 0)
MAX_ELEMENTS = 2**27
_TO_FIRST, _TO_LAST = (0, 3, 1, 2), (0, 2, 3, 1)


class Refused(Exception):
    """What a program does at one place is no operation of a network here."""


@dataclass(eq=False)
class Step:
    """One operation of the network.

    Attributes:
        op: What it computes.
        name: Unique.
        inputs: The steps whose outputs it reads.
        shape: Of its output, without the batch.
        attributes: Numbers that it computes with.
        tensors: Its parameters, by torch's names.
        source: What the program calls the tensor that this step makes, where it makes one as it is.
    """

    op: str
    name: str
    inputs: list[Step]
    shape: tuple[int, ...]
    attributes: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    source: str | None = None

    @property
    def is_map(self) -> bool:
        """Whether its output has height and width."""
        return len(self.shape) == 3


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor of the program: numbers of one step's output, at other places perhaps.

    Attributes:
        trace: It belongs to.
        step: Makes the numbers.
        places: Per element, its place in the step's output (flat, with the batch), -1 for a zero; None where the tensor is the
            output as it is.
        name: What to call a step that moves the numbers there, if one is needed.
    """

    trace: Trace
    step: Step
    places: Tensor | None = None
    name: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor, with the batch."""
        return (self.trace.batch, *self.step.shape) if self.places is None else tuple(self.places.shape)

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    def all_places(self) -> Tensor:
        """Return the place of every element."""
        if self.places is not None:
            return self.places
        natural = (self.trace.batch, *self.step.shape)
        if math.prod(natural) > MAX_ELEMENTS:
            raise Refused("makes tensors beyond measure")
        return torch.arange(math.prod(natural)).reshape(natural)

    def move(self, function: Callable[[Tensor], Tensor], *, unnamed: bool = False) -> Value:
        """Return the tensor that a function makes which moves numbers about, or drops some, or adds -1 where zeros come in.

        Args:
            function: It is given the places of the numbers.
            unnamed: Whether the program does not do that itself.
        """
        places = function(self.all_places())
        if places.numel() > MAX_ELEMENTS:
            raise Refused("makes tensors beyond measure")
        natural = (self.trace.batch, *self.step.shape)
        same = tuple(places.shape) == natural and torch.equal(places.flatten(), torch.arange(places.numel()))
        return Value(self.trace, self.step, None if same else places, self.name if unnamed else self.trace.name)

    def has_zeros(self) -> bool:
        """Whether some elements are zeros that were put in."""
        return self.places is not None and bool((self.places < 0).any())


@dataclass(frozen=True, eq=False)
class Stack:
    """Tensors of one shape, stacked along a new dimension."""

    parts: tuple[Value, ...]
    dim: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape, with the batch."""
        inner = self.parts[0].shape
        return (*inner[: self.dim], len(self.parts), *inner[self.dim :])

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)


class Trace:
    """The steps that a program's calls have made so far.

    Attributes:
        batch: Images in the program's input.
        steps: In the order of computation; the first is the input.
        name: What to call the next step; set before every call, as are the others.
        source: The program's tensor that the next call makes.
        frozen: Whether the parameters of the next call are constants that no training changes.
    """

    def __init__(self, shape: tuple[int, ...], batch: int = 1, name: str = "input") -> None:
        """Start with the input.

        Args:
            shape: Of one image: channels, height, width.
            batch: Images.
            name: Of the input in the program.
        """
        self.batch = batch
        self.steps = [Step("input", "input", [], tuple(shape), source=name)]
        self.name = ""
        self.source: str | None = None
        self.frozen = False
        self._moves: dict[tuple[Any, ...], Step] = {}

    def input(self) -> Value:
        """Return the images."""
        return Value(self, self.steps[0])

    def emit(
        self,
        op: str,
        inputs: Sequence[Step],
        shape: Sequence[int],
        tensors: Mapping[str, Tensor] | None = None,
        **attributes: Any,
    ) -> Step:
        """Add a step and return it."""
        if math.prod(shape) * self.batch > MAX_ELEMENTS or any(n < 1 for n in shape):
            raise Refused(f"makes a tensor of shape {tuple(shape)}")
        kept = {k: v.detach().float().contiguous() for k, v in (tensors or {}).items()}
        if kept and self.frozen:
            attributes["frozen"] = True
        step = Step(op, self.name or op, list(inputs), tuple(shape), attributes, kept, self.source)
        self.steps.append(step)
        return step

    # What a value amounts to

    def as_map(self, x: Value, *, padded: bool = False, fill: bool = False) -> tuple[Step, Pads]:
        """Return the step whose output is a tensor (N, C, H, W), and its padding with zeros.

        Args:
            x: The tensor.
            padded: Whether the reader takes padding over; else a step for it is added.
            fill: Whether the reader's padding holds no zeros but nothing (maxima).

        Raises:
            Refused: It is no map of features, or mixes images.
        """
        if x.ndim != 4:
            raise Refused(f"reads a tensor of {x.ndim} dimensions where a map of features belongs")
        if x.places is None:
            return x.step, NONE
        step, places = x.step, x.places
        n, c, h, w = places.shape
        if not step.is_map:
            if h == w == 1 and n == self.batch:
                return self._chosen_vector(x.move(lambda p: p.reshape(n, c))), NONE
            raise Refused("makes a map of features of a vector")
        C, H, W = step.shape
        if n != self.batch:
            raise Refused("mixes the images of a batch")
        valid = places >= 0
        if not bool(valid.any()):
            raise Refused("reads nothing but zeros")
        axes = (places // (C * H * W), places // (H * W) % C, places // W % H, places % W)
        maps = [_along(axis, valid, i) for i, axis in enumerate(axes)]
        if any(m is None for m in maps):
            raise Refused("moves pixels and channels in a way that is no padding and no choice of channels")
        ns, cs, hs, ws = (m for m in maps if m is not None)
        kept = (ns >= 0)[:, None, None, None] & (cs >= 0)[:, None, None] & (hs >= 0)[:, None] & (ws >= 0)
        if not torch.equal(kept, valid) or not torch.equal(ns, torch.arange(n)):
            raise Refused("mixes the images of a batch, or pads in a way that is no rectangle")
        top, stride_h, bottom = self._spaced(hs, H)
        left, stride_w, right = self._spaced(ws, W)
        rows, columns = h - top - bottom, w - left - right
        if not torch.equal(cs, torch.arange(C)) or (stride_h, stride_w) != (1, 1):
            chosen = tuple(int(i) for i in cs)
            step = self._moved(x, "select", step, (c, rows, columns), channels=chosen, stride=(stride_h, stride_w))
        pads = (top, left, bottom, right)
        if padded or pads == NONE:
            return step, pads
        return self._moved(x, "pad", step, (c, h, w), pads=pads, mode="zeros"), NONE

    def _moved(self, x: Value, op: str, step: Step, shape: tuple[int, ...], **attributes: Any) -> Step:
        """Return the step that puts the numbers of a tensor where it has them; the same one for everybody who reads it."""
        key = (op, id(step), shape, tuple(attributes.values()))
        if key not in self._moves:
            name, source, frozen = self.name, self.source, self.frozen
            self.name, self.source = x.name or name, None
            self._moves[key] = self.emit(op, [step], shape, **attributes)
            self.name, self.source, self.frozen = name, source, frozen
        return self._moves[key]

    def _spaced(self, places: Tensor, size: int) -> tuple[int, int, int]:
        """Return zeros before, distance, and zeros after, of rows or columns that a tensor keeps."""
        found = [int(p) for p in places]
        inside = [i for i, p in enumerate(found) if p >= 0]
        before, after = inside[0], len(found) - 1 - inside[-1]
        kept = found[before : len(found) - after]
        stride = kept[1] - kept[0] if len(kept) > 1 else size
        stride = stride if len(kept) > 1 or size > 1 else 1
        if kept != list(range(0, size, stride)) if stride > 0 else True:
            raise Refused("crops, flips or repeats rows or columns of a map")
        return before, stride, after

    def as_vector(self, x: Value) -> tuple[Step, Tensor | None]:
        """Return the step whose output are the features of a tensor (N, F), and their order in it (None: as they are).

        Dimensions of one element do not count. A map is flattened.

        Raises:
            Refused: It is no vector per image.
        """
        n = self.batch
        if x.shape[0] != n and not (n == 1 and math.prod(x.shape) == math.prod(x.step.shape)):
            raise Refused("mixes the images of a batch")
        places = x.all_places().reshape(n, -1)
        size = math.prod(x.step.shape)
        order = places[0]
        if bool((order < 0).any()) or bool((order >= size).any()):
            raise Refused("pads a vector with zeros")
        if any(not torch.equal(places[i], order + i * size) for i in range(n)):
            raise Refused("mixes the images of a batch")
        step = x.step
        if step.is_map:
            step = self._moved(x, "flatten", step, (size,))
        plain = len(order) == size and torch.equal(order, torch.arange(size))
        return step, None if plain else order

    def _chosen_vector(self, x: Value) -> Step:
        step, order = self.as_vector(x)
        if order is None:
            return step
        return self._moved(x, "select", step, (len(order),), channels=tuple(int(i) for i in order), stride=(1, 1))

    def settled(self, x: Value) -> Step:
        """Return the step whose output is a tensor as it is: for outputs of the network."""
        if x.places is None:
            return x.step
        if x.ndim == 4 and x.step.is_map and (x.shape[2], x.shape[3]) != (1, 1):
            return self.as_map(x)[0]
        if x.ndim == 4 and x.step.is_map:
            try:
                return self.as_map(x)[0]
            except Refused:
                pass
        return self._chosen_vector(x)

    # Operations

    def conv(
        self,
        x: Value,
        weight_OIKK: Tensor,
        bias: Tensor | None,
        stride: Sequence[int] = (1, 1),
        pads: Pads = NONE,
        dilation: Sequence[int] = (1, 1),
        groups: int = 1,
    ) -> Value:
        """Return a two-dimensional convolution."""
        step, before = self.as_map(x, padded=True)
        tensors = {"weight": weight_OIKK} | ({"bias": bias} if bias is not None else {})
        o, i, kh, kw = weight_OIKK.shape
        if not step.is_map:  # a convolution of pooled features: only the middle of the kernel sees them
            if groups != 1 or (kh, kw) != (1, 1) or tuple(pads) != NONE or before != NONE:
                raise Refused("convolves a vector with more than a 1x1 kernel")
            made = self.linear(Value(self, step), weight_OIKK.reshape(o, i), bias)
            return made.move(lambda p: p.reshape(self.batch, o, 1, 1))
        c, h, w = step.shape
        if c != i * groups:
            raise Refused(f"convolves {c} channels with a kernel for {i * groups}")
        total = _plus(pads, before)
        shape = (o, *(_out(*v) for v in zip((h, w), (kh, kw), stride, _sums(total), dilation, strict=True)))
        made_step = self.emit(
            "conv", [step], shape, tensors, stride=tuple(stride), pads=total, dilation=tuple(dilation), groups=groups
        )
        return Value(self, made_step)

    def conv1d(self, x: Value, weight_OIK: Tensor, bias: Tensor | None, padding: int) -> Value:
        """Return a convolution over the channels of a vector (N, 1, C), as efficient channel attention has."""
        if x.ndim != 3 or x.shape[1] != 1 or tuple(weight_OIK.shape[:2]) != (1, 1):
            raise Refused("is a one-dimensional convolution")
        length, half = x.shape[2], weight_OIK.shape[2] // 2
        if weight_OIK.shape[2] % 2 == 0 or padding > half or length <= 2 * (half - padding):
            raise Refused(f"is a one-dimensional convolution of {weight_OIK.shape[2]} places with a padding of {padding}")
        tensors = {"weight": weight_OIK} | ({"bias": bias} if bias is not None else {})
        made = self.emit(
            "channel_conv", [self._line(x)], (length,), tensors, length=length, places=tuple(range(length))
        )  # fmt: skip
        short = half - padding
        return Value(self, made).move(lambda p: p.reshape(self.batch, 1, length)[:, :, short : length - short])

    def _line(self, x: Value) -> Step:
        """Return the step whose output are the features of a tensor (N, 1, F) in order, with its zeros."""
        rows, size = x.all_places().reshape(self.batch, -1), math.prod(x.step.shape)
        images = size * torch.arange(self.batch)[:, None]
        if x.shape[0] != self.batch or not torch.equal(rows, torch.where(rows[:1] < 0, rows[:1], rows[:1] + images)):
            raise Refused("mixes the images of a batch")
        if bool((rows[0] >= size).any()) or not bool((rows[0] >= 0).any()):
            raise Refused("reads nothing of its image")
        step = self._moved(x, "flatten", x.step, (size,)) if x.step.is_map else x.step
        if torch.equal(rows[0], torch.arange(size)):
            return step
        return self._moved(x, "select", step, (rows.shape[1],), channels=tuple(int(i) for i in rows[0]), stride=(1, 1))

    def linear(self, x: Value, weight_OI: Tensor, bias: Tensor | None, *, own: bool = False) -> Value:
        """Return a linear layer over the last dimension; over the channels of a map that is a convolution of one pixel."""
        o, i = weight_OI.shape
        if x.shape[-1] != i:
            raise Refused(f"multiplies {x.shape[-1]} features with a matrix for {i}")
        tensors = {"weight": weight_OI} | ({"bias": bias} if bias is not None else {})
        if x.ndim == 4 and math.prod(x.shape[1:3]) > 1:
            made = self.conv(x.move(lambda p: p.permute(_TO_FIRST)), weight_OI[:, :, None, None], bias)
            return made.move(lambda p: p.permute(_TO_LAST))
        if math.prod(x.shape) != self.batch * i:
            raise Refused(f"multiplies a matrix with a tensor of shape {x.shape}")
        step, order = self.as_vector(x)
        (f,) = step.shape
        if order is not None:
            weight = torch.zeros(o, f).index_add_(1, order, weight_OI.detach().float())
            tensors["weight"] = weight
        shape = (*x.shape[:-1], o)
        made_step = self.emit("linear", [step], (o,), tensors, own=own)
        return Value(self, made_step).move(lambda p: p.reshape(shape))

    def batch_norm(self, x: Value, tensors: Mapping[str, Tensor | None], eps: float) -> Value:
        """Return a BatchNorm of the channels (dimension 1) with its running statistics."""
        step = self._channels_second(x)
        kept = {k: v for k, v in tensors.items() if v is not None}
        return Value(self, self.emit("batch_norm", [step], step.shape, kept, eps=float(eps))).move(lambda p: p.reshape(x.shape))

    def group_norm(self, x: Value, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Value:
        """Return a GroupNorm of a map."""
        step, _ = self.as_map(x)
        if not step.is_map:
            raise Refused("normalises a vector in groups")
        kept = {k: v for k, v in (("weight", weight), ("bias", bias)) if v is not None}
        return Value(self, self.emit("group_norm", [step], step.shape, kept, groups=groups, eps=float(eps)))

    def _channels_second(self, x: Value) -> Step:
        if x.ndim == 4:
            return self.as_map(x)[0]
        if x.ndim in (2, 3) and math.prod(x.shape) == self.batch * x.shape[1]:
            return self._chosen_vector(x)
        raise Refused(f"normalises a tensor of shape {x.shape}")

    def unary(self, x: Value, op: str, *, keeps_zero: bool = True, **attributes: Any) -> Value:
        """Return a function of each element."""
        if x.has_zeros() and not keeps_zero:
            x = Value(self, self.settled(x)) if x.ndim == 4 else x
            if x.has_zeros():
                raise Refused("computes on a padded vector")
        return Value(self, self.emit(op, [x.step], x.step.shape, **attributes), x.places)

    def prelu(self, x: Value, slope: Tensor) -> Value:
        """Return each element, those below zero times a learnt slope."""
        if slope.numel() == 1:
            return Value(self, self.emit("prelu", [x.step], x.step.shape, {"weight": slope.reshape(1)}), x.places)
        shape = (1, slope.numel(), *[1] * (x.ndim - 2))
        weight = self._per_channel(x, slope if slope.ndim >= x.ndim - 1 else slope.reshape(shape))
        return Value(self, self.emit("prelu", [x.step], x.step.shape, {"weight": weight}), x.places)

    def affine(self, x: Value, scale: Tensor | None, shift: Tensor | None) -> Value:
        """Return each element times a constant plus a constant; they may differ between channels, not between pixels."""
        if x.has_zeros():
            x = Value(self, self.settled(x))
        shape = broadcast(x.shape, *(t.shape for t in (scale, shift) if t is not None))
        if tuple(shape) != x.shape:
            if math.prod(shape) != math.prod(x.shape):
                raise Refused("spreads a tensor by a constant of another shape")
            x = x.move(lambda p: p.reshape(shape))
        c = x.step.shape[0]
        tensors = {
            "scale": torch.ones(c) if scale is None else self._per_channel(x, scale),
            "shift": torch.zeros(c) if shift is None else self._per_channel(x, shift),
        }
        return Value(self, self.emit("affine", [x.step], x.step.shape, tensors), x.places)

    def _per_channel(self, x: Value, constant: Tensor) -> Tensor:
        """Return a constant as one number for each channel of the step behind a tensor."""
        c = x.step.shape[0]
        constant = constant.detach().float()
        if constant.numel() == 1:
            return constant.reshape(1).expand(c).clone()
        spread = constant.expand(x.shape)
        if x.places is None:
            rows = spread.reshape(self.batch, c, -1)
        else:
            flat = torch.full((self.batch * math.prod(x.step.shape),), math.nan)
            flat[x.places.flatten()] = spread.flatten()
            rows = flat.reshape(self.batch, c, -1)
        first = rows[0, :, 0]
        if not torch.equal(rows, first[None, :, None].expand_as(rows)):
            raise Refused("adds or multiplies a constant that differs between pixels")
        return first.clone()

    def binary(self, a: Value, b: Value, op: str) -> Value:
        """Return the sum (``add``) or product (``mul``) of two tensors."""
        if a.step.shape == b.step.shape and _same(a.places, b.places):
            return Value(self, self.emit(op, [a.step, b.step], a.step.shape), a.places)
        gated = self._gate(a, b, op) or self._gate(b, a, op)
        if gated is not None:
            return gated
        if a.shape != b.shape and math.prod(a.shape) == math.prod(b.shape):
            shape = broadcast(a.shape, b.shape)
            a, b = a.move(lambda p: p.reshape(shape)), b.move(lambda p: p.reshape(shape))
        if a.shape != b.shape:
            raise Refused(f"{'adds' if op == 'add' else 'multiplies'} tensors of shapes {a.shape} and {b.shape}")
        if a.ndim == 4 and (a.step.is_map or b.step.is_map):
            for there, back in (((0, 1, 2, 3), (0, 1, 2, 3)), (_TO_FIRST, _TO_LAST)):
                turned = [v.move(lambda p, there=there: p.permute(there), unnamed=True) for v in (a, b)]  # type: ignore[misc]
                try:
                    steps = [self.as_map(v)[0] for v in turned]
                except Refused:
                    if there == _TO_FIRST:
                        raise
                    continue
                if steps[0].shape != steps[1].shape:
                    raise Refused(f"adds maps of shapes {steps[0].shape} and {steps[1].shape}")
                made = Value(self, self.emit(op, steps, steps[0].shape))
                return made.move(lambda p, back=back: p.permute(back))  # type: ignore[misc]
        steps = [self._chosen_vector(v) for v in (a, b)]
        shape = a.shape
        return Value(self, self.emit(op, steps, steps[0].shape)).move(lambda p: p.reshape(shape))

    def _gate(self, x: Value, gate: Value, op: str) -> Value | None:
        """Return a map with each channel scaled (or shifted) by an element of a vector, or None where these are none."""
        if not x.step.is_map or x.has_zeros() or gate.has_zeros() or gate.ndim != x.ndim:
            return None
        C, H, W = x.step.shape
        if (gate.step.is_map and gate.step.shape[1:] != (1, 1)) or (H, W) == (1, 1):
            return None
        try:
            spread = gate.all_places().expand(x.shape)
        except RuntimeError:
            return None
        f = gate.step.shape[0]
        flat = torch.full((self.batch * C * H * W,), -1)
        flat[x.all_places().flatten()] = spread.flatten()
        rows = flat.reshape(self.batch, C, H * W)
        channels = rows[0, :, 0]
        images = f * torch.arange(self.batch)[:, None, None]
        if not torch.equal(rows, (channels[:, None] + images).expand_as(rows)) or not bool((channels < f).all()):
            return None
        step = gate.step if not gate.step.is_map else self.emit("flatten", [gate.step], (f,))
        if not torch.equal(channels, torch.arange(f)):
            step = self.emit("select", [step], (C,), channels=tuple(int(i) for i in channels), stride=(1, 1))
        return Value(self, self.emit(op, [x.step, step], x.step.shape), x.places)

    def concat(self, parts: Sequence[Value | Tensor], axis: int) -> Value:
        """Return tensors one after another along a dimension; constants among them are zeros."""
        values = [p for p in parts if isinstance(p, Value)]
        axis %= values[0].ndim
        for part in parts:
            if isinstance(part, Tensor) and bool((part != 0).any()):
                raise Refused("appends a constant that is not zero")
        if all(v.step is values[0].step for v in values):
            places = [p.all_places() if isinstance(p, Value) else torch.full(p.shape, -1) for p in parts]
            joined = torch.cat(places, axis)
            return values[0].move(lambda _: joined)
        if len(values) != len(parts):
            raise Refused("appends zeros to several tensors at once")
        if values[0].ndim == 4:
            there, back = ((0, 1, 2, 3),) * 2 if axis == 1 else (_TO_FIRST, _TO_LAST)
            if axis not in (1, 3):
                raise Refused("puts maps side by side")
            turned = [v.move(lambda p: p.permute(there), unnamed=True) for v in values]
            steps = [self.as_map(v)[0] for v in turned]
            if all(s.is_map for s in steps):
                shape = (sum(s.shape[0] for s in steps), *steps[0].shape[1:])
                if any(s.shape[1:] != steps[0].shape[1:] for s in steps):
                    raise Refused("puts maps of different sizes behind each other")
                return Value(self, self.emit("concat", steps, shape)).move(lambda p: p.permute(back))
        elif axis != 1 or any(math.prod(v.shape) != self.batch * v.shape[1] for v in values):
            raise Refused("puts tensors behind each other along another dimension than the channels")
        steps = [self._chosen_vector(v) for v in values]
        sizes = list(values[0].shape)
        sizes[axis] = sum(v.shape[axis] for v in values)
        return Value(self, self.emit("concat", steps, (sum(s.shape[0] for s in steps),))).move(lambda p: p.reshape(sizes))

    def max_pool(
        self, x: Value, kernel: Sequence[int], stride: Sequence[int], pads: Pads, dilation: Sequence[int], *, ceil: bool
    ) -> Value:
        """Return the maxima of windows."""
        if tuple(kernel) == (1, 1) and tuple(pads) == NONE:
            return x.move(lambda p: p[:, :, :: stride[0], :: stride[1]])
        step, before = self.as_map(x, padded=True)
        if before != NONE and not (_not_negative(step) and _reach(step.shape, kernel, stride, before, pads, dilation)):
            step, before = self.as_map(x)
        c, h, w = step.shape
        total = _plus(pads, before)
        sizes = [
            _out(size, k, s, p, d, ceil=ceil, first=f)
            for size, k, s, p, d, f in zip((h, w), kernel, stride, _sums(total), dilation, total[:2], strict=True)
        ]
        made = self.emit(
            "max_pool", [step], (c, *sizes), kernel=tuple(kernel), stride=tuple(stride), pads=total,
            dilation=tuple(dilation), ceil=ceil,
        )  # fmt: skip
        return Value(self, made)

    def avg_pool(
        self, x: Value, kernel: Sequence[int], stride: Sequence[int], pads: Pads, *, ceil: bool, count_include_pad: bool
    ) -> Value:
        """Return the means of windows."""
        if tuple(kernel) == (1, 1) and tuple(pads) == NONE:
            return x.move(lambda p: p[:, :, :: stride[0], :: stride[1]])
        step, before = self.as_map(x, padded=True)
        if before != NONE and (tuple(pads) != NONE or ceil):
            step, before = self.as_map(x)
        if before != NONE:
            count_include_pad = True
        c, h, w = step.shape
        if (h, w) == tuple(kernel) and _plus(pads, before) == NONE and tuple(stride) != (1, 1) and not ceil:
            return self._pooled(step, "global_avg", (self.batch, c, 1, 1))
        total = _plus(pads, before)
        sizes = [
            _out(size, k, s, p, 1, ceil=ceil, first=f)
            for size, k, s, p, f in zip((h, w), kernel, stride, _sums(total), total[:2], strict=True)
        ]
        made = self.emit(
            "avg_pool", [step], (c, *sizes), kernel=tuple(kernel), stride=tuple(stride), pads=total, ceil=ceil,
            count_include_pad=count_include_pad,
        )  # fmt: skip
        return Value(self, made)

    def adaptive_pool(self, x: Value, size: Sequence[int | None], op: str) -> Value:
        """Return means (``global_avg``) or maxima (``global_max``) over as many windows as asked for."""
        step, _ = self.as_map(x)
        if not step.is_map:
            return x
        c, h, w = step.shape
        wanted = tuple(n if k is None else k for n, k in zip((h, w), size, strict=True))
        if wanted == (1, 1):
            return self._pooled(step, op, (self.batch, c, 1, 1))
        if wanted == (h, w):
            return x
        windows = [_even_windows(n, k) for n, k in zip((h, w), wanted, strict=True)]
        kernel, stride = (tuple(v[i] for v in windows) for i in (0, 1))
        if op == "global_avg":
            return self.avg_pool(Value(self, step), kernel, stride, NONE, ceil=False, count_include_pad=True)
        return self.max_pool(Value(self, step), kernel, stride, NONE, (1, 1), ceil=False)

    def _pooled(self, step: Step, op: str, shape: Sequence[int]) -> Value:
        if step.shape[1:] == (1, 1):
            made = self.emit("flatten", [step], step.shape[:1])
        else:
            made = self.emit(op, [step], step.shape[:1])
        return Value(self, made).move(lambda p: p.reshape(tuple(shape)))

    def reduce(self, x: Value | Stack, axes: Sequence[int], op: str, *, keep: bool) -> Value:
        """Return the mean (``global_avg``), maximum (``global_max``) or ``sum`` over pixels, or over what was stacked."""
        axes = sorted(a % x.ndim for a in axes)
        if isinstance(x, Stack):
            if op != "sum" or axes != [x.dim]:
                raise Refused("reduces a stack of tensors")
            total = x.parts[0]
            for part in x.parts[1:]:
                total = self.binary(total, part, "add")
            if keep:
                shape = [1 if i == x.dim else n for i, n in enumerate(x.shape)]
                return total.move(lambda p: p.reshape(shape))
            return total
        if math.prod(x.shape[a] for a in axes) == 1:
            return x.move(lambda p: _squeezed(p, axes, keep=keep))
        if not x.step.is_map or x.has_zeros():
            raise Refused(f"reduces dimensions {axes} of a tensor of shape {x.shape}")
        C, H, W = x.step.shape
        rest = [i for i in range(x.ndim) if i not in axes]
        places = x.all_places().permute([*rest, *axes]).reshape(*(x.shape[i] for i in rest), -1)
        pixels = places % (H * W)
        whole = places.shape[-1] == H * W and bool(
            (pixels.sort(-1).values == torch.arange(H * W)).all() and (places // (H * W) == places[..., :1] // (H * W)).all()
        )
        kept = [1 if i in axes else x.shape[i] for i in range(x.ndim)] if keep else [x.shape[i] for i in rest]
        if whole:
            channels = (places[..., 0] // (H * W)).reshape(kept)
            if op == "sum":
                made = self._pooled(x.step, "global_avg", (self.batch, C))
                made = self.affine(made, torch.tensor(float(H * W)), None)
                step = made.step
            else:
                step = self._pooled(x.step, op, (self.batch, C)).step
            return Value(self, step).move(lambda _: channels)
        if x.ndim == 4 and len(axes) == 1 and axes[0] in (2, 3) and x.places is None and op != "sum":
            kernel = (H, 1) if axes[0] == 2 else (1, W)
            if op == "global_avg":
                made = self.avg_pool(x, kernel, kernel, NONE, ceil=False, count_include_pad=True)
            else:
                made = self.max_pool(x, kernel, kernel, NONE, (1, 1), ceil=False)
            return made.move(lambda p: _squeezed(p, axes, keep=keep))
        raise Refused(f"reduces dimensions {axes} of a tensor of shape {x.shape}")

    def log_softmax(self, x: Value, axis: int) -> Value:
        """Return the logarithm of the softmax over the features of a vector: at the end, that of the scores of classes."""
        made = self.softmax(x, axis)
        if made.step.op != "softmax":
            raise Refused("is a log-softmax of branches")
        made.step.op = "log_softmax"
        return made

    def softmax(self, x: Value, axis: int) -> Value:
        """Return the softmax over the features of a vector; over two branches, the two shares."""
        axis %= x.ndim
        if math.prod(x.shape) == self.batch * x.shape[axis] and not x.has_zeros():
            shape = x.shape
            step = self._chosen_vector(x)
            return Value(self, self.emit("softmax", [step], step.shape)).move(lambda p: p.reshape(shape))
        if x.shape[axis] == 2 and not x.step.is_map and x.places is not None and not x.has_zeros():
            (f,) = x.step.shape
            pairs = x.places.movedim(axis, 0).reshape(2, self.batch, -1)[:, 0]
            if pairs.numel() == f and bool((pairs < f).all()):
                matrix = torch.zeros(f, f)
                matrix[pairs[0], pairs[0]] = matrix[pairs[1], pairs[1]] = 1.0
                matrix[pairs[0], pairs[1]] = matrix[pairs[1], pairs[0]] = -1.0
                made = self.linear(Value(self, x.step), matrix, None, own=True)
                return self.unary(Value(self, made.step, x.places), "sigmoid", keeps_zero=False)
        if x.ndim == 4 and axis == 1 and x.places is None:
            return Value(self, self.emit("softmax", [x.step], x.step.shape))
        raise Refused(f"is a softmax over dimension {axis} of a tensor of shape {x.shape}")

    def resize(self, x: Value, size: tuple[int, int], **attributes: Any) -> Value:
        """Return a map enlarged; a vector that is spread over a map stays outside, with whoever reads it."""
        step, _ = self.as_map(x)
        if not step.is_map:
            raise Refused("enlarges a vector, one pixel of each channel, to a map")
        if step.shape[1:] == tuple(size):
            return Value(self, step)
        return Value(self, self.emit("resize", [step], (step.shape[0], *size), size=tuple(size), **attributes))

    def pad(self, x: Value, amounts: Sequence[tuple[int, int]], mode: str = "zeros") -> Value:
        """Return a tensor with elements added (or taken away) at the ends of its dimensions.

        Args:
            x: The tensor.
            amounts: Before and after, for each dimension.
            mode: ``zeros``, ``reflect`` or ``edge``.
        """
        if mode == "zeros":

            def with_zeros(places: Tensor) -> Tensor:
                flat = [n for pair in reversed(list(amounts)) for n in pair]
                return torch.nn.functional.pad(places, flat, value=-1)

            return x.move(with_zeros)
        if x.ndim != 4 or any(pair != (0, 0) for pair in amounts[:2]) or any(n < 0 for pair in amounts for n in pair):
            raise Refused(f"pads by {mode} along other dimensions than height and width")
        step, _ = self.as_map(x)
        c, h, w = step.shape
        (top, bottom), (left, right) = amounts[2:]
        if (top, bottom, left, right) == NONE:
            return x
        shape = (c, h + top + bottom, w + left + right)
        return Value(self, self.emit("pad", [step], shape, pads=(top, left, bottom, right), mode=mode))


def broadcast(*shapes: Sequence[int]) -> tuple[int, ...]:
    """Return the shape that tensors of these shapes have together.

    Raises:
        Refused: They have none.
    """
    try:
        return tuple(np.broadcast_shapes(*(tuple(s) for s in shapes)))
    except ValueError:
        raise Refused(f"combines tensors of shapes {' and '.join(str(tuple(s)) for s in shapes)}") from None


def _even_windows(size: int, count: int) -> tuple[int, int]:
    """Return size and distance of the windows of an adaptive pool.

    Raises:
        Refused: They are not all alike.
    """
    starts = [i * size // count for i in range(count)]
    sizes = {-(-(i + 1) * size // count) - start for i, start in enumerate(starts)}
    steps = {b - a for a, b in itertools.pairwise(starts)} or {1}
    if len(sizes) > 1 or len(steps) > 1:
        raise Refused(f"pools {size} pixels into {count} windows of unequal sizes")
    return sizes.pop(), steps.pop()


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and torch.equal(a, b)


def _along(axis: Tensor, valid: Tensor, i: int) -> Tensor | None:
    """Return the coordinate of each index of dimension `i` where it is valid, -1 where it never is; None if it varies."""
    rows = axis.movedim(i, 0).flatten(1)
    kept = valid.movedim(i, 0).flatten(1)
    low = torch.where(kept, rows, rows.max() + 1).amin(1)
    high = torch.where(kept, rows, -1).amax(1)
    some = kept.any(1)
    if bool((some & (low != high)).any()):
        return None
    return torch.where(some, high, -1)


def _squeezed(places: Tensor, axes: Sequence[int], *, keep: bool) -> Tensor:
    return places if keep else places.reshape([n for i, n in enumerate(places.shape) if i not in axes])


def _plus(a: Sequence[int], b: Sequence[int]) -> Pads:
    top, left, bottom, right = (x + y for x, y in zip(a, b, strict=True))
    return top, left, bottom, right


def _sums(pads: Pads) -> tuple[int, int]:
    return pads[0] + pads[2], pads[1] + pads[3]


def _out(size: int, kernel: int, stride: int, pads: int, dilation: int, *, ceil: bool = False, first: int = 0) -> int:
    span = size + pads - dilation * (kernel - 1) - 1
    if span < 0:
        raise Refused("has a window larger than its map")
    if not ceil:
        return span // stride + 1
    out = -(-span // stride) + 1
    return out - 1 if (out - 1) * stride >= size + first else out  # a window starts inside of the map or its first padding


_NOT_NEGATIVE = {"relu", "sigmoid", "hard_sigmoid", "softmax"}
_KEEPING = {"max_pool", "avg_pool", "select", "pad", "dropout", "flatten", "global_avg", "global_max"}


def _not_negative(step: Step) -> bool:
    while step.op in _KEEPING:
        step = step.inputs[0]
    if step.op in ("add", "mul"):
        return all(map(_not_negative, step.inputs))
    return step.op in _NOT_NEGATIVE or (step.op == "clip" and step.attributes["low"] >= 0)


def _reach(
    shape: Sequence[int], kernel: Sequence[int], stride: Sequence[int], before: Pads, pads: Pads, dilation: Sequence[int]
) -> bool:
    """Whether every window meets a pixel of the map: zeros around values that are not negative change no maximum then."""
    total = _plus(before, pads)
    return all(
        total[i] < (k - 1) * d + 1 and total[i + 2] < (k - 1) * d + 1
        for i, (k, d) in enumerate(zip(kernel, dilation, strict=True))
    )
