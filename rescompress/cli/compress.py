"""``prune``, ``finetune`` and ``quantize``: one stage each, in the workspace."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rescompress.cli import options as opt
from rescompress.cli import workspace
from rescompress.cli.from_settings import Options, with_options
from rescompress.cli.output import output_of
from rescompress.core.described import Flag
from rescompress.core.details import FinetuneDetails, PruneDetails, QuantizeDetails
from rescompress.core.settings import PruneSettings, QuantizeSettings, TrainSettings
from rescompress.show.figures.columns import QUALITY, quality_of

app = typer.Typer()

OF_TRAINING = tuple(name for name in TrainSettings.model_fields if name not in ("seed", "device"))
"""Those two the command has for all that it does."""
EPOCHS = Flag("--finetune-epochs", usual="no fine-tuning")
MENTOR = Flag(file=True, usual="the network itself", name="--teacher")


@app.command()
@with_options
def prune(
    ctx: typer.Context,
    checkpoint: opt.Checkpoint,
    settings: Annotated[PruneSettings, Options()],
    tuning: Annotated[TrainSettings, Options(only=("epochs", "batch_size"), flags={"epochs": EPOCHS})],
    stated: Annotated[opt.Stated, Options()],
    common: Annotated[opt.Common, Options()],
    target: opt.Target = None,
    data: opt.Data = None,
    plan_out: Annotated[Path | None, typer.Option("--plan-out", help="Copy the plan here.", show_default=False)] = None,
    output: opt.OutFile = None,
) -> None:
    """Remove channels and let the rest make up for them.

    Example: rescompress prune --ratio 0.3 resnet50.pt
    Example: rescompress prune resnet32.th --macs 0.5 --data photos/ --target jetson -o half.safetensors
    """
    from rescompress.core.errors import BadInput
    from rescompress.runs.claims import check_outputs
    from rescompress.runs.plan import Builder

    out = output_of(ctx)
    own = [workspace.WORKSPACE / name for name in ("prune.safetensors", "finetune.safetensors", "plan.json")]
    check_outputs({"--output": output, "--plan-out": plan_out}, [checkpoint], own=own)
    check_outputs({"--output": output}, [Path(settings.plan) if settings.plan else None], own=own)
    given = settings.model_fields_set
    by_weights = data is None and not given & {"method", "plan"}
    if by_weights:
        settings = settings.model_copy(update={"method": opt.WITHOUT_DATA})
    if settings.latency is not None and target is None:
        raise BadInput("a latency budget needs a device", where="--latency", remedy="give --target, such as jetson")
    if settings.latency is not None and target is not None:
        from edge_targets.catalog import load_target
        from edge_targets.latency import cost_function

        device = load_target(target).device
        cost_function(device, precision=device.best_float)  # where nothing is predicted, that is said before any work
    if settings.sparsity is not None and data is None:
        raise BadInput("the zeros are chosen on images", where="--sparsity", remedy="give --data")
    if settings.recalibrate and data is None:
        raise BadInput("BatchNorm cannot be measured without images", where="--recalibrate", remedy="give --data")
    tune = "epochs" in tuning.model_fields_set
    if tune and data is None:
        raise BadInput("fine-tuning needs images", where="--finetune-epochs", remedy="give --data")
    if settings.iterations > 1 and not tune:
        raise BadInput(
            f"{settings.iterations} iterations need fine-tuning between them",
            where="--iterations",
            remedy="give --finetune-epochs",
        )
    if by_weights:
        out.hint("no --data: channels are chosen by their weights alone; with images their loss would be made up for")
    opening = stated.opening(checkpoint)
    shared = common.settings(data)
    builder = Builder(opening, shared)
    stages = [builder.dense(), *builder.prune_and_tune(settings, tuning if tune else None, [target] if target else [])]
    last = stages[-1].name
    report, prints = workspace.run_here(stages, out)
    if not prints:
        return
    before, result = workspace.final(report.manifest, "dense"), workspace.final(report.manifest, "prune")
    path = workspace.deliver(workspace.file_of(workspace.final(report.manifest, last), "checkpoint"), output)
    if plan_out is not None:
        workspace.deliver(workspace.file_of(result, "plan"), plan_out)
    details = result.details_as(PruneDetails)
    assert details is not None
    document = {
        "output": str(path),
        "macs_before": int(before.metrics["macs"].value),
        "macs_after": int(result.metrics["macs"].value),
        "params_before": int(before.metrics["params"].value),
        "params_after": int(result.metrics["params"].value),
        "method": details.method,
        "widths": details.widths_after,
        "widths_before": details.widths_before,
        "dropped_blocks": details.dropped_blocks,
        "seconds": details.seconds,
        "achieved_ratio": details.achieved_ratio,
        "notes": details.notes,
        "plan": str(workspace.file_of(result, "plan")),
    }
    document |= _tops(before, workspace.final(report.manifest, last))
    out.result(document, workspace.trade_off(report.manifest, last), _removed(details), str(path))


@app.command()
@with_options
def finetune(
    ctx: typer.Context,
    checkpoint: opt.Checkpoint,
    data: opt.NeededData,
    settings: Annotated[TrainSettings, Options(instead={"teacher": None}, only=OF_TRAINING)],
    stated: Annotated[opt.Stated, Options()],
    common: Annotated[opt.Common, Options()],
    output: opt.OutFile = None,
) -> None:
    """Train a pruned network back; interrupted, it goes on where it was.

    `--teacher dense` is the network that the file was pruned from, as ./rescompress-out holds it.

    Example: rescompress finetune half.safetensors --data photos/ --epochs 5 --teacher dense
    Example: torchrun --nproc-per-node 2 -m rescompress finetune half.safetensors --data photos/
    """
    from rescompress.runs.claims import check_outputs
    from rescompress.runs.plan import Builder

    out = output_of(ctx)
    teacher = workspace.teacher_file(settings.teacher, checkpoint)
    check_outputs({"--output": output}, [checkpoint, teacher], own=[workspace.WORKSPACE / "finetune.safetensors"])
    opening = stated.opening(checkpoint)
    shared = common.settings(data)
    stage = Builder(opening, shared).finetune(settings, opening, opening.of(teacher) if teacher else None)
    report, prints = workspace.run_here([stage], out)
    if not prints:
        return
    result = workspace.final(report.manifest, "finetune")
    path = workspace.deliver(workspace.file_of(result, "checkpoint"), output)
    quality = quality_of(result.metrics)
    assert quality is not None
    document: dict[str, Any] = {"output": str(path), quality: result.metrics[quality].value, "n": result.metrics[quality].n}
    details = result.details_as(FinetuneDetails)
    document |= {"epochs": details.epochs if details is not None else []}
    out.result(document, workspace.trade_off(report.manifest, "finetune"), str(path))


@app.command()
@with_options
def quantize(
    ctx: typer.Context,
    checkpoint: opt.Checkpoint,
    data: opt.NeededData,
    settings: Annotated[QuantizeSettings, Options(instead={"mode": "ptq", "teacher": None}, flags={"teacher": MENTOR})],
    stated: Annotated[opt.Stated, Options()],
    common: Annotated[opt.Common, Options()],
    target: opt.Target = None,
    output: opt.OutFile = None,
) -> None:
    """Quantize to INT8, so that what was calibrated or trained is what runs.

    Example: rescompress quantize half.safetensors --data photos/ --mode qat --epochs 1 --teacher resnet32.th
    """
    from rescompress.runs.claims import check_outputs
    from rescompress.runs.plan import Builder, profile_for

    out = output_of(ctx)
    teacher = workspace.teacher_file(settings.teacher, checkpoint)
    check_outputs({"--output": output}, [checkpoint, teacher], own=[workspace.WORKSPACE / "quantize.safetensors"])
    opening = stated.opening(checkpoint)
    shared = common.settings(data)
    builder = Builder(opening, shared)
    placed = profile_for(settings, [target] if target else [])
    mentor = opening.of(teacher) if teacher else opening
    stage = builder.quantize(settings, placed, opening, mentor, targets=[target] if target else [])
    report, prints = workspace.run_here([stage], out)
    if not prints:
        return
    result = workspace.final(report.manifest, "quantize")
    path = workspace.deliver(workspace.file_of(result, "checkpoint"), output)
    document: dict[str, Any] = {"output": str(path), "mode": settings.mode, "profile": placed}
    details = result.details_as(QuantizeDetails)
    top1, infidelity = (result.metrics.get(name) for name in QUALITY)
    document |= {
        "top1_before": details.float_top1 if details is not None else None,
        "top1_after": top1.value if top1 is not None else None,
    }
    if infidelity is not None:
        document |= {
            "infidelity_before": details.float_infidelity if details is not None else None,
            "infidelity_after": infidelity.value,
        }
    out.result(document, workspace.trade_off(report.manifest, "quantize"), str(path))


def _removed(details: PruneDetails) -> str:
    """Return in words what pruning took away, and what a latency budget came to."""
    words = f"removed {100 * details.achieved_ratio:.1f} % of the prunable channels"
    if gone := details.dropped_blocks:
        words += f", {len(gone)} whole blocks among them ({', '.join(gone)})"
    before, after = details.cost_before, details.cost_after
    if "latency" in details.budget and before is not None and after is not None:
        words += f"; predicted {after:.3g} ms, {after / before:.3f} of {before:.3g} ms in the same precision"
    return words


def _tops(before: Any, after: Any) -> dict[str, float]:
    """Return how good a network is before and after."""
    found = {
        f"{name}_{when}": stage.metrics.get(name) for name in QUALITY for when, stage in (("before", before), ("after", after))
    }
    return {k: v.value for k, v in found.items() if v is not None}
