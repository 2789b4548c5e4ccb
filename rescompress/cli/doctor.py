"""``rescompress doctor``: what is installed, and what each missing piece would enable."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from rescompress.cli.output import output_of

if TYPE_CHECKING:
    from rich.table import Table

app = typer.Typer()

PACKAGES = {
    # distribution: (what it is for, how to get it)
    "torch": ("everything that touches weights", "pip install torch"),
    "torchvision": ("peers and parity tests", "pip install torchvision"),
    "accelerate": ("training, on one or many processes", "pip install accelerate"),
    "nncf": ("calibration of INT8 ranges", "pip install nncf"),
    "onnx": ("export", "pip install onnx"),
    "onnxruntime": ("parity, target cpu-ort", "pip install onnxruntime"),
    "openvino": ("target cpu", "pip install openvino"),
    "tensorrt": ("engines on a machine with an NVIDIA GPU", "pip install rescompress[tensorrt]; on a Jetson: JetPack's own"),
    "tensorrt-rtx": ("targets rtx-*, and a parser and builder check of Jetson exports", "pip install rescompress[rtx]"),
    "h5py": ("Keras checkpoints", "pip install rescompress[keras]"),
    "mlflow": ("--track mlflow:URI", "pip install rescompress[mlflow]"),
}
PROGRAMS = {
    "trtexec": ("building and timing TensorRT engines here", "part of TensorRT; on a Jetson in /usr/src/tensorrt/bin"),
    "ssh": ("deploy", "your system's OpenSSH client"),
    "scp": ("deploy", "your system's OpenSSH client"),
}
REQUIRED = frozenset({"torch", "torchvision", "accelerate", "nncf", "onnx", "onnxruntime", "openvino"})


@app.command()
def doctor(ctx: typer.Context) -> None:
    """Show what is installed, and what each missing piece would enable.

    Example: rescompress doctor --json
    """
    import shutil
    from importlib.metadata import PackageNotFoundError, version
    from pathlib import Path

    from edge_targets.backends import PACKAGE as BACKENDS
    from edge_targets.backends import load_backend
    from rescompress.core import plugins
    from rescompress.core.errors import RescompressError, ToolMissing
    from rescompress.fingerprint import environment
    from rescompress.siblings import check_siblings

    rows: list[dict[str, Any]] = []
    packages = dict(PACKAGES)
    for runtime in plugins.names(BACKENDS):
        backend = load_backend(runtime)
        packages.setdefault(backend.PACKAGE, (f"targets that run {runtime}", backend.REMEDY))
    for name, (purpose, remedy) in packages.items():
        try:
            found: str | None = version(name)
        except PackageNotFoundError:
            found = None
        rows.append({"name": name, "found": found, "required": name in REQUIRED, "purpose": purpose, "remedy": remedy})
    for name, (purpose, remedy) in PROGRAMS.items():
        path = shutil.which(name)
        if name == "trtexec" and path is None and Path("/usr/src/tensorrt/bin/trtexec").is_file():
            path = "/usr/src/tensorrt/bin/trtexec"
        rows.append({"name": name, "found": path, "required": False, "purpose": purpose, "remedy": remedy})
    gpu = Path("/proc/driver/nvidia/version").is_file()
    rows.append(
        {
            "name": "NVIDIA GPU",
            "found": "driver loaded" if gpu else None,
            "required": False,
            "purpose": "running engines",
            "remedy": "use a machine with one, or `rescompress deploy`",
        }
    )
    problem: str | None = None
    try:
        check_siblings()
    except RescompressError as e:
        problem = e.what
    output = output_of(ctx)
    output.result(
        {"environment": environment(), "pieces": rows, "problem": problem}, _table(rows), *([problem] if problem else [])
    )
    missing = [r["name"] for r in rows if r["required"] and r["found"] is None]
    if problem or missing:
        raise ToolMissing(problem or f"missing: {', '.join(missing)}", remedy="pip install --force-reinstall rescompress")


def _table(rows: list[dict[str, Any]]) -> Table:
    from rich.table import Table

    table = Table(title="What is here", title_justify="left")
    for heading in ("Piece", "Found", "For", "Where it is missing"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        found = row["found"]
        mark = (
            f"[green]{found}[/green]" if found else ("[red]missing[/red]" if row["required"] else "[yellow]not here[/yellow]")
        )
        table.add_row(row["name"], mark, row["purpose"], "" if found else row["remedy"].replace("[", r"\["))
    return table
