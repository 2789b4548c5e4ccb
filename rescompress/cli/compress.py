"""``prune``, ``finetune`` and ``quantize``: one stage each, in the workspace."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from rescompress.cli import options as opt
from rescompress.cli import workspace
from rescompress.cli.output import output_of
from rescompress.core.choices import Calibration, Mode, ProfileOrAuto, Scope, TrainPrecision

app = typer.Typer()


@app.command()
def prune(
    ctx: typer.Context,
    checkpoint: opt.Checkpoint,
    ratio: Annotated[
        float | None, typer.Option("--ratio", help="Fraction of every group's channels to remove.", show_default=False)
    ] = None,
    macs: Annotated[float | None, typer.Option("--macs", help="Fraction of the MACs that stays.", show_default=False)] = None,
    params: Annotated[
        float | None, typer.Option("--params", help="Fraction of the parameters that stays.", show_default=False)
    ] = None,
    latency: Annotated[
        float | None,
        typer.Option("--latency", help="Fraction of the predicted latency on --target that stays.", show_default=False),
    ] = None,
    target: opt.Target = None,
    data: opt.Data = None,
    method: opt.Method = None,
    scope: Annotated[Scope, typer.Option("--scope", help="inner: inside blocks; all: the residual stream, too.")] = "inner",
    align: Annotated[str, typer.Option("--align", help="Widths are multiples of this; auto asks the target.")] = "auto",
    calib: Annotated[int, typer.Option("--calib", min=1, help="Calibration images.")] = 512,
    drop_blocks: Annotated[
        bool | None, typer.Option("--drop-blocks/--keep-blocks", help="Whether whole blocks may go.", show_default="by budget")
    ] = None,
    finetune_epochs: Annotated[
        float | None, typer.Option("--finetune-epochs", help="Fine-tune afterwards, distilled.", show_default=False)
    ] = None,
    iterations: Annotated[
        int, typer.Option("--iterations", min=1, help="Prune in steps, with a share of the fine-tuning after each.")
    ] = 1,
    recalibrate: Annotated[
        bool | None,
        typer.Option(
            "--recalibrate/--no-recalibrate", help="Measure BatchNorm again at the end.", show_default="if nothing is repaired"
        ),
    ] = None,
    repair: Annotated[
        bool, typer.Option("--repair/--no-repair", help="Make up for what goes; long fine-tuning may end higher without.")
    ] = True,
    sparsity: Annotated[
        str | None,
        typer.Option("--sparsity", help="2:4: also zeros for sparse tensor cores.", show_default=False),
    ] = None,
    plan_in: Annotated[Path | None, typer.Option("--plan-in", help="Follow this plan.", show_default=False)] = None,
    plan_out: Annotated[Path | None, typer.Option("--plan-out", help="Copy the plan here.", show_default=False)] = None,
    output: opt.OutFile = None,
    labels: opt.Labels = None,
    input_shape: opt.InputShape = None,
    preprocess: opt.Preprocess = None,
    arch_option: opt.ArchOption = None,
    code: opt.Code = None,
    like: opt.Like = None,
    allow_pickle: opt.AllowPickle = False,
    seed: opt.Seed = 0,
    device: opt.Device = "auto",
    threads: opt.Threads = None,
    batch_size: opt.BatchSize = None,
    train_batch: opt.TrainBatch = 128,
) -> None:
    """Remove channels and let the rest make up for them.

    Example: rescompress prune --ratio 0.3 resnet50.pt
    Example: rescompress prune resnet32.th --macs 0.5 --data photos/ --target jetson -o half.safetensors
    """
    from rescompress.claims import check_outputs
    from rescompress.config import FinetuneConfig, PruneConfig
    from rescompress.core.errors import BadInput
    from rescompress.plan import Builder

    out = output_of(ctx)
    own = [workspace.WORKSPACE / name for name in ("prune.safetensors", "finetune.safetensors", "plan.json")]
    check_outputs({"--output": output, "--plan-out": plan_out}, [checkpoint], own=own)
    check_outputs({"--output": output}, [plan_in], own=own)
    by_weights = method is None and plan_in is None and data is None
    if method is None and plan_in is None:
        method = opt.method_or_default(method, data)
    if latency is not None and target is None:
        raise BadInput("a latency budget needs a device", where="--latency", remedy="give --target, such as jetson")
    if sparsity is not None and data is None:
        raise BadInput("the zeros are chosen on images", where="--sparsity", remedy="give --data")
    if recalibrate and data is None:
        raise BadInput("BatchNorm cannot be measured without images", where="--recalibrate", remedy="give --data")
    if finetune_epochs is not None and data is None:
        raise BadInput("fine-tuning needs images", where="--finetune-epochs", remedy="give --data")
    if iterations > 1 and finetune_epochs is None:
        raise BadInput(
            f"{iterations} iterations need fine-tuning between them", where="--iterations", remedy="give --finetune-epochs"
        )
    typed = _typed(
        ctx, ratio=ratio, macs=macs, params=params, latency=latency, scope=scope, calib=calib,
        align=_multiple(align), drop_blocks=drop_blocks,
        iterations=iterations, recalibrate=recalibrate, repair=repair, sparsity=sparsity,
    )  # fmt: skip
    if method is not None:
        typed["method"] = method
    if plan_in is not None:
        typed["plan"] = str(plan_in)
    config = _config(PruneConfig, {"plan": "--plan-in"}, **typed)
    if by_weights:
        out.hint("no --data: channels are chosen by their weights alone; with images their loss would be made up for")
    opening = workspace.opening(
        checkpoint,
        input_shape=input_shape,
        preprocess=preprocess,
        arch_options=workspace.stated(arch_option, code, like),
        allow_pickle=allow_pickle,
    )
    settings = workspace.settings(data, labels=labels, seed=seed, device=device, threads=threads, batch_size=batch_size)
    builder = Builder(opening, settings)
    tuning = None
    if finetune_epochs is not None:
        options = {"epochs": "--finetune-epochs", "batch_size": "--train-batch"}
        tuning = _config(FinetuneConfig, options, epochs=finetune_epochs, batch_size=train_batch)
    stages = [builder.dense(), *builder.prune_and_tune(config, tuning, [target] if target else [])]
    last = stages[-1].name
    report, prints = workspace.run_here(stages, out)
    if not prints:
        return
    before, result = workspace.final(report.manifest, "dense"), workspace.final(report.manifest, "prune")
    path = workspace.deliver(workspace.file_of(workspace.final(report.manifest, last), "checkpoint"), output)
    if plan_out is not None:
        workspace.deliver(workspace.file_of(result, "plan"), plan_out)
    document = {
        "output": str(path),
        "macs_before": int(before.metrics["macs"].value),
        "macs_after": int(result.metrics["macs"].value),
        "params_before": int(before.metrics["params"].value),
        "params_after": int(result.metrics["params"].value),
        "method": result.details["method"],
        "widths": result.details["widths_after"],
        "widths_before": result.details["widths_before"],
        "dropped_blocks": result.details["dropped_blocks"],
        "seconds": result.details["seconds"],
        "achieved_ratio": result.details["achieved_ratio"],
        "notes": result.details["notes"],
        "plan": str(workspace.file_of(result, "plan")),
    }
    document |= _tops(before, workspace.final(report.manifest, last))
    out.result(document, workspace.trade_off(report.manifest, last), _removed(result.details), str(path))


@app.command()
def finetune(
    ctx: typer.Context,
    checkpoint: opt.Checkpoint,
    data: opt.NeededData,
    epochs: Annotated[float, typer.Option("--epochs", "-e", min=0.001, help="Passes over the training images.")] = 2.0,
    teacher: Annotated[
        Path | None, typer.Option("--teacher", help="Checkpoint to distil from, such as the dense one.", show_default=False)
    ] = None,
    lr: Annotated[float, typer.Option("--lr", help="Peak learning rate.")] = 0.02,
    train_batch: opt.TrainBatch = 128,
    precision: Annotated[
        TrainPrecision, typer.Option("--precision", help="bf16 is faster on processors with bfloat16 units (AMX, Ampere).")
    ] = "fp32",
    output: opt.OutFile = None,
    labels: opt.Labels = None,
    input_shape: opt.InputShape = None,
    preprocess: opt.Preprocess = None,
    arch_option: opt.ArchOption = None,
    code: opt.Code = None,
    like: opt.Like = None,
    allow_pickle: opt.AllowPickle = False,
    seed: opt.Seed = 0,
    device: opt.Device = "auto",
    threads: opt.Threads = None,
    batch_size: opt.BatchSize = None,
) -> None:
    """Train a pruned network back; interrupted, it goes on where it was.

    Example: rescompress finetune half.safetensors --data photos/ --epochs 5 --teacher resnet32.th
    Example: torchrun --nproc-per-node 2 -m rescompress finetune half.safetensors --data photos/
    """
    from rescompress.claims import check_outputs
    from rescompress.config import FinetuneConfig
    from rescompress.plan import Builder

    out = output_of(ctx)
    check_outputs({"--output": output}, [checkpoint, teacher], own=[workspace.WORKSPACE / "finetune.safetensors"])
    config = _config(
        FinetuneConfig, {"batch_size": "--train-batch"},
        epochs=epochs, lr=lr, batch_size=train_batch, teacher=str(teacher) if teacher else None,
        precision=precision,
    )  # fmt: skip
    opening = workspace.opening(
        checkpoint,
        input_shape=input_shape,
        preprocess=preprocess,
        arch_options=workspace.stated(arch_option, code, like),
        allow_pickle=allow_pickle,
    )
    settings = workspace.settings(data, labels=labels, seed=seed, device=device, threads=threads, batch_size=batch_size)
    stage = Builder(opening, settings).finetune(config, opening, opening.of(teacher) if teacher else None)
    report, prints = workspace.run_here([stage], out)
    if not prints:
        return
    result = workspace.final(report.manifest, "finetune")
    path = workspace.deliver(workspace.file_of(result, "checkpoint"), output)
    document = {"output": str(path), "top1": result.metrics["top1"].value, "n": result.metrics["top1"].n}
    document |= {"epochs": result.details["epochs"]}
    out.result(document, workspace.trade_off(report.manifest, "finetune"), str(path))


@app.command()
def quantize(
    ctx: typer.Context,
    checkpoint: opt.Checkpoint,
    data: opt.NeededData,
    mode: Annotated[Mode, typer.Option("--mode", help="ptq: calibrate; qat: calibrate, then train.")] = "ptq",
    epochs: Annotated[float, typer.Option("--epochs", "-e", min=0.001, help="Passes over the training images, for qat.")] = 1.0,
    teacher: Annotated[
        Path | None, typer.Option("--teacher", help="Float checkpoint to distil from.", show_default="the network itself")
    ] = None,
    target: opt.Target = None,
    profile: Annotated[
        ProfileOrAuto, typer.Option("--profile", help="Runtime whose placement of quantizers is used; auto: the target's.")
    ] = "auto",
    calib: Annotated[int, typer.Option("--calib", min=1, help="Calibration images.")] = 512,
    calibration: Annotated[Calibration, typer.Option("--calibration", help="Range estimator.")] = "auto",
    keep_float: Annotated[
        str | None,
        typer.Option(
            "--keep-float",
            help="Layers to leave in float: names with commas, how many of the most sensitive, or auto.",
            show_default=False,
        ),
    ] = None,
    max_divergence: Annotated[
        float | None,
        typer.Option("--max-divergence", help="Accuracy budget of --keep-float auto, in nats.", show_default=False),
    ] = None,
    max_slowdown: Annotated[
        float | None,
        typer.Option(
            "--max-slowdown",
            help="Latency budget of --keep-float auto: times the all-INT8 latency predicted for the target.",
            show_default=False,
        ),
    ] = None,
    lr: Annotated[float, typer.Option("--lr", help="Peak learning rate of qat.")] = 0.002,
    output: opt.OutFile = None,
    labels: opt.Labels = None,
    input_shape: opt.InputShape = None,
    preprocess: opt.Preprocess = None,
    arch_option: opt.ArchOption = None,
    code: opt.Code = None,
    like: opt.Like = None,
    allow_pickle: opt.AllowPickle = False,
    seed: opt.Seed = 0,
    device: opt.Device = "auto",
    threads: opt.Threads = None,
    batch_size: opt.BatchSize = None,
    train_batch: opt.TrainBatch = 128,
) -> None:
    """Quantize to INT8, so that what was calibrated or trained is what runs.

    Example: rescompress quantize half.safetensors --data photos/ --mode qat --epochs 1 --teacher resnet32.th
    """
    from rescompress.claims import check_outputs
    from rescompress.config import QuantizeConfig
    from rescompress.plan import Builder, profile_for

    out = output_of(ctx)
    check_outputs({"--output": output}, [checkpoint, teacher], own=[workspace.WORKSPACE / "quantize.safetensors"])
    config = _config(
        QuantizeConfig,
        {"batch_size": "--train-batch"},
        mode=mode, epochs=epochs, profile=profile, calib=calib, calibration=calibration, lr=lr,
        batch_size=train_batch,
        keep_float=_keep_float(keep_float or ""), max_divergence=max_divergence, max_slowdown=max_slowdown,
        teacher=str(teacher) if teacher else None,
    )  # fmt: skip
    opening = workspace.opening(
        checkpoint,
        input_shape=input_shape,
        preprocess=preprocess,
        arch_options=workspace.stated(arch_option, code, like),
        allow_pickle=allow_pickle,
    )
    settings = workspace.settings(data, labels=labels, seed=seed, device=device, threads=threads, batch_size=batch_size)
    builder = Builder(opening, settings)
    placed = profile_for(config, [target] if target else [])
    mentor = opening.of(teacher) if teacher else opening
    stage = builder.quantize(config, placed, opening, mentor, targets=[target] if target else [])
    report, prints = workspace.run_here([stage], out)
    if not prints:
        return
    result = workspace.final(report.manifest, "quantize")
    path = workspace.deliver(workspace.file_of(result, "checkpoint"), output)
    document: dict[str, Any] = {"output": str(path), "mode": mode, "profile": placed}
    document |= {"top1_before": result.details.get("float_top1"), "top1_after": result.metrics["top1"].value}
    out.result(document, workspace.trade_off(report.manifest, "quantize"), str(path))


def _removed(details: Mapping[str, Any]) -> str:
    """Return in words what pruning took away, and what a latency budget came to."""
    words = f"removed {100 * details['achieved_ratio']:.1f} % of the prunable channels"
    if gone := details["dropped_blocks"]:
        words += f", {len(gone)} whole blocks among them ({', '.join(gone)})"
    if "latency" in details.get("budget", {}):
        before, after = details["cost_before"], details["cost_after"]
        words += f"; predicted {after:.3g} ms, {after / before:.3f} of {before:.3g} ms in the same precision"
    return words


def _multiple(text: str) -> int | str:
    """Return the alignment that text stands for."""
    from rescompress.core.errors import BadInput

    if text == "auto" or (text.isdecimal() and int(text) > 0):
        return int(text) if text != "auto" else text
    raise BadInput(f"'{text}' is no multiple", where="--align", remedy="give a whole number from 1, or auto")


def _tops(before: Any, after: Any) -> dict[str, float]:
    tops = {"top1_before": before.metrics.get("top1"), "top1_after": after.metrics.get("top1")}
    return {k: v.value for k, v in tops.items() if v is not None}


def _keep_float(text: str) -> int | str | tuple[str, ...]:
    if text.strip() == "auto":
        return "auto"
    return int(text) if text.strip().isdecimal() else tuple(n.strip() for n in text.split(",") if n.strip())


def _typed(ctx: typer.Context, **values: Any) -> dict[str, Any]:
    """Return those of the values, by the name of their parameter, that the user gave."""
    sources = {name: ctx.get_parameter_source(name) for name in values}
    return {name: value for name, value in values.items() if (source := sources[name]) and source.name != "DEFAULT"}


def _config(kind: Any, options: Mapping[str, str], /, **values: Any) -> Any:
    """Return a validated config of that kind; what is wrong is named as the option that says it.

    Args:
        kind: The class.
        options: Option by field, where they do not have the same name.
        values: Of the fields.
    """
    from pydantic import ValidationError

    from rescompress.config import said
    from rescompress.core.errors import BadInput

    try:
        return kind(**values)
    except ValidationError as e:
        error = e.errors()[0]
        field = str(error["loc"][0]) if error["loc"] else ""
        place = options.get(field, "--" + field.replace("_", "-")) if field else "options"
        raise BadInput(said(error), where=place, remedy="see --help") from e
