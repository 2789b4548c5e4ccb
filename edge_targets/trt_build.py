"""Builds an engine through the Python API that ``tensorrt`` and ``tensorrt_rtx`` share; the module is a parameter.

So the code that runs on a board is the code that runs, without a GPU, through tensorrt_rtx.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from edge_targets.device import Precision
from edge_targets.tensorrt_versions import DLA_REMEDY, Capabilities
from edge_targets.trt_layers import EngineLayer, compute_types, read_layers, weights_memory
from edge_targets.trtexec import InputShapes
from rescompress.core.errors import EnvironmentFailed, ModelFileError, TargetError


@dataclass(frozen=True)
class Engine:
    """A built engine and what its log says.

    Attributes:
        content: The serialized engine.
        layers: Its kernels.
        weights_bytes: Memory of its weights.
        log: Every message of the build.
        timing_cache: Kernel timings for the next build, where one was asked for.
    """

    content: bytes
    layers: tuple[EngineLayer, ...]
    weights_bytes: int | None
    log: tuple[str, ...]
    timing_cache: bytes | None = None

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


@dataclass(frozen=True)
class Recipe:
    """How to build, in names of the Python API; `recipe_for` derives it from a version.

    Attributes:
        network_flags: Of ``NetworkDefinitionCreationFlag``.
        builder_flags: Of ``BuilderFlag``.
        workspace_mb: Scratch memory of the builder; None leaves TensorRT's default.
        dla_core: Deep-learning accelerator, with the GPU for what it cannot run.
    """

    network_flags: tuple[str, ...] = ()
    builder_flags: tuple[str, ...] = ()
    workspace_mb: int | None = None
    dla_core: int | None = None


def recipe_for(
    known: Capabilities,
    precision: Precision,
    *,
    workspace_mb: int | None = 1024,
    dla_core: int | None = None,
    sparsity: bool = False,
) -> Recipe:
    """Return how a version of TensorRT builds a network in `precision`.

    Before 10.12 the network is weakly typed and flags allow lower precisions; from 10.12 on it is strongly typed and takes
    its types from the file; 11 has no precision flags at all.

    Raises:
        TargetError: That version has no DLA.
    """
    network = []
    if known.explicit_batch_flag:
        network.append("EXPLICIT_BATCH")
    if known.strongly_typed:
        network.append("STRONGLY_TYPED")
    builder = []
    if not known.strongly_typed:
        builder = {"fp32": [], "fp16": ["FP16"], "int8": ["INT8", "FP16"]}[precision]
    if sparsity:
        builder = [*builder, "SPARSE_WEIGHTS"]
    if dla_core is not None:
        if not known.dla:
            raise TargetError(known.no_dla, remedy=DLA_REMEDY)
        builder = [*builder, "GPU_FALLBACK"]
    return Recipe(tuple(network), tuple(builder), workspace_mb, dla_core)


def build_engine(
    trt: ModuleType,
    onnx_bytes: bytes,
    *,
    compute_capability: str | None = None,
    recipe: Recipe | None = None,
    batch: int | None = None,
    opt_batch: int | None = None,
    timing_cache: bytes | None = None,
) -> Engine:
    """Return the engine of an ONNX model.

    Args:
        trt: The module ``tensorrt`` or ``tensorrt_rtx``.
        onnx_bytes: The model.
        compute_capability: GPU to build for, such as ``8.6`` (tensorrt_rtx only); None builds for the GPU that is here.
        recipe: Flags and resources; none for tensorrt_rtx, whose networks are strongly typed.
        batch: Largest batch of a model whose batch is dynamic; None takes the profile of ``build.sh``.
        opt_batch: The batch it is tuned for; the largest one when None and `batch` is given.
        timing_cache: Kernel timings of an earlier build.

    Raises:
        ModelFileError: The parser refuses the model.
        EnvironmentFailed: The build failed.
    """
    logger, log = _logger(trt)
    builder = trt.Builder(logger)
    recipe = recipe or Recipe(network_flags=("EXPLICIT_BATCH",))
    network = builder.create_network(_network_flags(trt, recipe.network_flags))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(onnx_bytes):
        reasons = [str(parser.get_error(i).desc()) for i in range(parser.num_errors)]
        raise ModelFileError(
            f"{trt.__name__} {trt.__version__} refuses the model: {'; '.join(reasons) or 'no reason given'}",
            remedy="check it with: rescompress lint",
        )
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    for flag in recipe.builder_flags:
        config.set_flag(getattr(trt.BuilderFlag, flag))
    _resources(trt, config, recipe)
    cache = None
    if timing_cache is not None:
        cache = config.create_timing_cache(timing_cache)
        config.set_timing_cache(cache, False)
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
            if batch is None:
                sizes = (InputShapes.min_batch, opt_batch or InputShapes.opt_batch, InputShapes.max_batch)
            else:
                sizes = (1, opt_batch or batch, batch)
            least, opt, most = (tuple(size if d == -1 else d for d in shape) for size in sizes)
            profile.set_shape(tensor.name, least, opt, most)
    if dynamic:
        config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        tail = [line for line in log if "rror" in line][-3:] or log[-3:]
        raise EnvironmentFailed(f"{trt.__name__} {trt.__version__} could not build the engine: {' '.join(tail)}")
    kept = bytes(cache.serialize()) if cache is not None else None
    return Engine(bytes(engine), read_layers(log), weights_memory(log), tuple(log), kept)


def _resources(trt: ModuleType, config: Any, recipe: Recipe) -> None:
    """Set memory and accelerator of a build."""
    if recipe.workspace_mb is not None:
        size = recipe.workspace_mb << 20
        if hasattr(config, "set_memory_pool_limit"):  # since 8.4
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, size)
        else:
            config.max_workspace_size = size
    if recipe.dla_core is not None:
        config.default_device_type = trt.DeviceType.DLA
        config.DLA_core = recipe.dla_core


def _network_flags(trt: ModuleType, names: Sequence[str]) -> int:
    """Return the creation flags of a network as bits; a flag that a version has dropped is its default."""
    known = [getattr(trt.NetworkDefinitionCreationFlag, name, None) for name in names]
    return sum(1 << int(flag) for flag in known if flag is not None)
