"""`rescompress demo`: the run that comes with the package, and its page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from rescompress.cli import options as opt
from rescompress.cli import workspace
from rescompress.cli.output import output_of

app = typer.Typer()
CONFIGS = ("demo.yaml", "quickstart.yaml")
"""The first that is there with its network is it; setup.py takes the same one."""


@app.command()
def demo(
    ctx: typer.Context,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the run.", show_default="rescompress-out/demo")
    ] = None,
    overrides: opt.Overrides = None,
    device: opt.Device = "auto",
    threads: opt.Threads = None,
    show: opt.Open = False,
) -> None:
    """Compress the network that comes with the package, on real handwritten digits, and write the page about it.

    Example: rescompress demo
    """
    from rescompress.cli.report import opened
    from rescompress.cli.run import run
    from rescompress.core.artifact import write_text
    from rescompress.runs import claims
    from rescompress.show.report.history import load_runs
    from rescompress.show.report.html import page

    config = demo_config()
    folder = output or workspace.WORKSPACE / config.stem
    path = folder / "report.html"
    claims.check_foreign(path, claims.PAGE, "--output", force=False)
    run(ctx, config, folder, overrides, device, threads)
    write_text(path, page(load_runs([folder])))
    if not (show and opened(path)):
        output_of(ctx).hint(f"the page: {path}")


def demo_config() -> Path:
    """Return the config that comes with the package, or in a checkout the one of its examples.

    Raises:
        ToolMissing: Neither is there.
    """
    from rescompress.core.errors import ToolMissing

    here = Path(__file__).resolve().parents[1]
    for folder in (here / "demo", here.parent / "examples"):
        for config in (folder / name for name in CONFIGS if (folder / name).is_file()):
            network = re.search(r"^checkpoint: *(\S+)", config.read_text(encoding="utf-8"), re.M)
            if network is not None and (folder / network[1]).is_file():
                return config
    raise ToolMissing("the demo's files are not installed", remedy="pip install --force-reinstall rescompress")
