"""FP8: why it is refused, and how a file that computes in it is known (docs/decisions/0056-no-fp8-yet.md)."""

from __future__ import annotations

from pathlib import Path

from edge_targets.device import Device, Target
from edge_targets.sparsity import capability_of
from rescompress.core.errors import ModelFileError, TargetError

FIRST_CAPABILITY = (8, 9)
"""Compute capability of the first GPUs with FP8: Ada; then Hopper 9.0, Blackwell 10 to 12, Thor 11.0."""

MINIMUM = ".".join(map(str, FIRST_CAPABILITY))

SOURCES = (
    "NVIDIA/TensorRT #4590: on Thor, FP8 layers ran in FP32 without a word",
    "NVIDIA/TensorRT #4599: hardly any gain on Thor",
    "roboflow/rf-detr #955: 5 to 10 % on Thor",
)

WHY = (
    "nothing shows that a ResNet gains by them: INT8 has the same peak there, so no gain over it is predicted "
    f"({'; '.join(SOURCES)})"
)

REMEDY = "use int8, or fp16 where accuracy does not allow it; docs/targets.md has the sources"


def has_units(device: Device) -> bool:
    """Return whether the GPU of a device computes in FP8."""
    known = capability_of(device)
    return known is not None and known >= FIRST_CAPABILITY


def refusal(device: Device | None = None) -> TargetError:
    """Return the error that says why FP8 is refused: for a device, or for a file that is meant for none yet."""
    boards = ", ".join(t.name for t in _with_units())
    if device is None:
        reason = f"no file is written in FP8: of the targets only {boards} have units for it, and {WHY}"
    elif has_units(device):
        reason = f"{device.title} has FP8 units, but {WHY}"
    else:
        reason = f"{device.title}: no FP8 units; they begin with compute capability {MINIMUM} ({boards})"
    return TargetError(reason, where="--precision fp8", remedy=REMEDY)


def _with_units() -> list[Target]:
    from edge_targets.catalog import all_targets  # which reads devices, and they this module

    return [target for target in all_targets() if has_units(target.device)]


def refuse_file(path: Path) -> None:
    """Refuse an ONNX file that computes in FP8: it would be built, counted and named as a float32 one.

    Raises:
        ModelFileError: It does, or is no ONNX file.
    """
    import onnx

    from edge_targets.onnx_kernels import read_onnx

    kinds = {getattr(onnx.TensorProto, name) for name in dir(onnx.TensorProto) if name.startswith("FLOAT8")}
    model = read_onnx(path)
    for node in model.graph.node:
        asked = {a.i for a in node.attribute if a.name in ("to", "output_dtype")}
        if asked & kinds and node.op_type in ("Cast", "QuantizeLinear"):
            break
    else:
        if not any(tensor.data_type in kinds for tensor in model.graph.initializer):
            return
    raise ModelFileError(f"computes in FP8, which is not supported ({'; '.join(SOURCES)})", where=str(path), remedy=REMEDY)
