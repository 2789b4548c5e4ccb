"""``rescompress doctor``: what is installed, and what each missing piece would enable."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from rescompress.cli.output import output_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.table import Table

app = typer.Typer()

PURPOSES = {
    # Distribution: what it is for. Which of them are required, and by which extra the others come, is read from our metadata.
    "accelerate": "training, on one or many processes",
    "datasets": "data sets of Hugging Face: hf:NAME",
    "h5py": "Keras checkpoints",
    "huggingface-hub": "networks by name: hf:NAME, timm/NAME",
    "nncf": "calibration of INT8 ranges",
    "markupsafe": "reports",
    "numpy": "figures and images",
    "onnx": "export",
    "onnx-ir": "writing ONNX files",
    "onnxruntime": "parity, target cpu-ort",
    "optuna": "search",
    "psycopg": "search over many machines, through PostgreSQL",
    "openvino": "target cpu",
    "pillow": "reading images",
    "pydantic": "configs, manifests, specs",
    "pyyaml": "configs, device files",
    "rich": "tables and progress",
    "safetensors": "checkpoints",
    "scikit-learn": "the data set builtin:digits",
    "torch": "everything that touches weights",
    "typer": "the command line",
    "tensorrt": "engines on a machine with an NVIDIA GPU",
    "tensorrt-rtx": "targets rtx-*, and a parser and builder check of Jetson exports",
    "mlflow": "--track mlflow:URI",
    "timm": "timm/NAME without a tag: which weights it means",
    "torchvision": "networks by name: torchvision/NAME",
    "scipy": "fitting the latency model again: python -m edge_targets.fit",
}
REMEDIES = {"tensorrt": "; on a Jetson: JetPack's own"}
"""What there is to say beside the extra."""
PROGRAMS = {
    "trtexec": ("building and timing TensorRT engines here", "part of TensorRT; on a Jetson in /usr/src/tensorrt/bin"),
    "ssh": ("deploy", "your system's OpenSSH client"),
    "scp": ("deploy", "your system's OpenSSH client"),
}


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
    from rescompress.cli.siblings import check_siblings
    from rescompress.core import plugins
    from rescompress.core.errors import RescompressError, ToolMissing
    from rescompress.runs.fingerprint import environment

    rows: list[dict[str, Any]] = []
    extras: dict[str, str | None] = dict(dependencies(_stated()))
    purposes, remedies = dict(PURPOSES), {name: f"pip install rescompress[{extra}]" for name, extra in extras.items() if extra}
    for runtime in plugins.names(BACKENDS):
        backend = load_backend(runtime)
        if backend.PACKAGE not in extras:  # a runtime of another distribution than ours
            extras[backend.PACKAGE], remedies[backend.PACKAGE] = "", backend.REMEDY
            purposes[backend.PACKAGE] = f"targets that run {runtime}"
    for name, extra in extras.items():
        try:
            found: str | None = version(name)
        except PackageNotFoundError:
            found = None
        remedy = remedies.get(name, f"pip install {name}") + REMEDIES.get(name, "")
        purpose = purposes.get(name, "")
        rows.append({"name": name, "found": found, "required": extra is None, "purpose": purpose, "remedy": remedy})
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


def dependencies(stated: Iterable[str]) -> dict[str, str | None]:
    """Return by distribution the extra it comes with, or None where it is required; without the tools of development.

    Args:
        stated: Requirements as package metadata has them: ``scipy>=1.11; extra == "fit"``.
    """
    import re

    found: dict[str, str | None] = {}
    for requirement in stated:
        name = re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower()
        extra = re.search(r"extra == ['\"](.+?)['\"]", requirement)
        if extra is None:
            found[name] = None
        elif extra[1] not in ("dev", "docs"):
            found.setdefault(name, extra[1])
    return dict(sorted(found.items(), key=lambda item: item[1] is not None))  # what is required comes first


def _stated() -> list[str]:
    """Return our requirements: from the metadata of what is installed, or from the checkout that is run without it."""
    import tomllib
    from importlib.metadata import PackageNotFoundError, requires
    from pathlib import Path

    try:
        return requires("rescompress") or []
    except PackageNotFoundError:
        project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        extras = project["optional-dependencies"].items()
        return [*project["dependencies"], *(f'{r}; extra == "{extra}"' for extra, needed in extras for r in needed)]


def _table(rows: list[dict[str, Any]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title="What is here", title_justify="left")
    for heading in ("Piece", "Found", "For", "Where it is missing"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        found = row["found"]
        missing = Text("missing", style="red") if row["required"] else Text("not here", style="yellow")
        mark = Text(found, style="green") if found else missing
        table.add_row(row["name"], mark, row["purpose"], "" if found else row["remedy"])
    return table
