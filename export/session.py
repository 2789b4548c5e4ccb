"""The one place that opens onnxruntime: parity, repairs and the runtime of `cpu-ort` compute the same through it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import onnx

Level = Literal["all", "extended", "off"]


def open_session(
    model: onnx.ModelProto | Path,
    *,
    threads: int = 1,
    level: Level = "all",
    batch: int | None = None,
    optimized: Path | None = None,
) -> Any:
    """Return an onnxruntime session on the CPU, one that leaves the cores alone while it waits.

    Args:
        model: The model, or a file, whose external data is then found beside it.
        threads: CPU threads.
        level: Which rewritings of the graph are allowed: ``all``; ``extended``, those that hold on any CPU; or ``off``.
        batch: Fixes an open first dimension of the inputs to this many images.
        optimized: Where the rewritten graph goes.

    Raises:
        Exception: Whatever onnxruntime raises: it has one class per error code and no common base.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Idle threads that spin take the cores from whatever else runs, another runtime under measurement included.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 4
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = {
        "all": levels.ORT_ENABLE_ALL,
        "extended": levels.ORT_ENABLE_EXTENDED,
        "off": levels.ORT_DISABLE_ALL,
    }[level]
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    graph = onnx.load(str(model), load_external_data=False) if isinstance(model, Path) else model
    if batch is not None:
        for name in _free_dimensions(graph):
            options.add_free_dimension_override_by_name(name, batch)
    # This optimizer counts a float16 bias's steps in float16: beyond 2,048 it loses some, beyond 65,504 all.
    disabled = ["WeightBiasQuantization"] if has_float16_scales(graph) else None
    return ort.InferenceSession(
        str(model) if isinstance(model, Path) else model.SerializeToString(),
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=disabled,
    )


def _free_dimensions(model: onnx.ModelProto) -> list[str]:
    """Return the names of the free first dimensions of the model's inputs."""
    first = [i.type.tensor_type.shape.dim[0] for i in model.graph.input if i.type.tensor_type.shape.dim]
    return sorted({d.dim_param for d in first if d.dim_param})


def has_float16_scales(model: onnx.ModelProto) -> bool:
    """Whether a quantizer of the model has a float16 scale, wherever that is stored."""
    half = onnx.TensorProto.FLOAT16
    scales = {n.input[1] for n in model.graph.node if n.op_type == "DequantizeLinear" and len(n.input) > 1}
    if not scales:
        return False
    types = {i.name: i.data_type for i in model.graph.initializer}
    types |= {v.name: v.type.tensor_type.elem_type for v in model.graph.value_info}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.output:
            types[node.output[0]] = next((a.t.data_type for a in node.attribute if a.name == "value"), onnx.TensorProto.FLOAT)
        elif node.op_type == "Cast" and node.output:
            types[node.output[0]] = next((a.i for a in node.attribute if a.name == "to"), onnx.TensorProto.FLOAT)
        elif node.op_type == "Identity" and node.output and node.input:
            types.setdefault(node.output[0], types.get(node.input[0], onnx.TensorProto.FLOAT))
    return any(types.get(name) == half for name in scales)
