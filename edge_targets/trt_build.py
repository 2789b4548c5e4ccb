"""Builds an engine through the Python API that ``tensorrt`` and ``tensorrt_rtx`` share; the module is a parameter.

So the code that runs on a board is the code that runs, without a GPU, through tensorrt_rtx.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from edge_targets.trt_layers import EngineLayer, compute_types, read_layers, weights_memory
from rescompress.core.errors import EnvironmentFailed, ModelFileError


@dataclass(frozen=True)
class Engine:
    """A built engine and what its log says.

    Attributes:
        content: The serialized engine.
        layers: Its kernels.
        weights_bytes: Memory of its weights.
        log: Every message of the build.
    """

    content: bytes
    layers: tuple[EngineLayer, ...]
    weights_bytes: int | None
    log: tuple[str, ...]

    def compute_types(self, nodes: Sequence[str]) -> Mapping[str, str | None]:
        """Return, per ONNX node, the type its kernel computes in (see `edge_targets.trt_layers.compute_types`)."""
        return compute_types(self.layers, nodes)


def _logger(trt: ModuleType) -> tuple[Any, list[str]]:
    """Return a TensorRT logger and the list it writes every message to."""
    messages: list[str] = []

    class Collector(trt.ILogger):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: object, message: str) -> None:
            messages.append(message)

    return Collector(), messages


def build_engine(
    trt: ModuleType, onnx_bytes: bytes, *, compute_capability: str | None = None, flags: Sequence[str] = (), batch: int = 1
) -> Engine:
    """Return the engine of an ONNX model.

    Args:
        trt: The module ``tensorrt`` or ``tensorrt_rtx``.
        onnx_bytes: The model.
        compute_capability: GPU to build for, such as ``8.6`` (tensorrt_rtx only); None builds for the GPU that is here.
        flags: Names of builder flags to set, such as ``FP16`` and ``INT8``.
        batch: Largest batch of a model whose batch is dynamic.

    Raises:
        ModelFileError: The parser refuses the model.
        EnvironmentFailed: The build failed.
    """
    logger, log = _logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(_network_flags(trt))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(onnx_bytes):
        reasons = [str(parser.get_error(i).desc()) for i in range(parser.num_errors)]
        raise ModelFileError(
            f"{trt.__name__} {trt.__version__} refuses the model: {'; '.join(reasons) or 'no reason given'}",
            remedy="check it with: rescompress lint",
        )
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    for flag in flags:
        config.set_flag(getattr(trt.BuilderFlag, flag))
    if compute_capability is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, "SM" + compute_capability.replace(".", "")), 0)
    profile = builder.create_optimization_profile()
    dynamic = False
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        shape = tuple(tensor.shape)
        if -1 in shape:
            dynamic = True
            least, most = (tuple(size if d == -1 else d for d in shape) for size in (1, batch))
            profile.set_shape(tensor.name, least, most, most)
    if dynamic:
        config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        tail = [line for line in log if "rror" in line][-3:] or log[-3:]
        raise EnvironmentFailed(f"{trt.__name__} {trt.__version__} could not build the engine: {' '.join(tail)}")
    return Engine(bytes(engine), read_layers(log), weights_memory(log), tuple(log))


def _network_flags(trt: ModuleType) -> int:
    """Return the creation flags of a network: explicit batch where that still has to be said."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "EXPLICIT_BATCH", None)
    return 0 if flag is None else 1 << int(flag)
