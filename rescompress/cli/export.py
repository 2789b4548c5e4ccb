"""``export`` and ``evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rescompress.cli import options as opt
from rescompress.cli import workspace
from rescompress.cli.from_settings import Options, with_options
from rescompress.cli.output import output_of
from rescompress.core.choices import beginning
from rescompress.core.details import TargetDetails
from rescompress.core.settings import ExportSettings
from rescompress.show.figures.columns import columns_of, percent, quality_of

if TYPE_CHECKING:
    from rescompress.core.manifest import StageResult

app = typer.Typer()

OVERFLOW = "float16-overflow"
"""The lint rule whose findings end `export` with 3: the file is none that can be deployed."""
_FILES = (".onnx", ".engine", ".plan", ".xml", ".bin", ".zip", ".tar")
"""Suffixes by which -o would be taken for one file; an export is a folder, or a .tar.gz of it."""


def _runtimes() -> tuple[str, ...]:
    """Return what runs models."""
    from edge_targets.backends import PACKAGE
    from rescompress.core.plugins import names

    return ("auto", "torch", *names(PACKAGE))


@app.command()
@with_options
def export(
    ctx: typer.Context,
    settings: Annotated[ExportSettings, Options()],
    stated: Annotated[opt.Stated, Options()],
    common: Annotated[opt.Common, Options()],
    checkpoint: Annotated[
        Path | None, typer.Argument(metavar="[CKPT]", help="Checkpoint file.", show_default="newest of ./rescompress-out")
    ] = None,
    target: opt.Targets = None,
    data: opt.Data = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the result, or FILE.tar.gz.", show_default=False)
    ] = None,
    archive: Annotated[bool, typer.Option("--archive", help="Pack the folder as .tar.gz too.", show_default=False)] = False,
    require_engine: Annotated[
        bool, typer.Option("--require-engine", help="Fail (exit 4) where no engine can be built.", show_default=False)
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace files in the -o folder that no export wrote.", show_default=False)
    ] = False,
) -> None:
    """Write ONNX for a target, check it, and build and measure, or predict, what it becomes there.

    Example: rescompress export --target jetson
    Example: rescompress export int8.safetensors --target cpu --data photos/ -o deploy/
    Example: rescompress export --target jetson -o bundle.tar.gz
    """
    from edge_targets.bundle import OPTIONAL
    from rescompress.core.errors import BadInput
    from rescompress.runs import claims
    from rescompress.runs.plan import Builder

    out = output_of(ctx)
    path = checkpoint or newest_checkpoint(workspace.WORKSPACE)
    if checkpoint is None:
        out.hint(f"exporting {path}")
    if target is None:
        out.hint("no --target: exporting for cpu (OpenVINO)")
    elif len(target) > 1:
        raise BadInput(
            f"{' and '.join(target)}: one target at a time", where="--target", remedy="export for each, or `run` with targets"
        )
    if output is not None and output.suffix.lower() in _FILES and not output.is_dir():
        raise BadInput(
            f"{output.name} is the name of a file, and an export is several: the network, its checksums, what the target needs",
            where="--output",
            remedy=f"name a folder (-o {output.with_suffix('')}) or an archive (-o {output.with_suffix('.tar.gz')})",
        )
    opening = stated.opening(path)
    shared = common.settings(data)
    stage = Builder(opening, shared).target(target[0] if target else "cpu", opening, settings, require_engine=require_engine)
    packed = output if output is not None and output.name.endswith((".tar.gz", ".tgz")) else None
    claims.check_outputs({"--output": packed}, [path])
    report, _ = workspace.run_here([stage], out)
    result = workspace.final(report.manifest, stage.name)
    folder = workspace.file_of(result, "onnx").parent
    sources = [workspace.WORKSPACE / artifact.path for artifact in result.outputs]
    files = sorted({str(source.relative_to(folder)) for source in sources if source.is_relative_to(folder)})
    if output is not None and packed is None:
        left = set(OPTIONAL).difference(files) if "SHA256SUMS" in files else set()  # that of another network may be there
        claims.check_delivery(folder, output, [*files, *sorted(left)], force=force)
        for name in files:
            workspace.deliver(folder / name, output / name)
        for name in left:
            (output / name).unlink(missing_ok=True)
        folder = output
    if packed is not None or archive:
        packed = _pack(result, packed or folder.parent / f"{folder.resolve().name}.tar.gz")
    details = result.details_as(TargetDetails)
    assert details is not None
    latency = result.metrics.get("p50_ms")
    document: dict[str, Any] = {
        "target": details.target,
        "onnx": str(folder / "model.onnx"),
        "engine": str(folder / Path(details.engine).name) if details.engine else None,
        "engine_status": details.engine_status,
        "precision": details.precision,
        "opset": details.opset,
        "size_bytes": int(result.metrics["size_bytes"].value),
        "macs": int(result.metrics["macs"].value),
        "parity": details.parity,
        "parity_in_integers": details.parity_in_integers,
        "float16": details.float16,
        "lint": details.lint,
        "validity_gate": details.validity_gate,
        "latency": _latency(latency),
        "host": {**details.host, "onnx": str(folder / "host.onnx")} if details.host is not None else None,
        "archive": str(packed) if packed else None,
        "files": files,
        "notes": details.notes,
    }
    if "top1" in result.metrics:
        document["top1"] = result.metrics["top1"].value
    if "agreement" in result.metrics:
        document["agreement"] = result.metrics["agreement"].value
    out.result(
        document,
        workspace.trade_off(report.manifest, stage.name),
        *_words(document),
    )
    if any(f["rule"] == OVERFLOW and f["severity"] == "error" for f in document["lint"]):
        out.hint("the file was written, but float16 cannot hold what it computes")
        raise typer.Exit(3)


def _pack(result: StageResult, archive: Path) -> Path:
    """Write the files of an export as one archive, and nothing else that may lie in their folder; return it."""
    import shutil
    import tempfile

    from edge_targets.bundle import pack

    folder = workspace.file_of(result, "onnx").parent
    with tempfile.TemporaryDirectory(prefix="rescompress-archive-") as temporary:
        staged = Path(temporary) / folder.name
        for artifact in result.outputs:
            source = workspace.WORKSPACE / artifact.path
            if source.is_relative_to(folder):
                copy = staged / source.relative_to(folder)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, copy)
        pack(staged, archive)
    return archive


def newest_checkpoint(folder: Path) -> Path:
    """Return the checkpoint that was written last in a workspace.

    Raises:
        BadInput: There is no workspace, or no checkpoint in it.
    """
    from rescompress.core.errors import BadInput
    from rescompress.core.manifest import MANIFEST_NAME, load_manifest

    remedy = "name a checkpoint, or run `rescompress prune CKPT` here first"
    if not (folder / MANIFEST_NAME).is_file():
        raise BadInput("no checkpoint given, and no workspace here", where=str(folder), remedy=remedy)
    done = [s for s in load_manifest(folder).stages if s.status == "done" and s.kind != "dense"]
    stages = [s for s in done if s.output("checkpoint") is not None]
    if not stages:
        raise BadInput("the workspace holds no checkpoint", where=str(folder), remedy=remedy)
    return workspace.file_of(max(enumerate(stages), key=lambda item: (item[1].finished, item[0]))[1], "checkpoint", folder)


def _latency(metric: Any) -> dict[str, Any] | None:
    if metric is None:
        return None
    keys = ("device", "runtime", "precision", "threads", "batch", "low", "high", "model", "power_mode", "n")
    return {"p50_ms": metric.value, "provenance": metric.provenance} | {k: getattr(metric, k) for k in keys}


def _words(document: dict[str, Any]) -> list[str]:
    parity = document["parity"]
    lines = [
        f"{document['onnx']}: {document['size_bytes'] / 1e6:.2f} MB, {document['precision']}, opset {document['opset']}",
        f"parity with torch on {parity['images']}: top-1 agreement {100 * parity['top1_agreement']:.2f} %, "
        f"largest difference {parity['max_abs']:.2g}",
        f"engine: {document['engine_status']}",
    ]
    if (exact := document["parity_in_integers"]) is not None:
        lines.insert(
            2, f"in exact sums of integers: {100 * exact['top1_agreement']:.2f} %, largest difference {exact['max_abs']:.2g}"
        )
    if (half := document["float16"]) is not None:
        lines.append(
            f"float16: largest value {half['largest']:,.0f} of 65,504 on {half['images']}, "
            f"same class in {100 * half['top1_agreement']:.2f} %"
        )
    if document["host"] is not None:
        lines += _host_words(document["host"])
    if document["archive"]:
        lines.append(f"archive: {document['archive']}")
    lines += [f"lint: {f['severity']}: {f['rule']}: {f['message']}" for f in document["lint"]]
    return lines


def _host_words(host: dict[str, Any]) -> list[str]:
    """Return what became of a trunk's host, a line for each of its outputs."""
    lines = [f"{host['onnx']}: {host['of']} with this trunk inside, all else as it was"]
    for name, found in host.get("outputs", {}).items():
        facts = [f"{100 * found['relative_error']:.2f} % relative error"] if found["relative_error"] is not None else []
        facts += [f"cosine {found['cosine']:.4f}"] if found["cosine"] is not None else []
        facts += [f"{100 * found['agreement']:.1f} % agreement"] if found["agreement"] is not None else []
        before, after = ("x".join(map(str, shape)) for shape in found["shapes"])
        lines.append(f"  output {name}: {', '.join(facts) or f'{after}, was {before}: not compared'}")
    return [*lines, f"  on {host['images']}, in onnxruntime, against the host as it came"] if "outputs" in host else lines


@app.command()
@with_options
def evaluate(
    ctx: typer.Context,
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Checkpoint or .onnx file.", show_default=False)],
    data: opt.NeededData,
    stated: Annotated[opt.Stated, Options()],
    common: Annotated[opt.Common, Options()],
    split: Annotated[str, typer.Option("--split", help="val or train.", autocompletion=opt.splits)] = "val",
    reference: Annotated[
        Path | None,
        typer.Option(
            "--reference", metavar="CKPT", help="What outputs are compared with, without class scores.", show_default="its host"
        ),
    ] = None,
    runtime: Annotated[
        str,
        typer.Option(
            "--runtime", help="torch, or a runtime; auto: torch, or onnxruntime for .onnx.", autocompletion=beginning(_runtimes)
        ),
    ] = "auto",
) -> None:
    """Measure top-1 and top-5 accuracy of a checkpoint or an ONNX file; without class scores how near it is to the dense one.

    Example: rescompress evaluate rescompress-out/cpu/model.onnx --data photos/

    An ONNX file holds its preprocessing; --preprocess takes the place of it.
    """
    from compress.fidelity import Fidelity
    from rescompress.cli.progress import reporting
    from rescompress.core.errors import BadInput, nearest
    from rescompress.runs.evaluation import evaluate_file

    if runtime not in (known := _runtimes()):
        raise BadInput(f"nothing here runs models by the name '{runtime}'", where="--runtime", remedy=nearest(runtime, known))
    out = output_of(ctx)
    opening = stated.opening(model)
    settings = common.settings(data)
    with reporting(out) as reporter:
        found = evaluate_file(opening, settings, split=split, runtime=runtime, reporter=reporter, reference=reference)
    quality = quality_of(found.metrics)
    assert quality is not None
    figure = found.metrics[quality]
    document: dict[str, Any] = {k: m.value for k, m in found.metrics.items()} | {
        "n": figure.n,
        "runtime": figure.runtime,
        "std_error": figure.std_error,
        "split": split,
        "notes": list(found.notes),
    }
    titles = {c.metric: c for c in columns_of(found.metrics)}
    words = f"{titles[quality].title} {percent(figure)}  (n = {figure.n}, {figure.runtime})"
    for name, column in titles.items():
        if name != quality:
            words += f"   {column.title} {column.text(found.metrics[name].model_copy(update={'std_error': None}))}"
    lines = []
    if isinstance(found, Fidelity):
        document["outputs"] = found.outputs
        lines = [
            f"  output {name}: {100 * o['relative_error']:.2f} % relative error, cosine {o['cosine']:.4f}"
            for name, o in found.outputs.items()
        ]
    out.result(document, words, *lines)
