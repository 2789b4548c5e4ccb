"""The stages that make networks: dense, pruned, fine-tuned, quantized."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from compress.checkpoints.base import Checkpoint, on_device
from compress.data import Split
from compress.device import computing_on
from compress.evaluate import TorchRunner
from compress.processes import ALONE, Together, together
from compress.prune import Context as PruneContext
from compress.prune import (
    CostFunction,
    load_plan,
    measure,
    prune,
    prune_by_plan,
)
from compress.prune.method import Curves, ErrorCurve
from compress.prune.sparsity import PATTERN, sparsify
from compress.quantize import Cost, best_of, fake_quant_model, finish_qat, mixed_precision, on_grid, prepare_qat, ptq
from compress.resnet import ResNet, build_model, tensors_of
from compress.teacher import match_teacher
from compress.train import TrainState, train
from edge_targets.catalog import alias_notes
from edge_targets.device import Target
from edge_targets.latency import cost_function
from edge_targets.sparsity import CHANNELS, SOURCE, is_wide
from export.to_onnx import ExportOptions
from rescompress.core.artifact import write_text
from rescompress.core.details import (
    Curve,
    DenseDetails,
    FinetuneDetails,
    PruneDetails,
    QuantizeDetails,
    Sparsity,
    TrainedDetails,
)
from rescompress.core.errors import BadInput, TargetError
from rescompress.core.graph import Network
from rescompress.core.layers import walk
from rescompress.core.quantizers import Profile, float_operations
from rescompress.core.settings import PruneSettings, QuantizeSettings, TrainSettings
from rescompress.core.spec import ModelSpec, Preprocessing
from rescompress.runs.fingerprint import held_to, key_of
from rescompress.runs.settings import Settings
from rescompress.runs.stage import Context, Outcome, Source
from rescompress.runs.stages.shared import (
    dataset,
    evaluate_model,
    finish,
    measure_fidelity,
    network_of,
    onnx_of,
    prepare,
    reference_of,
    scores_classes,
    write_onnx,
)

if TYPE_CHECKING:  # a step loads its work when it runs, so that the work may know the step by its type alone
    from rescompress.runs.steps import Dense, Finetune, Prune, Quantize

SAVE_EVERY_S = 30.0
"""How often the state of a training is saved."""
MUCH_WAITING = 0.2
"""Part of a training's time from which waiting for data is worth a note."""


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A network to distil from, and how it wants its images prepared."""

    network: ResNet
    preprocessing: Preprocessing


def dense(context: Context, step: Dense) -> Outcome:
    """The network as it came: its accuracy, its counts, its float32 ONNX file."""
    common = step.common
    prepare(common)
    checkpoint = step.source.load(context)
    path = context.folder / "dense.onnx"
    write_onnx(onnx_of(checkpoint, ExportOptions()), path)
    details = DenseDetails(provenance=dict(checkpoint.provenance), arch=checkpoint.spec.arch)
    return finish(context, "dense", checkpoint, common, details, files=[("onnx", path)])


def pruned(context: Context, step: Prune) -> Outcome:
    """The network with channels removed and the rest compensated."""
    common, config = step.common, step.settings
    prepare(common)
    checkpoint = step.source.load(context)
    whole = step.whole.load(context).spec if step.whole is not None else checkpoint.spec
    known = step.targets
    align = align_of(config, known)
    calibration, notes = None, []
    if common.data is not None:
        chosen = dataset(common, checkpoint.spec).train.take(config.calib, common.seed)
        calibration = chosen.tensor()
        if len(set(chosen.labels.tolist())) == 1 and len(chosen.classes) > 1:
            notes.append("all calibration images are of one class: what tells the others apart may go")
    start = time.perf_counter()
    found = None
    if config.plan is not None:
        path = Path(config.plan)
        with held_to(path, step.files[config.plan]):
            plan = load_plan(path)
        start = time.perf_counter()
        told: list[str] = []
        with computing_on(common.torch_device()) as device:
            smaller = prune_by_plan(
                on_device(checkpoint, device),
                plan,
                config,
                calibration_x=calibration.to(device) if calibration is not None else None,
                seed=common.seed,
                progress=context.reporter.progress,
                note=told.append,
            )
        notes = [f"follows the plan {config.plan}", *told, *notes]
    else:
        kind, value = config.budget
        if kind == "latency":
            notes += alias_notes(modelled(known))
        curves = None
        if context.store is not None and step.before is None:
            curves = shared_curves(context, checkpoint, common, config, calibration)
        with computing_on(common.torch_device()) as device:
            found = prune(
                on_device(checkpoint, device),
                config,
                calibration_x=calibration.to(device) if calibration is not None else None,
                multiple=align,
                seed=common.seed,
                cost=latency_cost(known) if kind == "latency" else None,
                reference=whole,
                curves=curves,
                progress=context.reporter.progress,
            )
        smaller, plan, notes = found.checkpoint, found.plan, [*found.notes, *notes]
        if step.before is not None:
            assert step.before.stage is not None
            plan = plan.after(load_plan(context.file(step.before.stage, "plan")), whole)
    seconds = found.seconds if found is not None else time.perf_counter() - start
    sparse, zeros = _sparse(context, on_device(smaller, "cpu"), config, calibration, common, notes)
    for note in notes:
        context.reporter.note(note)
    path = context.folder / step.plan_name
    write_text(path, plan.model_dump_json(indent=1) + "\n")
    widths = plan.widths(whole)
    details = PruneDetails(
        method=plan.method,
        scope=plan.scope,
        widths_before={name: before for name, (before, _) in widths.items()},
        widths_after={name: after for name, (_, after) in widths.items()},
        dropped_blocks=list(plan.dropped_blocks),
        achieved_ratio=plan.fraction_gone(whole),
        budget={kind: value} if found is not None else {},
        align=align if found is not None else None,
        curves={n: Curve(order=list(c.order), error=list(c.error)) for n, c in found.curves.groups.items()} if found else {},
        curves_unit=found.curves.unit if found else "error",
        error=found.error if found else None,
        cost_before=found.cost_before if found else None,
        cost_after=found.cost_after if found else None,
        seconds=seconds,
        sparsity=zeros,
        notes=notes,
    )
    return finish(context, step.name, sparse, common, details, files=[("plan", path)])


def align_of(config: PruneSettings, targets: Sequence[Target]) -> int:
    """Return the multiple of the widths: as said, else the largest of the targets', 8 without one."""
    return config.align if isinstance(config.align, int) else max([t.align() for t in targets] or [8])


def shared_curves(
    context: Context, checkpoint: Checkpoint, common: Settings, config: PruneSettings, calibration: Tensor | None
) -> Curves:
    """Return the curves of the dense network, measured once by all runs that share a store, for every budget.

    Args:
        context: Has the store.
        checkpoint: The network.
        common: Settings of the run.
        config: The method, the scope and the number of images.
        calibration: The images, or None.
    """
    assert context.store is not None
    tensors = hashlib.sha256(checkpoint.spec.model_dump_json().encode())
    for name, value in sorted(checkpoint.state_dict.items()):
        tensors.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    parts = {
        "what": "curves",
        "version": version("rescompress"),
        "network": tensors.hexdigest(),
        "common": common.identity,
        "method": config.method,
        "scope": config.scope,
        "images": config.calib if calibration is not None else 0,
    }

    def compute() -> dict[str, Any]:
        with computing_on(common.torch_device()) as device:
            made = measure(
                on_device(checkpoint, device),
                method=config.method,
                scope=config.scope,
                calibration_x=calibration.to(device) if calibration is not None else None,
                seed=common.seed,
                progress=context.reporter.progress,
            )
        groups = {name: {"order": c.order, "error": c.error} for name, c in made.groups.items()}
        return {"groups": groups, "blocks": dict(made.blocks), "unit": made.unit}

    known = context.store.value(key_of(parts), compute)
    groups = {name: ErrorCurve(tuple(c["order"]), tuple(c["error"])) for name, c in known["groups"].items()}
    return Curves(groups, known["blocks"], known["unit"])


def _sparse(
    context: Context,
    checkpoint: Checkpoint,
    config: PruneSettings,
    images: Tensor | None,
    common: Settings,
    notes: list[str],
) -> tuple[Checkpoint, Sparsity | None]:
    """Return the checkpoint with 2:4 zeros where the config wants them, and which layers have them."""
    if config.sparsity is None:
        return checkpoint, None
    with computing_on(common.torch_device()) as device:
        here = on_device(checkpoint, device)
        there = images.to(device) if images is not None else None
        found = sparsify(PruneContext(here, (), (), there, common.seed, context.reporter.progress, notes.append), here)
    sparse = [layer for layer in walk(found.checkpoint.spec) if layer.name in found.layers]
    wide = [x.name for x in sparse if is_wide(x.in_shape[0], x.out_shape[0], x.in_shape[0] // x.weight_shape[1])]
    if wide:
        notes.append(
            f"{PATTERN} zeros: TensorRT can profit in {len(wide)} of these layers at most ({SOURCE}): {', '.join(wide)}"
        )
    else:
        notes.append(
            f"{PATTERN} zeros: no gain is to be expected of TensorRT: none of these layers has more "
            f"than {CHANNELS} input and output channels ({SOURCE})"
        )
    notes.append(
        f"{len(found.layers)} layers have {PATTERN} zeros, stored as plain weights: runtimes without sparse kernels gain "
        f"nothing; {len(found.left_dense)} layers cannot have them"
    )
    zeros = Sparsity(pattern=PATTERN, layers=list(found.layers), dense=list(found.left_dense), wide=wide)
    return on_device(found.checkpoint, "cpu"), zeros


def latency_cost(targets: Sequence[Target]) -> CostFunction:
    """Return the predicted latency on the first target that has a latency model, as a cost of layers.

    Raises:
        TargetError: No target has one.
    """
    target = modelled(targets)
    return cost_function(target.device, precision=target.check_precision())


def modelled(targets: Sequence[Target]) -> Target:
    """Return the first target that has a latency model, or the first.

    Raises:
        TargetError: There is none.
    """
    known = [t for t in targets if t.device.modes] or list(targets)
    if not known:
        raise TargetError("a latency budget needs a device", where="--target", remedy="name a target, such as jetson")
    return known[0]


def finetuned(context: Context, step: Finetune) -> Outcome:
    """The network trained on the data, distilled from the teacher."""
    common, config, name = step.common, step.settings, step.name
    prepare(common)
    checkpoint = step.source.load(context)
    if checkpoint.quantization is not None:
        raise BadInput("is quantized", where=str(step.source.path), remedy="use `quantize --mode qat` on the float checkpoint")
    settings = config.model_copy(
        update={
            "seed": common.seed if config.seed is None else config.seed,
            "device": config.device or common.device,
            "features": config.features if step.teacher else 0.0,
        }
    )
    idle = sorted({"distill", "temperature", "features"} & config.model_fields_set)
    if idle and not step.teacher and context.main:
        context.reporter.note(f"{', '.join(idle)}: of no effect without a teacher")
    model = build_model(checkpoint.spec, checkpoint.state_dict)
    split = dataset(common, checkpoint.spec).train
    mentor = teacher_network(context, step.teacher, checkpoint, split)
    trained, resume = train_network(context, name, model, split, settings, mentor)
    sharing = together()
    done = dataclasses.replace(checkpoint, state_dict=sharing.lead(tensors_of(model)))
    details = FinetuneDetails(**trained.given())
    outcome = finish(context, name, done, common, details, transient=[resume], sharing=sharing)
    if (text := lost_in_training(context, step.source, outcome)) is None:
        return outcome
    context.reporter.note(text)
    return dataclasses.replace(outcome, details=details.noting(text))


def lost_in_training(context: Context, source: Source, outcome: Outcome) -> str | None:
    """Return what to say of a training that ended clearly below where it began, None of any other.

    Clearly is by more than two standard errors of the difference of two accuracies, on as many samples; where the accuracy of
    the network it began with is not known here, nothing is said.
    """
    began = context.done.stage(source.stage) if source.stage else None
    if source.sha256 is not None:
        began = next((s for s in context.done.stages if s.checkpoint_sha256 == source.sha256), None)
    before, after = (began.metrics.get("top1") if began else None), outcome.metrics.get("top1")
    if before is None or after is None or before.n != after.n:
        return None
    if before.value - after.value <= 2 * math.hypot(before.std_error or 0.0, after.std_error or 0.0):
        return None
    return (
        f"training did harm: top-1 fell from {100 * before.value:.2f} to {100 * after.value:.2f} %; a lower learning "
        "rate may help (lr: auto tries a few), above all where there is no BatchNorm"
    )


def quantized(context: Context, step: Quantize) -> Outcome:
    """The network with every quantizer of the profile, calibrated and, for ``qat``, trained."""
    common, config, profile = step.common, step.settings, step.profile
    prepare(common)
    checkpoint = step.source.load(context)
    data = dataset(common, checkpoint.spec)
    calibration = data.train.take(config.calib, common.seed)
    context.reporter.progress("calibrate", 0, 1)
    kept = resume = None
    log = TrainedDetails()
    sharing = together() if config.mode == "qat" else ALONE
    whole = scores_classes(checkpoint.spec)

    def good(model: ResNet, split: Split) -> float:
        """Return top-1, or the infidelity of a network without class scores."""
        if whole:
            return evaluate_model(context, model, split, common, checkpoint.spec, sharing).top1
        runner = TorchRunner(model, common.torch_device())
        return measure_fidelity(context, runner, checkpoint, split, common, sharing).metrics["infidelity"].value

    before, calibrated_only = good(network_of(checkpoint), data.val), None
    images = [x for x, _ in calibration.batches(64)]
    cost = float_cost(step.targets, checkpoint.spec) if config.max_slowdown is not None else None
    with computing_on(common.torch_device()) as device:
        int8 = calibrated(
            on_device(checkpoint, device), [x.to(device) for x in images], config, profile, cost=cost, sharing=sharing
        )
    int8 = sharing.lead(on_device(int8, "cpu"))
    assert int8.quantization is not None
    keep_float = sorted(int8.quantization.keep_float(int8.spec))
    chosen = int8.provenance["calibration"]
    if dead := int8.provenance.get("zero_on_all_images"):
        context.reporter.note(f"zero on all calibration images, so what reads it stays in floating point: {dead}")
    if stays := float_operations(int8.spec):
        named = ", ".join(f"{count} {name}" for name, count in stays.items())
        context.reporter.note(f"no INT8 runtime computes these in integers, they stay in floating point: {named}")
    if config.mode == "qat":
        calibrated_only = good(fake_quant_model(int8), data.val)
        settings = TrainSettings(
            epochs=config.epochs,
            lr=config.lr,
            batch_size=config.batch_size,
            augment=config.augment,
            mixup=0.0,
            cutmix=0.0,
            label_smoothing=0.0,
            ema=0.0,
            workers=config.workers,
            freeze_bn_after=config.freeze_bn_after,
            distill=1.0 if step.teacher else 0.0,
            seed=common.seed,
            device=common.device,
        )
        seen, held = data.train.part(config.hold_out, common.seed) if config.hold_out else (data.train, None)
        model = prepare_qat(int8, learnable_scales=config.learnable_scales)
        network = teacher_network(context, step.teacher, checkpoint, seen)
        log, resume = train_network(context, "quantize", model, seen, settings, network)
        trained = sharing.lead(finish_qat(model, int8))
        if held is None:
            int8 = trained
        elif whole:
            int8 = best_of([trained, int8], held.again(250))
        else:
            int8 = min((trained, int8), key=lambda candidate: good(fake_quant_model(candidate), held))
        kept = "qat" if int8 is trained else "ptq"
        if int8 is not trained:
            text = "training did no good on the held-out images: the network that was only calibrated is kept"
            log = log.noting(text)
            context.reporter.note(text)
    costs = (
        QuantizeDetails(float_top1=before, ptq_top1=calibrated_only)
        if whole
        else QuantizeDetails(float_infidelity=before, ptq_infidelity=calibrated_only)
    )
    details = QuantizeDetails(
        profile=profile,
        mode=config.mode,
        calibration=config.calibration,
        chosen=chosen,
        keep_float=keep_float,
        float_operations=stays,
        kept=kept,
        **costs.given(),
        **log.given(),
    )
    transient = [resume] if resume else []
    return finish(context, "quantize", on_grid(int8), common, details, transient=transient, sharing=sharing)


def float_cost(targets: Sequence[Target], spec: ModelSpec | Network) -> Cost:
    """Return what an INT8 network costs with the named layers in floating point: predicted ms on the first modelled target.

    Raises:
        TargetError: No target has one.
    """
    device = modelled(targets).device
    int8 = cost_function(device, precision="int8")
    wide = cost_function(device, precision=device.best_float)
    layers = {layer.name: layer for layer in walk(spec)}
    all_int8 = int8(list(layers.values()))

    def cost(keep_float: frozenset[str]) -> float:
        return all_int8 + sum(wide([layers[name]]) - int8([layers[name]]) for name in keep_float)

    return cost


def calibrated(
    checkpoint: Checkpoint,
    images: list[Tensor],
    config: QuantizeSettings,
    profile: Profile,
    *,
    cost: Cost | None = None,
    sharing: Together = ALONE,
) -> Checkpoint:
    """Return the calibrated network, with the layers that the config wants in floating point left there.

    Args:
        checkpoint: The float network.
        images: Calibration batches.
        config: How to quantize.
        profile: The placement.
        cost: What layers in floating point cost, for a latency budget.
        sharing: The processes that share the statistics.
    """
    names = config.keep_float if isinstance(config.keep_float, tuple) else ()

    def calibrate(keep_float: frozenset[str]) -> Checkpoint:
        return ptq(
            checkpoint,
            images,
            config,
            profile=profile,
            keep_float=keep_float,
            sharing=sharing,
        )

    int8 = calibrate(frozenset(names))
    if isinstance(config.keep_float, tuple):
        return int8
    count = config.keep_float if isinstance(config.keep_float, int) else None
    limit = cost(frozenset()) * config.max_slowdown if cost is not None and config.max_slowdown is not None else None
    kept = mixed_precision(
        int8,
        images[:4],
        layers=count,
        max_divergence=config.max_divergence,
        cost=cost,
        max_cost=limit,
        reference=checkpoint,
    ).keep_float
    return calibrate(frozenset(kept)) if kept else int8


def teacher_network(context: Context, teacher: Source | None, student: Checkpoint, split: Split) -> Teacher | None:
    """Return the network to distil from, once it means what the student's outputs and inputs mean; None without a teacher.

    One without class scores has nothing but a teacher to learn from: it gets the dense network unless another is named.

    Raises:
        BadInput: There is none, or its inputs, outputs or classes are others.
    """
    spec = student.spec
    if teacher is None and not scores_classes(spec):
        dense = reference_of(context, student)
        if dense is student:
            raise BadInput(
                "a network without class scores learns from a teacher", where="teacher", remedy="name the dense network"
            )
        return Teacher(network_of(dense), spec.preprocessing)
    if teacher is None:
        return None
    checkpoint, notes = match_teacher(teacher.load(context), spec, split.classes)
    for note in notes if context.main else ():
        context.reporter.note(note)
    return Teacher(network_of(checkpoint), checkpoint.spec.preprocessing)


def train_network(
    context: Context, name: str, model: ResNet, split: Split, settings: TrainSettings, teacher: Teacher | None
) -> tuple[TrainedDetails, Path]:
    """Train `model` in place; return what happened, as details of a stage, and the file that its state was kept in."""

    def tell(state: TrainState) -> None:
        right = f"  train top-1 {100 * state.accuracy:.1f} %" if scores_classes(model.network) else ""
        text = f"loss {state.loss:.3f}{right}  waiting for data {100 * state.waiting:.0f} %"
        context.reporter.progress(name, state.step, state.steps, text)

    notes: list[str] = []

    def note(text: str) -> None:
        notes.append(text)
        if context.main:
            context.reporter.note(text)

    resume = context.resume_file(name)
    log = train(
        model,
        split,
        settings,
        teacher=teacher.network if teacher else None,
        teacher_preprocessing=teacher.preprocessing if teacher else None,
        progress=tell,
        resume_file=resume,
        save_every_s=SAVE_EVERY_S,
        note=note,
    )
    if log.waiting > MUCH_WAITING and log.seconds > SAVE_EVERY_S:
        note(f"training waited for data {100 * log.waiting:.0f} % of the time: raise workers ({log.workers})")
    details = TrainedDetails(
        epochs=[{**epoch} for epoch in log.epochs],
        lr=log.lr,
        waiting=round(log.waiting, 4),
        workers=log.workers,
        best_epoch=log.best_epoch,
        notes=notes,
    )
    return details, resume
