"""``rescompress bench``: measured latency on what is here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rescompress.cli import options as opt
from rescompress.cli.options import InputShape, Threads
from rescompress.cli.output import output_of

app = typer.Typer()

ENOUGH = 5
"""Processes from which on their range tells which of two models is faster: of five the range holds the median that further
processes would have in 15 of 16 cases, of two in every second."""


@app.command()
def bench(
    ctx: typer.Context,
    models: Annotated[list[Path], typer.Argument(metavar="MODEL...", help="One or more .onnx files.")],
    target: Annotated[
        list[str], typer.Option("--target", "-t", help="Where to run; give it twice to compare.", autocompletion=opt.targets)
    ] = ["cpu"],  # noqa: B006
    batch: Annotated[
        int | None, typer.Option("--batch", "--batch-size", min=1, help="Images per call.", show_default="the file's, or 1")
    ] = None,
    input_shape: InputShape = None,
    threads: Threads = None,
    seconds: Annotated[
        float, typer.Option("--seconds", min=0.1, max=86400, help="Seconds of samples per model and target.")
    ] = 3.0,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Turns that each model gets, interleaved.")] = 5,
) -> None:
    """Measure the latency of ONNX files: p50, p90, p99 and spread, each in its own process, in interleaved rounds.

    Example: rescompress bench model_fp32.onnx model_int8.onnx --target cpu --target cpu-ort --threads 2
    """
    from compress.checkpoints.options import parse_shape
    from edge_targets.benchmark import Candidate, Effort, measure_processes, options_note
    from edge_targets.catalog import load_target
    from edge_targets.onnx_kernels import input_of

    shape = parse_shape(input_shape) if input_shape else None
    candidates, labels = [], []
    unknown = []
    for path in models:
        read = input_of(path, input_shape=shape)
        precision, reason = _precision(path, shape)
        unknown += [reason] if reason else []
        for name in target:
            chosen = load_target(name)
            _check_measurable(chosen.name, chosen.runtime)
            candidates.append(Candidate(path, chosen.runtime, read.input_shape, batch or read.batch or 1, threads, precision))
            labels.append((str(path), chosen.name))
    with output_of(ctx).console().status(f"measuring {len(candidates)} x {seconds:g} s"):
        measured = measure_processes(candidates, effort=Effort(seconds=seconds, rounds=rounds))
    rows = [
        _row(path, name, found.metrics)
        | {"latency_runs": list(found.process_medians_ms), "runtime_options": found.runtime_options}
        for (path, name), found in zip(labels, measured, strict=True)
    ]
    notes = unknown + _notes(rows)
    notes += dict.fromkeys(note for row in rows for note in options_note(row["runtime"], row["runtime_options"]))
    document = {**rows[0], "notes": notes} if len(rows) == 1 else {"rows": rows, "notes": notes}
    output_of(ctx).result(document, _table(rows), *notes)


def _precision(path: Path, shape: tuple[int, int, int] | None) -> tuple[str | None, str | None]:
    """Return what a file computes in; where that cannot be told, None and a note that says why: it is measured all the same."""
    from edge_targets.onnx_kernels import kernels_of
    from rescompress.core.errors import ModelFileError

    try:
        return kernels_of(path, input_shape=shape).precision, None
    except ModelFileError as e:
        return None, f"{path}: measured as it is; its precision is not known: {e.what}"


def _check_measurable(name: str, runtime: str) -> None:
    """Refuse a target that cannot run here.

    Raises:
        ToolMissing: Its runtime, or the device, is not here.
    """
    from edge_targets.backends import load_backend
    from rescompress.core.errors import ToolMissing

    found = load_backend(runtime).available()
    if not found:
        raise ToolMissing(
            f"{name} cannot be measured here: {found.reason}",
            where=f"--target {name}",
            remedy=f"{found.remedy}; on the board itself: `rescompress deploy`; without it: `rescompress predict`",
        )


def _row(path: str, name: str, metrics: dict[str, Any]) -> dict[str, Any]:
    p50 = metrics["p50_ms"]
    return {
        "model": path,
        "target": name,
        "p50_ms": p50.value,
        "p50_low_ms": p50.low,
        "p50_high_ms": p50.high,
        "p90_ms": metrics["p90_ms"].value,
        "p99_ms": metrics["p99_ms"].value,
        "mean_ms": metrics["mean_ms"].value,
        "spread": metrics["spread"].value,
        "images_per_s": metrics["images_per_s"].value,
        "n": p50.n,
        "device": p50.device,
        "runtime": p50.runtime,
        "precision": p50.precision,
        "threads": p50.threads,
        "batch": p50.batch,
        "provenance": p50.provenance,
    }


def _notes(rows: list[dict[str, Any]]) -> list[str]:
    """Return what a reader should see at once: runtimes in which INT8 is slower than float, and the better one.

    Of fewer than `ENOUGH` processes it only tells that they are too few for that.
    """
    notes: list[str] = []
    processes = min(len(r["latency_runs"]) for r in rows)
    if processes < ENOUGH:
        count = f"{processes} process{'es' if processes > 1 else ''}"
        return [f"{count} of each cannot tell which is faster: give --rounds {ENOUGH} or more"] if len(rows) > 1 else notes
    for name in dict.fromkeys(r["target"] for r in rows):
        floats = [r for r in rows if r["target"] == name and r["precision"] in ("fp32", "fp16")]
        ints = [r for r in rows if r["target"] == name and r["precision"] == "int8"]
        if not floats or not ints:
            continue
        best_float, best_int = (min(group, key=lambda r: r["p50_ms"]) for group in (floats, ints))
        if best_int["p50_low_ms"] > best_float["p50_high_ms"]:
            notes.append(
                f"INT8 is slower than {best_float['precision']} on {name}: {best_int['p50_ms']:.3f} ms against "
                f"{best_float['p50_ms']:.3f} ms"
            )
    if len({r["target"] for r in rows}) > 1:
        best = min(rows, key=lambda r: r["p50_ms"] / r["batch"])
        notes.append(f"fastest: {best['model']} on {best['target']} ({best['p50_ms']:.3f} ms)")
    return notes


HEAD = ("model", "target", "precision", "batch", "p50 ms", "", "p90 ms", "p99 ms", "spread", "images/s", "n")


def _table(rows: list[dict[str, Any]]) -> Any:
    """Return a table of the figures, or lines of them where a row does not fit."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from rescompress.show.figures.fitting import Fitting

    first = rows[0]
    title = f"measured on {first['device']}, {first['threads']} threads"
    processes = len(first["latency_runs"])
    # of one process the samples are all there is: the interval of their median, which says nothing of other processes
    interval = f"range of {processes} processes" if processes > 1 else "95 % in 1 process"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    lines = [Text(title, style="italic")]
    for i, column in enumerate(HEAD):
        table.add_column(column or interval, justify="right" if i > 2 else "left")
    for r in rows:
        cells = (
            r["model"],
            r["target"],
            r["precision"] or "unknown",
            str(r["batch"]),
            f"{r['p50_ms']:.3f}",
            f"{r['p50_low_ms']:.3f}-{r['p50_high_ms']:.3f}",
            f"{r['p90_ms']:.3f}",
            f"{r['p99_ms']:.3f}",
            f"{r['spread']:.0%}",
            f"{r['images_per_s']:.0f}",
            str(r["n"]),
        )
        table.add_row(*cells)
        model, target, precision, batch, p50, ends, p90, p99, spread, images, n = cells
        lines += [
            Text(f"{model} on {target}: {precision}, batch {batch}", style="bold"),
            Text(f"  p50 {p50} ms ({interval} {ends}), p90 {p90} ms, p99 {p99} ms"),
            Text(f"  spread {spread}, {images} images/s, n {n}"),
        ]
    return Fitting(table, Group(*lines))
